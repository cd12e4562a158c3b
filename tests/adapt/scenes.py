"""Scenes with detail of all sizes, and what a camera makes of them."""

from __future__ import annotations

import cv2
import numpy as np

from lora_sr.images.bicubic import bicubic_downscale


def scene(number: int, height: int = 128, width: int = 144) -> np.ndarray:
    """An image, uint8 of shape (height, width, 3)."""
    random = np.random.default_rng(number)
    image = sum(
        cv2.resize(random.random((-(-height // n), -(-width // n), 3)), (width, height)) * n for n in (1, 3, 8, 16, 40)
    )
    return np.uint8(10 + 230 * (image - image.min()) / np.ptp(image))


def taken(hr: np.ndarray, scale: int = 2) -> np.ndarray:
    """What the camera makes of a scene: softer than bicubic, and darker by a little."""
    return bicubic_downscale(cv2.GaussianBlur(hr, (0, 0), 1.2), scale)
