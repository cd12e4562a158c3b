"""Pairs before and after: PSNR of each, and where in it two networks differ most."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import nn

from lora_sr.adapted_folder import HR, LR
from lora_sr.data.sources import read_image
from lora_sr.errors import InputError
from lora_sr.images.luma import luma, psnr
from lora_sr.images.png import encode_png
from lora_sr.report.markup import heading, text
from lora_sr.runtime import Upscaler
from lora_sr.runtime.pixels import swap_channels

CROP = 80, 60  # width and height in HR pixels, at most
AT_EACH_END = 2


@dataclass(frozen=True)
class Crop:
    """The part of a pair in which two networks differ most, uint8, BGR.

    Attributes:
        left: Where it begins in the image, in HR pixels.
        top: Likewise.
        hr: (h, w, 3).
        lr: (h / scale, w / scale, 3).
        before: As ``hr``: what the first network makes of ``lr``.
        after: What the second one makes.
    """

    left: int
    top: int
    hr: np.ndarray
    lr: np.ndarray
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class BeforeAfter:
    """What two networks make of a pair.

    Attributes:
        name: Of the pair.
        before: PSNR (Y) in dB of the first network.
        after: Of the second one.
        crop: Where they differ most.
    """

    name: str
    before: float
    after: float
    crop: Crop

    @property
    def gain(self) -> float:
        """In dB; 0 where both are the same, also if that is infinite."""
        return 0.0 if self.before == self.after else self.after - self.before


def look_at_each(folder: Path, before: nn.Module, after: nn.Module) -> list[BeforeAfter]:
    """Run two networks on pairs.

    Args:
        folder: With ``HR`` and ``LR``, which have images of the same names.
        before: A network.
        after: Another one, of the same scale.

    Returns:
        What they make of each pair, in the order of the names.

    Raises:
        InputError: There is no image, one cannot be used, or the networks are of two scales.
    """
    runners = Upscaler(before), Upscaler(after)
    scale, other_scale = (runner.scale for runner in runners)
    if scale != other_scale:
        raise InputError(f'The network after must be one for x{scale}, as the one before is, got x{other_scale}.')
    found = []
    for file in sorted((folder / HR).glob('*.png')):
        hr, lr = read_image(file), read_image(folder / LR / file.name)
        (height, width), got = lr.shape[:2], f'{hr.shape[1]} x {hr.shape[0]}'
        if hr.shape[:2] != (height * scale, width * scale) or min(height, width) <= 2:
            raise InputError(f'{file} must have {width * scale} x {height * scale} pixels (width x height), got {got}.')
        one, other = (swap_channels(runner(swap_channels(lr))) for runner in runners)
        crop = _crop(hr, lr, one, other, scale)
        found.append(BeforeAfter(file.stem, psnr(one, hr, scale), psnr(other, hr, scale), crop))
    if not found:
        raise InputError(f'{folder / HR} must have an image, got none.')
    return found


def choose(pairs: Sequence[BeforeAfter]) -> tuple[list[BeforeAfter], list[BeforeAfter]]:
    """The two pairs that gained most, and the two that gained least; none of them twice."""
    ranked = sorted(pairs, key=lambda pair: (-pair.gain, pair.name))
    most = ranked[: min(AT_EACH_END, (len(ranked) + 1) // 2)]
    return most, ranked[len(most) :][-AT_EACH_END:]


def sliders(pairs: Sequence[BeforeAfter], level: int) -> str:
    """The crops of pairs as HTML, each with a divider between before and after that moves."""
    return f'<div class="pairs">{"".join(_slider(pair, level) for pair in pairs)}</div>'


def data_url(pixels: np.ndarray) -> str:
    """An image, uint8, (h, w, 3), BGR, as what stands in a page."""
    data = base64.b64encode(encode_png(np.ascontiguousarray(pixels)).tobytes()).decode()
    return f'data:image/png;base64,{data}'


def extent(left: int, top: int, width: int, height: int) -> str:
    """Which pixels of an image a part of it has, as text."""
    return f'{left} to {left + width - 1} across and {top} to {top + height - 1} down'


def _slider(pair: BeforeAfter, level: int) -> str:
    crop, name = pair.crop, text(pair.name)
    height, width = crop.hr.shape[:2]
    size = f'width="{width}" height="{height}"'

    def image(pixels: np.ndarray, kind: str) -> str:
        shown = f'<img {size} src="{data_url(pixels)}" alt="{kind}, pair {name}">'
        return f'{shown}<figcaption>{kind}</figcaption>'

    return f"""
<section class="pair" style="--w:{width};--h:{height}">
{heading(f'{pair.name}: {pair.gain:+.2f} dB', level)}
<p>{pair.before:.2f} dB before, {pair.after:.2f} dB after. \
Shown are pixels {extent(crop.left, crop.top, width, height)}.</p>
<div class="stage">
<figure>{image(crop.before, 'Before')}</figure>
<figure class="over">{image(crop.after, 'After')}</figure>
</div>
<label class="slider"><span>Divider between before and after, pair {name}</span>
<input type="range" min="0" max="100" value="50" step="1"></label>
<div class="stills">
<figure>{image(crop.lr, 'LR image')}</figure>
<figure>{image(crop.hr, 'HR image')}</figure>
</div>
</section>"""


def _crop(hr: np.ndarray, lr: np.ndarray, before: np.ndarray, after: np.ndarray, scale: int) -> Crop:
    """Where the two differ most in luma, by the sum of squares, within what PSNR is measured on."""
    sums = cv2.integral(np.square(luma(before) - luma(after)))
    rows, columns = lr.shape[0] - 2, lr.shape[1] - 2  # in LR pixels, in which the crop begins and ends
    height, width = min(CROP[1] // scale, rows), min(CROP[0] // scale, columns)
    tops, lefts = (scale * np.arange(1, 2 + most - side) for most, side in ((rows, height), (columns, width)))
    ends = np.ix_(tops, lefts), np.ix_(tops, lefts + width * scale)
    below = np.ix_(tops + height * scale, lefts), np.ix_(tops + height * scale, lefts + width * scale)
    inside = sums[below[1]] - sums[below[0]] - sums[ends[1]] + sums[ends[0]]
    row, column = np.unravel_index(int(np.argmax(inside)), inside.shape)
    top, left = int(tops[row]), int(lefts[column])
    part = np.s_[top : top + height * scale, left : left + width * scale]
    small = np.s_[top // scale : top // scale + height, left // scale : left // scale + width]
    return Crop(left, top, hr[part], lr[small], before[part], after[part])
