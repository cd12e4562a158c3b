"""Images of 16 bits with all of their bits, where OpenCV gives 8 unless it is asked, and not always right then."""

from __future__ import annotations

import cv2
import numpy as np

from lora_sr.images.decoding import decode
from lora_sr.images.png import PNG_SIGNATURE
from lora_sr.images.tags import (
    BITS_PER_SAMPLE,
    BLACK_IS_ZERO,
    CONTIGUOUS,
    PHOTOMETRIC,
    PLANAR_CONFIGURATION,
    RGB,
    SAMPLE_FORMAT,
    SAMPLES_PER_PIXEL,
    WHITE_IS_ZERO,
)
from lora_sr.images.tiff import open_directory

SAMPLES = {WHITE_IS_ZERO: (1,), BLACK_IS_ZERO: (1,), RGB: (3, 4)}


def decode_deep(content: bytes, flag: int = cv2.IMREAD_COLOR) -> np.ndarray | None:
    """Decode an image as ``decode`` does, but PNG and TIFF of 16 bits to uint16.

    What stays as ``decode`` has it: other formats; TIFF of floating point, with signs, with each channel apart, or
    transparent somewhere, since colors are multiplied by alpha there.

    Args:
        content: A whole file.
        flag: ``cv2.IMREAD_COLOR``, ``IMREAD_GRAYSCALE`` or ``IMREAD_UNCHANGED``.

    Returns:
        uint16 from 0 to 65535, or uint8, of the shapes that ``decode`` gives; ``None`` where nothing reads it.
    """
    image = None
    if _is_deep_png(content):
        image = decode(content, flag if flag == cv2.IMREAD_UNCHANGED else flag | cv2.IMREAD_ANYDEPTH)
    else:
        photometric = _photometric_of_deep_tiff(content)
        if photometric is not None:
            image = _decode_tiff(content, flag, photometric)
    return decode(content, flag) if image is None or image.dtype != np.uint16 else image


def is_deep(content: bytes) -> bool:
    """Whether a file is a PNG or TIFF of 16 bits of which ``decode_deep`` knows all of the form."""
    return _is_deep_png(content) or _photometric_of_deep_tiff(content) is not None


def _is_deep_png(content: bytes) -> bool:
    head = bytes(content[:25])
    return head.startswith(PNG_SIGNATURE) and head[24:] == b'\x10'  # behind length, name, width and height


def _photometric_of_deep_tiff(content: bytes) -> int | None:
    """PHOTOMETRIC of a TIFF of 16 bits, if OpenCV reads its form; ``None`` of all else."""
    try:
        directory = open_directory(content)
        if directory is None:
            return None
        photometric: int = directory[PHOTOMETRIC]
        samples = directory.get(SAMPLES_PER_PIXEL, 1)
        is_known = (
            samples in SAMPLES[photometric]
            and set(directory[BITS_PER_SAMPLE]) == {16}
            and set(directory.get(SAMPLE_FORMAT, (1,))) == {1}
            and (samples == 1 or directory.get(PLANAR_CONFIGURATION, CONTIGUOUS) == CONTIGUOUS)
        )
    except Exception:  # of a damaged directory
        return None
    return photometric if is_known else None


def _decode_tiff(content: bytes, flag: int, photometric: int) -> np.ndarray | None:
    image = decode(content, cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        return None
    if photometric == WHITE_IS_ZERO:  # which OpenCV turns in 8 bits alone
        image = 65535 - image
    if flag == cv2.IMREAD_UNCHANGED:
        return image
    if image.ndim == 3 and image.shape[2] == 4:
        if image[:, :, 3].min() < 65535:
            return None
        image = np.ascontiguousarray(image[:, :, :3])
    if image.ndim == 2:
        return image if flag == cv2.IMREAD_GRAYSCALE else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if flag == cv2.IMREAD_GRAYSCALE else image
