"""The kinds of pixels that libraries have: Pillow's modes, and OpenCV's order of colors."""

from __future__ import annotations

import numpy as np

GRAY_MODES, ALPHA_MODES = ('1', 'L', 'LA', 'La'), ('LA', 'La', 'PA', 'RGBA', 'RGBa')
MODES_OF_8_BITS = (*GRAY_MODES, *ALPHA_MODES, 'P', 'RGB', 'RGBX', 'YCbCr')


def swap_red_and_blue(pixels: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) as BGR, or BGR as RGB; a fourth channel, alpha, stays."""
    return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
