"""Images in memory to pixels as OpenCV has them, whichever library reads them."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from lora_sr.images.modes import ALPHA_MODES, MODES_OF_8_BITS, swap_red_and_blue

PILLOW_MODES = {cv2.IMREAD_COLOR: 'RGB', cv2.IMREAD_GRAYSCALE: 'L'}
OPENCV_MODES = ('L', 'RGB', 'RGBA')
PROGRAMS = ('EPS',)  # which Pillow has another program run


def decode(content: bytes, flag: int = cv2.IMREAD_COLOR) -> np.ndarray | None:
    """Decode an image by OpenCV, or by Pillow, which also reads TGA, and with its plug-ins HEIC and JPEG XL.

    Args:
        content: A whole file.
        flag: ``cv2.IMREAD_COLOR``, ``IMREAD_GRAYSCALE`` or ``IMREAD_UNCHANGED``.

    Returns:
        (height, width, channels), BGR or BGR and alpha, or (height, width) of gray, as ``cv2.imdecode`` gives it;
        ``None`` where neither reads it.
    """
    try:
        image: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), flag) if len(content) else None
    except cv2.error:  # beyond its limit on pixels
        return None
    return _decode_by_pillow(content, flag) if image is None else image


def _decode_by_pillow(content: bytes, flag: int) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format in PROGRAMS or image.mode not in MODES_OF_8_BITS:
                return None
            own = image.mode if image.mode in OPENCV_MODES else 'RGBA' if image.mode in ALPHA_MODES else 'RGB'
            pixels = np.asarray(image.convert(PILLOW_MODES.get(flag, own)))
    except MemoryError:
        raise
    except Exception:  # decoders raise what they like: OSError, SyntaxError, ValueError, struct.error, ...
        return None
    return pixels if pixels.ndim == 2 else np.ascontiguousarray(swap_red_and_blue(pixels))
