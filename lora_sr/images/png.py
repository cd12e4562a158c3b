"""PNG as bytes: what frames a file, and how the databases encode an image."""

from __future__ import annotations

import cv2
import numpy as np

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
PNG_END = b'\x00\x00\x00\x00IEND\xaeB`\x82'


def encode_png(image: np.ndarray) -> np.ndarray:
    """A uint8 image of shape (height, width, 3), BGR, as PNG bytes at compression level 1.

    OpenCV's own setting is that level with the "sub" filter and run lengths. Asked for the level by name, as in
    BasicSR's scripts, it tries every filter on every row: twice the time, for files a tenth smaller.
    """
    return cv2.imencode('.png', image)[1]
