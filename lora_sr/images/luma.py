"""The Y channel, on which the field measures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

BGR_TO_Y = (24.966, 128.553, 65.481)  # of values in [0, 1], for a Y in [16, 235] (ITU-R BT.601), as MATLAB has it


def luma(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The Y channel of an image, not rounded to whole numbers.

    It is worked out by way of float32, as in BasicSR, whose numbers the field's tables have.

    Args:
        image: (H, W, 3), BGR.

    Returns:
        (H, W), in [16, 235].
    """
    y = (np.dot(image.astype(np.float32) / np.float32(255), BGR_TO_Y) + 16.0) / 255.0
    return np.asarray(y.astype(np.float32) * np.float32(255), np.float64)


def psnr(image: NDArray[np.uint8], original: NDArray[np.uint8], border: int) -> float:
    """PSNR in dB on the Y channel, ``border`` pixels at each side left out; infinite for equal images.

    Args:
        image: (H, W, 3), BGR.
        original: Likewise.
        border: In pixels.
    """
    error: Any = np.mean(np.square(_within(luma(image), border) - _within(luma(original), border)))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _within(plane: NDArray[np.float64], border: int) -> NDArray[np.float64]:
    return plane[border : plane.shape[0] - border, border : plane.shape[1] - border]
