"""How an image of a training set is shrunk, cropped to fit its LR images, and cut; and what that takes on the disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from lora_sr.data.lmdb_store import PAGE, RawImage
from lora_sr.data.sources import Source, read_image
from lora_sr.errors import InputError
from lora_sr.images.bicubic import BORDERS, MAX_SCALE, bicubic_downscale
from lora_sr.images.png import encode_png

MOST_TRIMMED = 2  # LR pixels a side, with --crop
SIZE, STEP = 480, 240  # of sub-images, unless told otherwise

Entry = tuple[str, np.ndarray, int, int]  # key, PNG bytes or a whole RGB image, height, width


@dataclass(frozen=True)
class Cut:
    """How an image is shrunk and cut.

    Attributes:
        scales: the scales of the LR images.
        size: side of an HR sub-image in pixels; 0 keeps images whole.
        step: distance between neighbors in pixels.
        threshold: a strip at the right or bottom edge of up to this many pixels is left out.
        border: what bicubic sees beyond the edges of a whole image: 'replicate' or 'mirror'.
        crop: trim HR and LR images whose sizes nearly fit.
        raw: store whole images as they are, instead of PNGs.
    """

    scales: tuple[int, ...]
    size: int
    step: int
    threshold: int
    border: str
    crop: bool
    raw: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ('--size', self.size, 0),
            ('--step', self.step, 1),
            ('--threshold', self.threshold, 0),
        ):
            if value < least:
                raise InputError(f'{name} must be a whole number of at least {least}, got {value}.')
        if (
            not self.scales
            or len(set(self.scales)) < len(self.scales)
            or not all(1 < scale <= MAX_SCALE for scale in self.scales)
        ):
            raise InputError(
                f'--scale must be different whole numbers from 2 to {MAX_SCALE}, got '
                f'{" ".join(map(str, self.scales)) or "none"}.'
            )
        if self.border not in BORDERS:
            raise InputError(f'--border must be {" or ".join(BORDERS)}, got {self.border}.')
        for name, value in (('--size', self.size), ('--step', self.step)):
            if self.size and value % self.multiple:
                raise InputError(
                    f'{name} must be a multiple of {self.multiple}, for one HR database to fit scale '
                    f'{" and ".join(map(str, self.scales))}, got {value}.'
                )

    @property
    def multiple(self) -> int:
        """HR sizes and positions are multiples of this, so that they are whole numbers at every scale."""
        return math.lcm(*self.scales)

    def database_names(self, bicubic: Collection[int]) -> dict[int, str]:
        """{scale: name of its database}, the HR database first, as scale 1; "bicubic" only at the scales given."""
        end = '_raw.lmdb' if self.raw else '_sub.lmdb' if self.size else '.lmdb'
        kinds = {scale: '_bicubic' if scale in bicubic else '' for scale in self.scales}
        return {1: f'HR{end}', **{scale: f'LR{kind}_X{scale}{end}' for scale, kind in kinds.items()}}


def subimage_starts(length: int, size: int, step: int, threshold: int) -> list[int]:
    """Where the sub-images start along one dimension, as in BasicSR's ``extract_subimages.py``; [0] if too short."""
    if length <= size:
        return [0]
    starts = list(range(0, length - size + 1, step))
    if length - (starts[-1] + size) > threshold:
        starts.append(length - size)
    return starts


def load(source: Source, cut: Cut) -> dict[int, np.ndarray]:
    """{scale: image}, the HR image as scale 1, cropped to sizes that fit each other exactly."""
    image = read_image(source.hr, deep=True)
    given = {scale: read_image(path, deep=True) for scale, path in source.lr.items()}
    for scale, lr in given.items():
        _check_size(source, scale, image, lr, cut.crop)
    sizes = [image.shape[:2], *((scale * lr.shape[0], scale * lr.shape[1]) for scale, lr in given.items())]
    height, width = (min(lengths) // cut.multiple * cut.multiple for lengths in zip(*sizes))
    if not height or not width:
        shared = ' in common with its LR images' if given else ''
        height, width = (min(lengths) for lengths in zip(*sizes))
        raise InputError(
            f'{source.hr} must have at least {cut.multiple} pixels each way{shared}, got {width} x {height} '
            '(width x height).'
        )
    images = {1: image[:height, :width]}
    for scale in cut.scales:
        if scale in given:
            images[scale] = given[scale][: height // scale, : width // scale]
        else:
            images[scale] = bicubic_downscale(images[1], scale, cut.border)
    return images


def _check_size(source: Source, scale: int, hr: np.ndarray, lr: np.ndarray, crop: bool) -> None:
    if lr.shape == hr.shape:
        raise InputError(
            f'{source.lr[scale]} must be {scale} times smaller than {source.hr}, got the same size: version 3 of '
            'RealSR has it so, other than versions 1 and 2.'
        )
    apart = max(abs(scale * lr_length - hr_length) for lr_length, hr_length in zip(lr.shape[:2], hr.shape[:2]))
    # MATLAB's imresize rounds a size up, many datasets round it down; the pixels lie in the same places.
    if apart < scale or (crop and apart <= MOST_TRIMMED * scale):
        return
    hint = ''
    if apart <= MOST_TRIMMED * scale:
        hint = ': --crop trims both at the right and bottom, where their top left corners show the same'
    raise InputError(
        f'{source.lr[scale]} must have {hr.shape[1] // scale} x {hr.shape[0] // scale} pixels (width x height), the '
        f'size of {source.hr} by {scale}, got {lr.shape[1]} x {lr.shape[0]}{hint}.'
    )


class Cost(NamedTuple):
    """What images take on the disk.

    Attributes:
        raw: bytes of them and their LR images, whole and uncompressed.
        pixels: HR pixels of their sub-images.
        measured: HR pixels of the sub-images of those for which PNG has been measured.
        png: bytes of these sub-images and their LR images as PNGs, by one of each image.
    """

    raw: int = 0
    pixels: int = 0
    measured: int = 0
    png: int = 0

    @classmethod
    def sum(cls, costs: Iterable[Cost]) -> Cost:
        """What several images take."""
        return cls(*map(sum, zip(cls(), *costs)))


def cost_of(images: Mapping[int, np.ndarray], cut: Cut, measured: bool) -> Cost:
    """What an image costs, from {scale: image}; of raw images as sub-images, too."""
    raw = sum(RawImage(image.shape, image.dtype.name, '').stored_bytes for image in images.values())
    if not cut.raw:
        return Cost(raw)
    (height, width), multiple = images[1].shape[:2], cut.multiple
    size, step = (max(1, length // multiple) * multiple for length in (SIZE, STEP))
    tops, lefts = (subimage_starts(length, size, step, 0) for length in (height, width))
    h, w = min(height, size), min(width, size)
    pixels = len(tops) * len(lefts) * h * w
    if not measured:
        return Cost(raw, pixels)
    top, left = tops[len(tops) // 2], lefts[len(lefts) // 2]
    one = sum(
        len(encode_png(image[top // scale : (top + h) // scale, left // scale : (left + w) // scale])) + PAGE
        for scale, image in images.items()
    )
    return Cost(raw, pixels, pixels, len(tops) * len(lefts) * one)


def cut_image(key: str, images: Mapping[int, np.ndarray], cut: Cut) -> dict[int, list[Entry]]:
    """{scale: its sub-images, encoded}, from {scale: image}; of raw ones {scale: the image in RGB}."""
    if cut.raw:
        return {
            scale: [(key, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), *image.shape[:2])] for scale, image in images.items()
        }
    height, width = images[1].shape[:2]
    if cut.size:
        corners = [
            (top, left)
            for top in subimage_starts(height, cut.size, cut.step, cut.threshold)
            for left in subimage_starts(width, cut.size, cut.step, cut.threshold)
        ]
        keys = [f'{key}_s{number:03d}' for number in range(1, len(corners) + 1)]
        height, width = min(height, cut.size), min(width, cut.size)
    else:
        corners, keys = [(0, 0)], [key]
    entries: dict[int, list[Entry]] = {}
    for scale, image in images.items():
        h, w = height // scale, width // scale
        entries[scale] = []
        for key, (top, left) in zip(keys, corners):
            crop = image[top // scale : top // scale + h, left // scale : left // scale + w]
            entries[scale].append((key, encode_png(crop), h, w))
    return entries
