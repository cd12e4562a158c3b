"""The pairs that are held back: cut so that they are quick to run, written, and measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
from torch import nn

from lora_sr.adapt.pairs import SMALLEST_SIDE, Pair
from lora_sr.adapted_folder import HR, LR
from lora_sr.data.sources import read_image
from lora_sr.images.bicubic import bicubic_downscale, bicubic_upscale
from lora_sr.images.luma import psnr
from lora_sr.images.png import encode_png
from lora_sr.runtime import Upscaler
from lora_sr.runtime.pixels import swap_channels

FOLDERS = HR, LR


@dataclass(frozen=True)
class Held:
    """A pair, uint8, BGR.

    Attributes:
        name: Its key.
        hr: (scale * h, scale * w, 3).
        camera: (h, w, 3): the LR image of the camera.
        clean: Likewise, by bicubic.
    """

    name: str
    hr: np.ndarray
    camera: np.ndarray
    clean: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Mean PSNR (Y) in dB over the pairs that are held back, a border as wide as the scale left out."""

    camera: float
    clean: float


def write_held(pairs: Sequence[Pair], folder: Path, scale: int, aligns: bool, side: int) -> None:
    """Write the middle of each pair, of at most ``side`` LR pixels each way, as PNGs of 8 bits below ``folder``.

    Raises:
        InputError: An image cannot be read any more.
        OSError: They cannot be written.
    """
    for kind in FOLDERS:
        (folder / kind).mkdir(parents=True)
    for pair in pairs:
        hr, lr = pair.read(scale, aligns)
        (top, height), (left, width) = (_middle(length, side) for length in lr.shape[:2])
        lr = lr[top : top + height, left : left + width]
        hr = hr[top * scale : (top + height) * scale, left * scale : (left + width) * scale]
        for kind, image in zip(FOLDERS, (hr, lr)):
            (folder / kind / f'{pair.name}.png').write_bytes(encode_png(_of_8_bits(image)).tobytes())


def read_held(folder: Path, scale: int) -> list[Held]:
    """What :func:`write_held` has written, in the order of the names."""
    held = []
    for file in sorted((folder / HR).iterdir()):
        hr = read_image(file)
        held.append(Held(file.stem, hr, read_image(folder / LR / file.name), bicubic_downscale(hr, scale)))
    return held


def side_for(seconds_per_pixel: float, images: int, seconds: float, most: int = 512) -> int:
    """The side in LR pixels at which a network takes some seconds for so many images, from 48 to ``most``."""
    return int(min(most, max(2 * SMALLEST_SIDE, math.sqrt(seconds / (images * seconds_per_pixel)))))


def measure(network: nn.Module, held: Sequence[Held], scale: int, has_clean: bool = True) -> Measured:
    """Mean PSNR of a network, which is merged and folded for it; ``nan`` for the clean images if they do not count."""
    upscaler = Upscaler(network)

    def mean(images: Sequence[np.ndarray]) -> float:
        return fmean(
            psnr(swap_channels(upscaler(swap_channels(image))), one.hr, scale) for image, one in zip(images, held)
        )

    camera = mean([one.camera for one in held])
    return Measured(camera, mean([one.clean for one in held]) if has_clean else math.nan)


def measure_bicubic(held: Sequence[Held], scale: int) -> Measured:
    """The same of bicubic interpolation."""
    camera, clean = (
        fmean(psnr(bicubic_upscale(getattr(one, kind), scale), one.hr, scale) for one in held)
        for kind in ('camera', 'clean')
    )
    return Measured(camera, clean)


def _middle(length: int, side: int) -> tuple[int, int]:
    size = min(length, side)
    return (length - size) // 2, size


def _of_8_bits(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else cv2.convertScaleAbs(image, alpha=255 / np.iinfo(image.dtype).max)
