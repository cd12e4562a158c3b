"""Batches of whole numbers: cut as 8 or 16 bits where images are read, floating point where they are computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

# What a batch holds of images; other tensors of whole numbers are left as they are.
IMAGES = ('lq', 'gt', 'taught')
# What 0 and the peak of a teacher's output stand for: teachers overshoot at edges, and a student learns that, too.
TAUGHT_LOW, TAUGHT_HIGH = -0.5, 1.5
_UINT16 = getattr(torch, 'uint16', torch.int32)  # before 2.3 torch does not know it
_PEAKS = {torch.uint8: 255, _UINT16: 65535}


def to_planes(image: np.ndarray) -> Tensor:
    """Channels first, in one piece, of the same type.

    Args:
        image: uint8 or uint16 of shape (height, width, channels), also a transposed view.

    Returns:
        Of shape (channels, height, width); 16 bits as int32 where torch has no uint16.
    """
    height, width, channels = image.shape
    if image.strides[0] < image.strides[1]:  # OpenCV transposes several times as fast as NumPy copies
        image = cv2.transpose(np.ascontiguousarray(image.transpose(1, 0, 2))).reshape(image.shape)
    planes = np.empty((channels, height, width), image.dtype)
    if channels == 1:
        planes[0] = image[:, :, 0]
    else:
        cv2.split(np.ascontiguousarray(image), list(planes))
    if planes.dtype == np.uint16 and _UINT16 == torch.int32:
        planes = planes.astype(np.int32)
    return torch.from_numpy(planes)


def with_floats(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its images of whole numbers as float32 from 0 to 1 on a device, where they are made so.

    The values are those of ``img2tensor(image.astype(np.float32) / 255)``, bit for bit; of 16 bits, / 65535. Those of
    ``taught`` go from -0.5 to 1.5.
    """
    floats = {key: to_floats(value, device) if key in IMAGES else value for key, value in batch.items()}
    if 'taught' in floats and floats['taught'] is not batch['taught']:
        floats['taught'].mul_(TAUGHT_HIGH - TAUGHT_LOW).add_(TAUGHT_LOW)
    return floats


def to_floats(value: Any, device: torch.device) -> Any:
    """A tensor of 8 or 16 bits as float32 from 0 to 1 on a device; anything else as it is."""
    peak = _PEAKS.get(value.dtype) if isinstance(value, Tensor) else None
    if peak is None:
        return value
    floats = value.to(device, non_blocking=True).float()
    # CUDA multiplies by the reciprocal of a number, which rounds otherwise; by a tensor it divides.
    return floats.div_(torch.full((), peak, dtype=torch.float32, device=device))
