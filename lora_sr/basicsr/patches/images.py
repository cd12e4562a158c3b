"""The images that data sets read."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np

from lora_sr.basicsr.patches.tools import is_defective, patch, replace_everywhere
from lora_sr.errors import InputError
from lora_sr.images.decoding import decode
from lora_sr.images.depth import decode_deep

FLAGS = {'color': cv2.IMREAD_COLOR, 'grayscale': cv2.IMREAD_GRAYSCALE, 'unchanged': cv2.IMREAD_UNCHANGED}


def patch_imfrombytes() -> None:
    """``imfrombytes`` takes what OpenCV does not read for None, and 8 of the bits of an image that has 16.

    What Pillow reads, TGA for one, is read; of the rest a sentence tells. Values from 0 to 1 are those of all bits;
    who asks for whole numbers takes them to be of 8 bits.
    """
    from basicsr.utils import img_util

    original = img_util.imfrombytes
    if not is_defective(original, 'imdecode'):
        return

    @patch
    @functools.wraps(original)
    def imfrombytes(content: Any, flag: str = 'color', float32: bool = False) -> np.ndarray:
        image = None if content is None else (decode_deep if float32 else decode)(content, FLAGS[flag])
        if image is None:
            reason = 'damaged, or of a format that neither OpenCV nor Pillow reads' if content else 'missing, or empty'
            raise InputError(f'an image is {reason}')
        if not float32:
            return image
        return image.astype(np.float32) / (65535.0 if image.dtype == np.uint16 else 255.0)

    replace_everywhere(original, imfrombytes)
