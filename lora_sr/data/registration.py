"""How an LR image lies on the HR image of its pair, and how their colors differ; and a pair put right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lora_sr.errors import InputError

Channels = tuple[float, float, float]  # B, G, R

SMALLEST = 16  # LR pixels each way in which a shift can be told
LARGEST = 1024  # LR pixels each way that are looked at, in the middle
REACH = 12  # LR pixels of the search
COARSE, FINE = 4.0, 1.0  # LR pixels: sigma of what is no detail, and of what noise is smoothed with
STEPS, LEAST_RISE = 20, 1e-6  # of the refinement; of the correlation
BORDER = 4  # LR pixels that are left out
DARKEST, LIGHTEST = 8, 247  # of 255: what is clipped tells nothing of a gain
LEAST_SPREAD = 4.0  # of 255, standard deviation: what is flatter has no gain


@dataclass(frozen=True)
class Registration:
    """What :func:`register` has found.

    Attributes:
        shift: (x, y) in LR pixels: how far the LR image shows things to the right of where the HR image has them, and
            below.
        correlation: of the two images after the shift, -1 to 1. Two that show the same have more than 0.9.
        gain, offset: of B, G and R: LR = gain * HR + offset, with values from 0 to 255.
    """

    shift: tuple[float, float]
    correlation: float
    gain: Channels
    offset: Channels

    @property
    def color(self) -> float:
        """How much the colors differ: the largest change of a value of 64, 128 or 192, of 255."""
        return max(
            abs(gain * value + offset - value)
            for gain, offset in zip(self.gain, self.offset)
            for value in (64, 128, 192)
        )


def register(hr: NDArray[Any], lr: NDArray[Any], scale: int) -> Registration:
    """Find by how much an LR image is shifted on its HR image, to a few hundredths of a pixel, and its colors.

    Phase correlation and a search give shifts to begin at, Gauss-Newton steps refine them, and the one with the highest
    correlation counts. A least-squares fit of each channel gives gain and offset. Of large images the middle is looked
    at.

    Source: Lucas and Kanade, "An Iterative Image Registration Technique" (IJCAI 1981). OpenCV has ECC for
    that, which was off by a tenth of the shift on images of 72 pixels.

    Args:
        hr: uint8 or uint16, (H, W, 3), BGR.
        lr: Likewise, (h, w, 3), of at least 16 pixels each way; scale * h <= H and scale * w <= W, from the top left.
        scale: Scale factor.

    Raises:
        InputError: The LR image is smaller.
    """
    height, width = lr.shape[:2]
    if min(height, width) < SMALLEST:
        raise InputError(f'an LR image must have at least {SMALLEST} pixels each way, got {width} x {height}')
    rows, columns = (slice((n - min(n, LARGEST)) // 2, (n + min(n, LARGEST)) // 2) for n in (height, width))
    lr = lr[rows, columns]
    hr = hr[rows.start * scale : rows.stop * scale, columns.start * scale : columns.stop * scale]
    size = lr.shape[1], lr.shape[0]
    small, given = (cv2.resize(_float(hr), size, interpolation=cv2.INTER_AREA), _float(lr))
    gray, other = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in (small, given))
    starts = ((0.0, 0.0), _by_phase(gray, other), _by_search(gray, other))
    (x, y), correlation = max((_refine(gray, other, start) for start in starts), key=lambda one: one[1])
    gain, offset = _colors(_moved(small, x, y), given, math.ceil(max(abs(x), abs(y))) + 1)
    return Registration((x, y), correlation, gain, offset)


def align(
    hr: NDArray[Any], lr: NDArray[Any], scale: int, registration: Registration
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A pair put right without resampling: both are cropped, and HR gets the colors of LR.

    The shift is undone to the nearest HR pixel, i.e. to half an HR pixel.

    Args:
        hr, lr, scale: As for :func:`register`.
        registration: What is to be undone.

    Returns:
        HR and LR, of the same types, the former ``scale`` times as large.
    """
    x, y = (round(one * scale) for one in registration.shift)
    hr, lr = hr[: lr.shape[0] * scale], lr
    (hr_top, lr_top), (hr_left, lr_left) = _crop(y, scale), _crop(x, scale)
    hr, lr = hr[hr_top:, hr_left:], lr[lr_top:, lr_left:]
    height, width = (min(big // scale, small) for big, small in zip(hr.shape[:2], lr.shape[:2]))
    hr, lr = hr[: height * scale, : width * scale], lr[:height, :width]
    peak = np.iinfo(hr.dtype).max
    gain, offset = np.array(registration.gain, np.float32), np.array(registration.offset, np.float32) * (peak / 255)
    colored = np.clip(np.round(hr.astype(np.float32) * gain + offset), 0, peak).astype(hr.dtype)
    return np.ascontiguousarray(colored), np.ascontiguousarray(lr)


def _crop(shift: int, scale: int) -> tuple[int, int]:
    """How many HR and LR pixels go at one side, where LR shows things ``shift`` HR pixels later than HR does."""
    if shift <= 0:
        return -shift, 0
    lr = -(-shift // scale)
    return lr * scale - shift, lr


def _by_phase(gray: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """The shift by phase correlation, of any size."""
    window = cv2.createHanningWindow(gray.shape[::-1], cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(gray.copy(), other.copy(), window)  # which writes into its arguments
    return x, y


def _by_search(gray: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """The shift of whole pixels, up to :data:`REACH`, at which the details of the two correlate most."""
    details = [image - cv2.GaussianBlur(image, (0, 0), COARSE) for image in (gray, other)]
    reach = min(REACH, min(gray.shape) // 4)
    inner = np.ascontiguousarray(details[0][reach:-reach, reach:-reach])
    _, _, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(details[1], inner, cv2.TM_CCOEFF_NORMED))
    return float(x - reach), float(y - reach)


def _refine(gray: NDArray[Any], other: NDArray[Any], start: tuple[float, float]) -> tuple[tuple[float, float], float]:
    """The shift near ``start`` at which two images differ least but for gain and offset, and their correlation there.

    Each step solves other(p + shift + d) = gain * gray(p) + offset for all four, to first order in d.
    """
    gray, other = (cv2.GaussianBlur(image, (0, 0), FINE) for image in (gray, other))
    best, (x, y) = (start, -1.0), start
    for _ in range(STEPS):
        margin = math.ceil(max(abs(x), abs(y))) + BORDER
        if 2 * margin + BORDER > min(gray.shape):
            break
        inner = slice(margin, -margin)
        moved = _moved(other, -x, -y)
        first, second = gray[inner, inner].ravel(), moved[inner, inner].ravel()
        spread = float(first.std() * second.std())
        correlation = float(np.mean((first - first.mean()) * (second - second.mean())) / spread) if spread else -1.0
        if correlation <= best[1] + LEAST_RISE:
            break
        best = (x, y), correlation
        slopes = [np.gradient(moved, axis=axis)[inner, inner].ravel() for axis in (1, 0)]
        columns = np.stack([first, np.ones_like(first), *(-slope for slope in slopes)], 1).astype(np.float64)
        solution = np.linalg.lstsq(columns, second.astype(np.float64), rcond=None)[0]
        x, y = x + float(solution[2]), y + float(solution[3])
    return best


def _moved(image: NDArray[Any], x: float, y: float) -> NDArray[Any]:
    """An image with its contents (x, y) pixels further to the right and below."""
    move, size = np.array([[1, 0, x], [0, 1, y]], np.float32), (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, move, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _colors(small: NDArray[Any], given: NDArray[Any], margin: int) -> tuple[Channels, Channels]:
    """Gain and offset of each channel, from what is neither at the border nor clipped."""
    inner = slice(margin, -margin)
    gains, offsets = [], []
    for channel in range(3):
        x, y = (image[inner, inner, channel].ravel().astype(np.float64) for image in (small, given))
        used = (np.minimum(x, y) >= DARKEST) & (np.maximum(x, y) <= LIGHTEST)
        x, y = x[used], y[used]
        if len(x) < SMALLEST or x.std() < LEAST_SPREAD:
            gains.append(1.0)
            offsets.append(float(y.mean() - x.mean()) if len(x) else 0.0)
            continue
        gain = float(((x - x.mean()) * (y - y.mean())).mean() / x.var())
        gains.append(gain)
        offsets.append(float(y.mean() - gain * x.mean()))
    return (gains[0], gains[1], gains[2]), (offsets[0], offsets[1], offsets[2])


def _float(image: NDArray[Any]) -> NDArray[Any]:
    return image.astype(np.float32) * np.float32(255 / np.iinfo(image.dtype).max)
