"""Between 8-bit images and what networks take and give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def swap_channels(image: NDArray[Any]) -> NDArray[Any]:
    """BGR to RGB, and back: (H, W, 3), of any type."""
    return np.ascontiguousarray(image[:, :, ::-1])


def image_to_tensor(image: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3), BGR -> (1, 3, H, W), RGB in [0, 1]."""
    rgb = np.ascontiguousarray((image / np.float32(255))[:, :, ::-1].transpose(2, 0, 1))
    return torch.from_numpy(rgb)[None]


def tensor_to_image(tensor: Tensor) -> NDArray[np.uint8]:
    """(1, 3, H, W), RGB, clipped to [0, 1] -> (H, W, 3), BGR, rounded half to even."""
    rgb = tensor.detach()[0].float().cpu().clamp(0, 1).numpy().transpose(1, 2, 0)
    image: NDArray[np.uint8] = np.ascontiguousarray((rgb[:, :, ::-1] * 255.0).round().astype(np.uint8))
    return image
