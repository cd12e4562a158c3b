"""Networks side by side on a folder of images: PSNR, SSIM, what they cost, and a picture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import img2tensor, tensor2img
from torch import nn

from lora_sr.adapters import count_parameters
from lora_sr.archs import load_network
from lora_sr.archs.any_size import accepted_input
from lora_sr.data.bicubic import bicubic_downscale, bicubic_upscale
from lora_sr.data.sources import find_sources, read_image
from lora_sr.errors import InputError
from lora_sr.evaluation.complexity import count_multi_adds_720p

BICUBIC, ORIGINAL = 'bicubic', 'original'
PATCH, ZOOM = 64, 3  # the picture shows patches of 64x64 pixels, each pixel 3x3


@dataclass
class Row:
    """One method's line of the table: means over the images.

    ``multi_adds`` are those for an output of 1280x720 pixels; they and ``parameters`` are None for bicubic.
    """

    name: str
    parameters: int | None
    multi_adds: int | None
    psnr: float
    ssim: float


def compare(
    gt_folder: str | os.PathLike,
    scale: int,
    checkpoints: dict[str, str | os.PathLike],
    lr_folder: str | os.PathLike | None = None,
    picture: str | os.PathLike | None = None,
) -> list[Row]:
    """Measure networks and bicubic interpolation on the images of a folder.

    PSNR and SSIM are those of the field's tables: on the Y channel of 8-bit outputs, ``scale`` pixels of border left
    out (BasicSR's metrics).

    Args:
        gt_folder: Folder of the original images.
        scale: Scale factor.
        checkpoints: Name -> checkpoint, see :func:`lora_sr.archs.load_network`.
        lr_folder: Folder of the LR images of the same names (or with ``x{scale}`` behind). By default they are made
            by MATLAB's bicubic.
        picture: A PNG file to write: for every image a detail, in all versions beside the original.

    Returns:
        A row for bicubic and one for each checkpoint, in their order.

    Raises:
        InputError: A folder, an image or a checkpoint that cannot be used, a network of another scale, or a picture
            that cannot be written.
    """
    if scale < 1:
        raise InputError(f'The scale is {scale}: it has to be a whole number of at least 1.')
    for name in (BICUBIC, ORIGINAL):
        if name in checkpoints:
            raise InputError(f'"{name}" is the name of another row or picture: give the network another name.')
    if picture is not None and (Path(picture).suffix != '.png' or not Path(picture).parent.is_dir()):
        raise InputError(f'The picture {picture} has to be a .png file in a folder that exists.')
    networks = {name: load_network(path) for name, path in checkpoints.items()}
    for name, network in networks.items():
        accepted = accepted_input(network)
        if accepted is None or accepted.channels != 3:
            raise InputError(f'"{name}" does not take RGB images of any size: compare measures networks that do.')
    sources = find_sources([gt_folder], [scale], None if lr_folder is None else [lr_folder])
    scores: dict[str, list] = {name: [] for name in (BICUBIC, *networks)}
    strips = []
    for source in sources:
        original = read_image(source.hr)
        height, width = (length - length % scale for length in original.shape[:2])
        original = np.ascontiguousarray(original[:height, :width])
        small = read_image(source.lr[scale]) if scale in source.lr else bicubic_downscale(original, scale)
        versions = {BICUBIC: bicubic_upscale(small, scale)}
        versions.update((name, super_resolve(network, small)) for name, network in networks.items())
        for name, version in versions.items():
            if version.shape != original.shape:
                raise InputError(
                    f'"{name}" makes {version.shape[1]}x{version.shape[0]} pixels of {source.hr.name}, '
                    f'where the original has {width}x{height}: its scale is not {scale}.'
                )
            scores[name].append(
                [
                    metric(version, original, crop_border=scale, test_y_channel=True)
                    for metric in (calculate_psnr, calculate_ssim)
                ]
            )
        strips.append(_strip({**versions, ORIGINAL: original}))
    if picture is not None:
        _write_picture(np.concatenate(strips), Path(picture))
    costs = {
        name: (count_parameters(network).total, count_multi_adds_720p(network, scale))
        for name, network in networks.items()
    }
    return [Row(name, *costs.get(name, (None, None)), *np.mean(values, axis=0)) for name, values in scores.items()]


@torch.inference_mode()
def super_resolve(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Run a network on one image.

    Args:
        network: RGB in [0, 1], (1, 3, H, W) -> (1, 3, scale * H, scale * W).
        image: uint8 of shape (H, W, 3), BGR.

    Returns:
        uint8 of shape (scale * H, scale * W, 3), BGR.
    """
    lr = img2tensor(image / np.float32(255), bgr2rgb=True, float32=True)
    return tensor2img(network.eval()(lr[None].contiguous(memory_format=torch.channels_last)))


def format_table(rows: list[Row]) -> str:
    """The rows as a table of fixed-width text."""
    width = max(len(row.name) for row in rows) + 2
    lines = [f'{"":{width}}{"parameters":>12}{"multi-adds (720p), G":>23}{"PSNR (Y), dB":>15}{"SSIM (Y)":>11}']
    for row in rows:
        parameters = '-' if row.parameters is None else f'{row.parameters:,}'
        multi_adds = '-' if row.multi_adds is None else f'{row.multi_adds / 1e9:.2f}'
        lines.append(f'{row.name:{width}}{parameters:>12}{multi_adds:>23}{row.psnr:>15.3f}{row.ssim:>11.4f}')
    return '\n'.join(lines)


def _strip(versions: dict[str, np.ndarray]) -> np.ndarray:
    """The same detail of all versions in one row, with captions: the detail on which bicubic errs most."""
    error = np.abs(versions[ORIGINAL].astype(np.float32) - versions[BICUBIC]).mean(2)
    side = min(PATCH, *error.shape)
    means = cv2.boxFilter(error, -1, (side, side), anchor=(0, 0), borderType=cv2.BORDER_CONSTANT)
    means = means[: error.shape[0] - side + 1, : error.shape[1] - side + 1]
    top, left = np.unravel_index(means.argmax(), means.shape)
    tiles = []
    for name, version in versions.items():
        detail = version[top : top + side, left : left + side]
        detail = cv2.resize(detail, (PATCH * ZOOM, PATCH * ZOOM), interpolation=cv2.INTER_NEAREST)
        caption = np.full((24, PATCH * ZOOM, 3), 255, np.uint8)
        cv2.putText(caption, name, (4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(
            cv2.copyMakeBorder(
                np.concatenate([caption, detail]), 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)
            )
        )
    return np.concatenate(tiles, axis=1)


def _write_picture(image: np.ndarray, path: Path) -> None:
    try:
        path.write_bytes(cv2.imencode('.png', image)[1].tobytes())
    except OSError as error:
        raise InputError(f'The picture {path} cannot be written: {error.strerror}.') from None
