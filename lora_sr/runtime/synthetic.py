"""Images on which forms of a network are compared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

OCTAVES = 5


def synthetic_image(batch: int, channels: int, height: int, width: int) -> Tensor:
    """An image of soft structures of all sizes, as of a photograph, always the same for a size.

    White noise would not do: SPAN answers it with values up to 100, in which float32 itself is off by 1e-3.

    Returns:
        (batch, channels, height, width), float32, in [0, 1].
    """
    generator = torch.Generator().manual_seed(height)
    image = torch.full((batch, channels, height, width), 0.5)
    for octave in range(1, OCTAVES + 1):
        noise = torch.rand(batch, channels, 2**octave, 2**octave, generator=generator) - 0.5
        image += F.interpolate(noise, size=(height, width), mode='bicubic', align_corners=False) / 1.5**octave
    return image.clamp(0, 1)
