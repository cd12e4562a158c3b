"""The check that the network and the data sets fit: what BasicSR finds out at the first batch, or validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import nn

from lora_sr.archs.info import NetworkInfo, network_info
from lora_sr.archs.padding import is_padded
from lora_sr.basicsr.options.check import Check, find
from lora_sr.basicsr.options.degradations import DATASET as DEGRADED

# What BasicSR's metrics need of an image: a window of SSIM; NIQE's statistics are over blocks.
NEEDED: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    'calculate_ssim': ('11 pixels each way', lambda height, width: min(height, width) >= 11),
    'calculate_niqe': ('two blocks of 96x96 pixels', lambda height, width: (height // 96) * (width // 96) >= 2),
}


def check_fit(check: Check) -> None:
    """Check that `network_g` takes the channels and sizes of the images, and gives them `scale` times as large.

    Only where all else is right, and of models of BasicSR and of this package: who knows what another one does.
    """
    network: nn.Module | None = check.networks.get('network_g')
    if network is None or check.problems or 'open' in check.facts:
        return
    info = network_info(network)
    if info is None:  # not of images, one by one
        return
    name = f'network_g ({type(network).__name__})'
    scale = check.opt.get('scale')
    if info.scale != scale:
        check.add(f'scale must be {info.scale}, by which {name} enlarges, got {scale}')
    for key, dataset in check.subsection('datasets').items():
        if isinstance(dataset, dict) and (check.is_train or key != 'train'):
            _check_channels(check, f'datasets.{key}', dataset, name, info)
    _check_borders(check, info.scale)
    if not check.problems and info.fixed_size is None and not is_padded(network):
        _check_sizes(check, name, info)


def _check_channels(check: Check, where: str, dataset: dict, name: str, info: NetworkInfo) -> None:
    channels = 1 if dataset.get('color') == 'y' else 3
    if info.in_channels != channels:
        what = 'color: y' if channels == 1 else 'no color: y'
        check.add(f'{where} must give images of {info.in_channels} channels to {name}, got {channels} ({what})')


def _check_borders(check: Check, scale: int) -> None:
    """Check that metrics have enough of each image."""
    for metric, section in (check.subsection('val').get('metrics') or {}).items():
        border, kind = section.get('crop_border', 0), section.get('type')
        words, is_enough = NEEDED.get(kind, ('a pixel', lambda height, width: min(height, width) > 0))
        for where, sizes in check.lr_sizes.items():
            for (height, width), image in sizes.items() if isinstance(border, int) else ():
                height, width = scale * height, scale * width
                if not is_enough(height - 2 * border, width - 2 * border):
                    check.add(
                        f"val.metrics.{metric}.crop_border must leave {kind} {words}, got {border} for '{image}' of "
                        f'{where}, whose result has {width}x{height}'
                    )
                    break


def _check_sizes(check: Check, name: str, info: NetworkInfo) -> None:
    multiple = info.size_multiple
    train: Any = check.subsection('datasets').get('train', {})
    size = check.opt.get('gt_size') if train.get('type') == DEGRADED else train.get('gt_size')
    if check.is_train and size is not None and size // info.scale % multiple:
        check.add(
            f'gt_size must be a multiple of {info.scale * multiple}, since {name} takes multiples of {multiple}, got '
            f'{size}'
        )
    if not _pads_itself(check):
        for where, sizes in check.lr_sizes.items():
            for (height, width), image in sizes.items():
                if height % multiple or width % multiple:
                    check.add(
                        f'{where} must have LR images whose sizes are multiples of {multiple}, for {name}, got '
                        f"'{image}' of {width}x{height}; crop them, or leave the set out"
                    )
                    break


def _pads_itself(check: Check) -> bool:
    """Whether the model pads images to whole windows when it tests."""
    model = find(MODEL_REGISTRY, check.opt.get('model_type'))
    return getattr(model, 'test', None) is not SRModel.test and bool(check.subsection('network_g').get('window_size'))
