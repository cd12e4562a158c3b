"""MATLAB's bicubic ``imresize``, as it acts on images of 8 and 16 bits: the resize that made the published LR sets.

The kernel is Keys' cubic convolution with a = -0.5 (R. Keys, "Cubic convolution interpolation for digital image
processing", IEEE Trans. ASSP 29, 1981). When an image shrinks, MATLAB widens the kernel by the scale (``Antialiasing``,
on by default), and resizes the rows first, then the columns. On 8-bit images it rounds to 8 bits after each of the two,
on 16-bit images to 16. Leaving out that first rounding is what makes other ports of ``imresize`` differ by one level
here and there.

Beyond the borders, early releases of ``imresize`` repeat the edge pixel ("clamp out-of-range indices" says their code),
later ones mirror the image. The published LR images of Set5, Set14 (x2, x3 and x4) and B100 (x4) were made the first
way: ``replicate``, the default here, gives all 157 bit by bit; ``mirror`` gives none of them, for the two outermost
pixels differ, by up to 11 levels.

At an integer scale every weight is a fraction of small integers, so the sums below are whole numbers, and rounding a
half upwards is exact. At scales 2, 3, 4 and 8 that is MATLAB's result bit by bit; at other scales MATLAB's own floating
point may settle an exact half the other way.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np

from lora_sr.errors import InputError

BORDERS = ('replicate', 'mirror')  # what lies beyond the edge: the edge pixel again, or the image backwards
MAX_SCALE = 16  # up to here 32-bit sums of 8-bit values cannot overflow
BLOCK_BYTES = 1 << 18  # sums held at a time: a block of rows that stays in a core's cache


def bicubic_downscale(image: np.ndarray, scale: int, border: str = 'replicate') -> np.ndarray:
    """Shrink an image as MATLAB's ``imresize(image, 1 / scale)`` does.

    Args:
        image: uint8 or uint16, of shape (height, width) or (height, width, channels), over the whole range of the type.
            The order of the channels does not matter.
        scale: a whole number from 1 to 16.
        border: 'replicate', as the published test sets have it, or 'mirror', as MATLAB has it today.

    Returns:
        The same type, of shape (ceil(height / scale), ceil(width / scale)) and the same channels.

    Raises:
        InputError: if the image is of another type or is empty, the scale is out of range, or the border is another.
    """
    return _resize(image, scale, border, shrink=True)


def bicubic_upscale(image: np.ndarray, scale: int, border: str = 'replicate') -> np.ndarray:
    """Enlarge an image as MATLAB's ``imresize(image, scale)`` does: the "bicubic" row of the published tables.

    The border changes the outermost ``scale / 2`` pixels alone, which PSNR and SSIM leave out.

    Args:
        image: uint8 or uint16, of shape (height, width) or (height, width, channels), over the whole range of the type.
        scale: a whole number from 1 to 16.
        border: 'replicate' or 'mirror'.

    Returns:
        The same type, of shape (height * scale, width * scale) and the same channels.

    Raises:
        InputError: if the image is of another type or is empty, the scale is out of range, or the border is another.
    """
    return _resize(image, scale, border, shrink=False)


def _resize(image: np.ndarray, scale: int, border: str, shrink: bool) -> np.ndarray:
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or image.size == 0:
        raise InputError(
            'The image to resize must have 8-bit or 16-bit values of shape (height, width) or (height, width, '
            f'channels), got {image.dtype} of shape {image.shape}.'
        )
    if scale != int(scale) or not 1 <= scale <= MAX_SCALE:
        raise InputError(f'The scale of a resize must be a whole number from 1 to {MAX_SCALE}, got {scale}.')
    if border not in BORDERS:
        raise InputError(f'The border of a resize must be {" or ".join(BORDERS)}, got {border}.')
    scale = int(scale)
    planes = image.reshape(image.shape[0], image.shape[1], -1)
    planes = _resize_rows(planes, scale, border, shrink)
    # Columns are resized as the rows of the transposed image: long runs of memory rather than steps of one pixel.
    planes = _resize_rows(np.ascontiguousarray(planes.swapaxes(0, 1)), scale, border, shrink)
    planes = np.ascontiguousarray(planes.swapaxes(0, 1))
    return planes.reshape(planes.shape[:2] + image.shape[2:])


def _resize_rows(planes: np.ndarray, scale: int, border: str, shrink: bool) -> np.ndarray:
    """Resize dimension 0 of (rows, columns, channels) and round to whole numbers of the same type."""
    rows = planes.shape[0]
    phases, denominator = resampling_weights(scale, shrink)
    stride = scale if shrink else 1
    steps = -(-rows // stride)  # output rows of each phase
    before = -min(first for first, _ in phases)
    after = (steps - 1) * stride + max(first + len(taps) for first, taps in phases) - rows
    index = np.arange(-before, rows + max(after, 0))
    if border == 'mirror':
        # The edge row included, over and over where the image is smaller than the kernel.
        index %= 2 * rows
        index = np.minimum(index, 2 * rows - 1 - index)
    else:
        index = index.clip(0, rows - 1)
    padded = planes.reshape(rows, -1)[index]

    width = padded.shape[1]
    output = np.empty((steps, len(phases), width), planes.dtype)
    sums = np.dtype(np.int32 if planes.dtype == np.uint8 else np.int64)
    block = max(1, BLOCK_BYTES // (sums.itemsize * width))
    total = np.empty((block, width), sums)
    term = np.empty_like(total)
    for start in range(0, steps, block):
        count = min(block, steps - start)
        for phase, (first, taps) in enumerate(phases):
            total[:count] = denominator // 2  # half up; an odd denominator has no halves
            for tap, weight in enumerate(taps, before + first + start * stride):
                source = padded[tap : tap + (count - 1) * stride + 1 : stride]
                np.multiply(source, weight, out=term[:count], dtype=sums)
                total[:count] += term[:count]
            np.floor_divide(total[:count], denominator, out=total[:count])
            np.clip(total[:count], 0, np.iinfo(planes.dtype).max, out=total[:count])
            output[start : start + count, phase] = total[:count]
    return output.reshape(steps * len(phases), *planes.shape[1:])


@cache
def resampling_weights(scale: int, shrink: bool) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], int]:
    """The taps of one dimension as whole numbers over a common denominator.

    Output row ``p + n * len(phases)`` is the sum of ``taps[t] * input[n * stride + first + t]`` over ``denominator``,
    with (first, taps) = phases[p]; the stride is ``scale`` when shrinking, with one phase, and 1 when enlarging, with
    ``scale``.

    Returns:
        (phases, denominator).
    """
    widening = scale if shrink else 1
    # Where the center of an output row falls among the input rows, counted from the stride's start.
    centers = [Fraction(scale - 1, 2)] if shrink else [Fraction(2 * p + 1 - scale, 2 * scale) for p in range(scale)]
    exact = []
    for center in centers:
        taps = range(math.floor(center - 2 * widening) + 1, math.ceil(center + 2 * widening))
        exact.append((taps.start, [_cubic((tap - center) / widening) / widening for tap in taps]))
    denominator = math.lcm(*(weight.denominator for _, taps in exact for weight in taps))
    phases = tuple((first, tuple(int(weight * denominator) for weight in taps)) for first, taps in exact)
    return phases, denominator


def _cubic(x: Fraction) -> Fraction:
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    if x <= 1:
        return (3 * x**3 - 5 * x**2 + 2) / 2
    if x < 2:
        return (-(x**3) + 5 * x**2 - 8 * x + 4) / 2
    return Fraction(0)
