"""SPANV2: SPAN with a learned gate and a separable tail, winner of the NTIRE 2026 efficient SR challenge (team 22).

Source: the challenge's report (arXiv:2604.03198), and the team's network and file of weights in the organizers'
repository, github.com/Amazingren/NTIRE2026_ESR. The team runs the gate as a CUDA kernel of its own; here it is plain
torch, as in the code by which the team counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.arguments import check_arguments, scale_of
from lora_sr.archs.info import NetworkInfo
from lora_sr.archs.spanf import make_conv_near


class SPABV2(nn.Module):
    """Three convolutions whose result o is gated by a 1x1 convolution W of it: (o + x) * (W o + b).

    Where it widens, x does not fit o: the output is o after ReLU, and there is no gate.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.c1 = _convolution(in_channels, channels)
        self.c2 = _convolution(channels, channels)
        self.c3 = _convolution(channels, channels)
        self.guidance_map_conv = nn.Conv2d(channels, channels, 1) if in_channels == channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H, W)."""
        o: Tensor = self.c3(F.relu(self.c2(F.relu(self.c1(x)))))
        if self.guidance_map_conv is None:
            return F.relu(o)
        gate: Tensor = self.guidance_map_conv(o)
        return (o + x) * gate


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution without bias, under the name that files give it inside of a block."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)))


class SPANV2(nn.Module):
    """SPANV2 for RGB images. The defaults are the winning entry, whose file has one convolution for each layer.

    Args:
        num_in_ch: Channels of the input; 3.
        num_out_ch: Channels of the output; 3.
        feature_channels: Width C of the blocks.
        upscale: Scale factor.

    Raises:
        InputError: Other than 3 channels, a width or a scale below 1.
    """

    num_blocks = 5

    block_1: SPABV2  # and so on, to block_5

    def __init__(self, num_in_ch: int = 3, num_out_ch: int = 3, feature_channels: int = 32, upscale: int = 4):
        super().__init__()
        check_arguments('SPANV2', num_in_ch, num_out_ch, feature_channels=feature_channels, upscale=upscale)
        self.upscale = upscale
        for i in range(self.num_blocks):
            setattr(self, f'block_{i + 1}', SPABV2(feature_channels if i else num_in_ch, feature_channels))
        self.conv_near = make_conv_near(num_in_ch, upscale)
        channels = self.conv_near.out_channels + feature_channels
        self.depthwise_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise_conv = nn.Conv2d(channels, num_out_ch * upscale**2, 1, bias=False)
        self.depth_to_space = nn.PixelShuffle(upscale)

    def declared_info(self) -> NetworkInfo:
        """Which images it takes and gives: RGB of any size."""
        return NetworkInfo(3, 3, self.upscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), RGB in [0, 1] -> (N, 3, upscale * H, upscale * W)."""
        features = x
        for i in range(self.num_blocks):
            features = getattr(self, f'block_{i + 1}')(features)
        joined = torch.cat([self.conv_near(x), features], 1)
        image: Tensor = self.depth_to_space(self.pointwise_conv(self.depthwise_conv(joined)))
        return image


def is_spanv2(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of SPANV2, with or without LoRA."""
    blocks = {f'block_{i + 1}' for i in range(SPANV2.num_blocks)}
    parts = {key.partition('.')[0] for key in state}
    return parts == blocks | {'conv_near', 'depthwise_conv', 'pointwise_conv'} and 'block_1.c1.conv.weight' in state


def spanv2_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the SPANV2 that a state dict belongs to: width and scale are read from shapes.

    Raises:
        InputError: The network makes other images than RGB.
    """
    return dict(
        feature_channels=state['block_1.c1.conv.weight'].shape[0],
        upscale=scale_of('SPANV2', state['conv_near.weight'].shape[0]),
    )
