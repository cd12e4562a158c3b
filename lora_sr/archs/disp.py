"""DISP: plain residual blocks of 3x3 convolutions (NTIRE 2026 efficient SR, team 18).

The network is that of TSSR (NTIRE 2025, team 58), whose files load as well.

Source: the teams' networks and files of weights in the organizers' repositories, github.com/Amazingren/NTIRE2026_ESR
and NTIRE2025_ESR.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.arguments import check_arguments, scale_of
from lora_sr.archs.info import NetworkInfo
from lora_sr.errors import InputError

LARGEST_DEPTH = 200  # of what a state dict tells of


class REECB(nn.Module):
    """Four 3x3 convolutions, each before a SiLU, around which the input is added."""

    def __init__(self, channels: int):
        super().__init__()
        self._extern_conv_block = nn.ModuleList([_convolution(channels, channels)])
        self.c1_r = _convolution(channels, channels)
        self.c2_r = _convolution(channels, channels)
        self.c3_r = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        features = x
        for layer in (self.c1_r, self.c2_r, *self._extern_conv_block, self.c3_r):
            features = F.silu(layer(features))
        return features + x


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution, under the name that files give it inside of a layer."""
    return nn.Sequential(OrderedDict(eval_conv=nn.Conv2d(in_channels, out_channels, 3, padding=1)))


class DISP(nn.Module):
    """DISP for RGB images. The defaults are the entry, whose file has one convolution for each layer.

    Args:
        num_in_ch: Channels of the input; 3.
        num_out_ch: Channels of the output; 3.
        feature_channels: Width C of the blocks.
        upscale: Scale factor.
        num_block: Number of blocks.

    Raises:
        InputError: Other than 3 channels, or a number below 1.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        feature_channels: int = 32,
        upscale: int = 4,
        num_block: int = 4,
    ):
        super().__init__()
        sizes = {'feature_channels': feature_channels, 'upscale': upscale, 'num_block': num_block}
        check_arguments('DISP', num_in_ch, num_out_ch, **sizes)
        self.upscale = upscale
        self.conv_1 = _convolution(num_in_ch, feature_channels)
        self.blocks = nn.Sequential(*(REECB(feature_channels) for _ in range(num_block)))
        self.conv_2 = nn.Conv2d(feature_channels, feature_channels, 1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(feature_channels, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def declared_info(self) -> NetworkInfo:
        """Which images it takes and gives: RGB of any size."""
        return NetworkInfo(3, 3, self.upscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), RGB in [0, 1] -> (N, 3, upscale * H, upscale * W)."""
        shallow = self.conv_1(x)
        image: Tensor = self.upsampler(self.conv_2(self.blocks(shallow)) + shallow)
        return image


def is_disp(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of DISP, of any size, with or without LoRA."""
    parts = {key.partition('.')[0] for key in state}
    first = 'blocks.0._extern_conv_block.0.eval_conv.weight'
    return parts == {'conv_1', 'blocks', 'conv_2', 'upsampler'} and first in state


def disp_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the DISP that a state dict belongs to: width, depth and scale are read from names and shapes.

    Raises:
        InputError: The network makes other images than RGB, or has too many blocks.
    """
    blocks = {key.split('.')[1] for key in state if re.match(r'blocks\.\d+\.', key)}
    if len(blocks) > LARGEST_DEPTH:
        raise InputError(f'the blocks of DISP must be at most {LARGEST_DEPTH}, got {len(blocks):,}.')
    return dict(
        feature_channels=state['conv_2.weight'].shape[0],
        upscale=scale_of('DISP', state['upsampler.0.weight'].shape[0]),
        num_block=len(blocks),
    )
