"""DSCF-Fused: DSCF, the SPAN that DSCLoRA gives, with more of its layers fused (NTIRE 2026 efficient SR, team 15).

Source: the team's network and file of weights in the organizers' repository, github.com/Amazingren/NTIRE2026_ESR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.arguments import check_arguments, scale_of
from lora_sr.archs.info import NetworkInfo
from lora_sr.archs.span import SPAB, SPAN, Conv3XC


class SPABFused(nn.Module):
    """A SPAB whose first convolution is elsewhere."""

    def __init__(self, channels: int):
        super().__init__()
        self.c2_r = Conv3XC(channels, channels, deploy=True)
        self.c3_r = Conv3XC(channels, channels, deploy=True)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """The block's input and what its first convolution gives, both (N, C, H, W) -> (N, C, H, W)."""
        o = self.c3_r(F.silu(self.c2_r(F.silu(first))))
        gated: Tensor = (o + x) * (torch.sigmoid(o) - 0.5)
        return gated


class DSCFFused(nn.Module):
    """DSCF-Fused for RGB images: SPAN in deploy form, in which two pairs of linear layers are one each.

    ``conv_fused`` stands for ``conv_1`` and the first convolution of ``block_1``, of which it differs at the border,
    where that pads features; ``conv2_fused`` stands for ``conv_2`` and its part of the 1x1 that fuses. There is no
    training form: DSCF is trained as DSCLoRA.

    Args:
        num_in_ch: Channels of the input; 3, as the mean of R, G and B is subtracted.
        num_out_ch: Channels of the output; 3.
        feature_channels: Width C.
        upscale: Scale factor.

    Raises:
        InputError: Other than 3 channels, a width or a scale below 1.
    """

    mean: Tensor
    block_2: SPAB  # and so on, to block_6

    def __init__(self, num_in_ch: int = 3, num_out_ch: int = 3, feature_channels: int = 26, upscale: int = 4):
        super().__init__()
        check_arguments('DSCFFused', num_in_ch, num_out_ch, feature_channels=feature_channels, upscale=upscale)
        self.upscale = upscale
        self.register_buffer('mean', torch.tensor(SPAN.rgb_mean).view(1, 3, 1, 1), persistent=False)
        self.conv_1 = Conv3XC(num_in_ch, feature_channels, deploy=True)
        self.conv_fused = nn.Conv2d(num_in_ch, feature_channels, 5, padding=2)
        self.block_1 = SPABFused(feature_channels)
        for i in range(2, SPAN.num_blocks + 1):
            setattr(self, f'block_{i}', SPAB(feature_channels, deploy=True))
        self.conv_cat_other = nn.Conv2d(feature_channels * 3, feature_channels, 1)
        self.conv2_fused = nn.Conv2d(feature_channels, feature_channels, 3, padding=1, bias=False)
        self.upsampler = nn.Sequential(
            nn.Conv2d(feature_channels, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def declared_info(self) -> NetworkInfo:
        """Which images it takes and gives: RGB of any size."""
        return NetworkInfo(3, 3, self.upscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), RGB in [0, 1] -> (N, 3, upscale * H, upscale * W)."""
        x = (x - self.mean) * SPAN.img_range
        shallow = self.conv_1(x)
        features = after_first_block = self.block_1(shallow, self.conv_fused(x))
        for i in range(2, SPAN.num_blocks + 1):
            features, first_of_block = getattr(self, f'block_{i}')(features)
        others = self.conv_cat_other(torch.cat([shallow, after_first_block, first_of_block], 1))
        image: Tensor = self.upsampler(others + self.conv2_fused(features))
        return image


def is_dscf_fused(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of DSCF-Fused, with or without LoRA."""
    blocks = {f'block_{i + 1}' for i in range(SPAN.num_blocks)}
    others = {'conv_1', 'conv_fused', 'conv_cat_other', 'conv2_fused', 'upsampler'}
    return {key.partition('.')[0] for key in state} == blocks | others


def dscf_fused_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the DSCF-Fused that a state dict belongs to: width and scale are read from shapes.

    Raises:
        InputError: The network makes other images than RGB.
    """
    return dict(
        feature_channels=state['conv_cat_other.weight'].shape[0],
        upscale=scale_of('DSCFFused', state['upsampler.0.weight'].shape[0]),
    )
