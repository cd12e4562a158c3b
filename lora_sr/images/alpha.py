"""Alpha: what is hidden under it."""

from __future__ import annotations

import cv2
import numpy as np


def without_hidden_colors(pixels: np.ndarray) -> np.ndarray:
    """Extend the visible colors into what is wholly transparent, so that no filter mixes hidden colors into them.

    Args:
        pixels: (H, W, C) of any type, the last channel alpha.

    Returns:
        The same, with the color of the nearest visible pixel wherever alpha is 0; itself if all or none is visible.
    """
    is_hidden = pixels[:, :, -1] == 0
    if not is_hidden.any() or is_hidden.all():
        return pixels
    # Each visible pixel has a label of its own, and each hidden one that of the nearest visible one.
    _, labels = cv2.distanceTransformWithLabels(
        is_hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colors = np.empty((labels.max() + 1, pixels.shape[2] - 1), pixels.dtype)
    colors[labels[~is_hidden]] = pixels[~is_hidden, :-1]
    filled = pixels.copy()
    filled[is_hidden, :-1] = colors[labels[is_hidden]]
    return filled
