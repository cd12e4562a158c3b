"""LPIPS and DISTS, as pyiqa computes them, as metrics of BasicSR. pyiqa is optional: `pip install lora-sr[iqa]`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from basicsr.metrics.metric_util import reorder_image

from lora_sr.errors import InputError

# The files that pyiqa reads for each metric, below torch hub's folder: torchvision's network, and the metric itself.
WEIGHTS = {
    'lpips': ('checkpoints/alexnet-owt-7be5be79.pth', 'pyiqa/LPIPS_v0.1_alex-df73285e.pth'),
    'dists': ('checkpoints/vgg16-397923af.pth', 'pyiqa/DISTS_weights-f5e65c96.pth'),
}


def calculate_lpips(
    img: np.ndarray, img2: np.ndarray, crop_border: int, input_order: str = 'HWC', **kwargs: Any
) -> float:
    """LPIPS (version 0.1, AlexNet) between two images; 0 for equal ones, and less is better.

    Source: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv:1801.03924), by pyiqa.

    Args:
        img: Image of the network: BGR or gray, range [0, 255], of any type.
        img2: Ground truth, of the same shape.
        crop_border: Pixels that are left out at each side.
        input_order: ``HWC`` or ``CHW``.
        kwargs: Not used; BasicSR hands on whatever stands in the section.

    Raises:
        InputError: pyiqa or its weights are not there, or the shapes differ.
    """
    return _distance('lpips', img, img2, crop_border, input_order)


def calculate_dists(
    img: np.ndarray, img2: np.ndarray, crop_border: int, input_order: str = 'HWC', **kwargs: Any
) -> float:
    """DISTS between two images; 0 for equal ones, and less is better.

    Source: Image Quality Assessment: Unifying Structure and Texture Similarity (arXiv:2004.07728), by pyiqa.

    Args and raises: As :func:`calculate_lpips`.
    """
    return _distance('dists', img, img2, crop_border, input_order)


def is_iqa_metric(metric: Callable) -> bool:
    """Whether a registered metric is one of these, which need pyiqa."""
    return metric in (calculate_lpips, calculate_dists)


def lower_is_better(name: str) -> bool:
    """Whether the lower value is the better one, in the metric of that registered name."""
    return name in ('calculate_niqe', 'calculate_fid', calculate_lpips.__name__, calculate_dists.__name__)


def prepare_metric(metric: Callable) -> None:
    """Build the network of :func:`calculate_lpips` or :func:`calculate_dists`, which is then kept for this process.

    Raises:
        InputError: pyiqa is not installed, or its weights are not there and cannot be fetched.
    """
    _network(metric.__name__[len('calculate_') :])


@functools.lru_cache(maxsize=None)
def _network(name: str) -> Callable:
    """pyiqa's metric of that name, on the GPU where there is one: two images (1, 3, H, W), RGB in [0, 1] -> score."""
    try:
        import pyiqa
    except ImportError as error:
        installed = '' if getattr(error, 'name', None) == 'pyiqa' else f', which fails to load ({error})'
        raise InputError(f'calculate_{name} needs pyiqa{installed}: pip install lora-sr[iqa]') from error
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return pyiqa.create_metric(name, device=device)
    except Exception as error:  # of the network, of a damaged file, of whatever builds the networks
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        files = [Path(torch.hub.get_dir()) / file for file in WEIGHTS[name]]
        missing = ' and '.join(f'{file.name} into {file.parent}' for file in files if not file.is_file())
        if missing:
            sentence = f'calculate_{name} has no weights, and pyiqa cannot fetch them ({reason}): put {missing}'
        else:
            damaged = ' or '.join(map(str, files))
            sentence = f'calculate_{name} cannot be set up by pyiqa ({reason}): {damaged} may be damaged'
        raise InputError(sentence) from error


def _distance(name: str, img: np.ndarray, img2: np.ndarray, crop_border: int, input_order: str) -> float:
    if img.shape != img2.shape:
        raise InputError(f'calculate_{name} needs images of one shape, not {img.shape} and {img2.shape}')
    with torch.no_grad():
        return float(_network(name)(*(_tensor(image, crop_border, input_order) for image in (img, img2))))


def _tensor(image: np.ndarray, crop_border: int, input_order: str) -> torch.Tensor:
    """An image as BasicSR's metrics get it -> (1, 3, H, W), RGB in [0, 1], without the border."""
    image = reorder_image(image, input_order=input_order)
    height, width = image.shape[:2]
    image = image[crop_border : height - crop_border, crop_border : width - crop_border, ::-1]
    tensor = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
    return tensor.expand(1, 3, -1, -1).contiguous()
