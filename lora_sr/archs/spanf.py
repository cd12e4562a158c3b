"""SPANF: a SPAN without stem, of five blocks, that adds to the nearest pixel (NTIRE 2025 efficient SR, team 24).

Its variants of 2026 differ in the tail: PDS (team 1) and PKDSR (team 16).

Source: the teams' networks and files of weights in the organizers' repositories, github.com/Amazingren/NTIRE2025_ESR
and NTIRE2026_ESR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.arguments import check_arguments, scale_of
from lora_sr.archs.info import NetworkInfo
from lora_sr.archs.span import SPAB, Conv3XC
from lora_sr.errors import InputError, shown

# Layout -> what the files call the 1x1 convolution that fuses, and the 3x3 that makes the image.
LAYOUTS = {'SPANF': ('conv_cat', 'conv_2'), 'PDS': ('conv_cat_1', 'conv_2_1')}


class WideningSPAB(nn.Module):
    """The SPAB that makes features of the image: without the gate, which needs as many channels in as out."""

    def __init__(self, in_channels: int, channels: int, deploy: bool = False):
        super().__init__()
        self.c1_r = Conv3XC(in_channels, channels, deploy=deploy)
        self.c2_r = Conv3XC(channels, channels, deploy=deploy)
        self.c3_r = Conv3XC(channels, channels, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H, W)."""
        features: Tensor = self.c3_r(F.silu(self.c2_r(F.silu(self.c1_r(x)))))
        return features


@torch.no_grad()
def make_conv_near(channels: int, upscale: int) -> nn.Conv2d:
    """A 3x3 convolution in each channel that repeats its pixels: before a pixel shuffle, nearest-neighbor upsampling.

    (N, channels, H, W) -> (N, channels * upscale * upscale, H, W).
    """
    layer = nn.Conv2d(channels, channels * upscale**2, 3, padding=1, groups=channels, bias=False)
    layer.weight.zero_()[:, :, 1, 1] = 1
    return layer


class SPANF(nn.Module):
    """SPANF for RGB images. The defaults are the entry of 2025.

    PKDSR is ``tail_channels=24``, PDS is ``tail_channels=20, layout='PDS'``. The files of all three are in deploy form.
    What trains is the :class:`~lora_sr.archs.span.Conv3XC` of SPAN, whose name and gain the authors' code still has.

    Args:
        num_in_ch: Channels of the input; 3.
        num_out_ch: Channels of the output; 3.
        feature_channels: Width C of the blocks, other than 3: at that width the authors' first block is another one.
        upscale: Scale factor.
        tail_channels: Width of what is fused, before the last convolution; ``None`` stands for C.
        layout: What the two layers of the tail are called: as in ``SPANF`` and PKDSR, or as in ``PDS``.
        deploy: Build the deploy form, one 3x3 convolution for each Conv3XC.

    Raises:
        InputError: Other than 3 channels, a width or a scale below 1, 3 features, or a layout that does not exist.
    """

    num_blocks = 5

    block_1: WideningSPAB
    block_2: SPAB  # and so on, to block_5

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        feature_channels: int = 32,
        upscale: int = 4,
        tail_channels: int | None = None,
        layout: str = 'SPANF',
        deploy: bool = False,
    ):
        super().__init__()
        tail_channels = feature_channels if tail_channels is None else tail_channels
        sizes = {'feature_channels': feature_channels, 'upscale': upscale, 'tail_channels': tail_channels}
        check_arguments('SPANF', num_in_ch, num_out_ch, **sizes)
        if feature_channels == num_in_ch:
            raise InputError(f'"feature_channels" of SPANF must be other than {num_in_ch}, got {feature_channels}.')
        if layout not in list(LAYOUTS):  # also where it cannot be a key
            raise InputError(f'"layout" of SPANF must be one of {", ".join(LAYOUTS)}, got {shown(repr(layout))}.')
        self.upscale, self.layout = upscale, layout
        self.block_1 = WideningSPAB(num_in_ch, feature_channels, deploy=deploy)
        for i in range(2, self.num_blocks + 1):
            setattr(self, f'block_{i}', SPAB(feature_channels, deploy=deploy))
        self.conv_near = make_conv_near(num_in_ch, upscale)
        near_channels = self.conv_near.out_channels
        fuse, last = LAYOUTS[layout]
        setattr(self, fuse, nn.Conv2d(near_channels + feature_channels * 2, tail_channels, 1))
        setattr(self, last, Conv3XC(tail_channels, near_channels, deploy=deploy))
        self.depth_to_space = nn.PixelShuffle(upscale)

    def declared_info(self) -> NetworkInfo:
        """Which images it takes and gives: RGB of any size."""
        return NetworkInfo(3, 3, self.upscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), RGB in [0, 1] -> (N, 3, upscale * H, upscale * W)."""
        features = after_first_block = self.block_1(x)
        for i in range(2, self.num_blocks + 1):
            features, _ = getattr(self, f'block_{i}')(features)
        fuse, last = (getattr(self, name) for name in LAYOUTS[self.layout])
        fused = fuse(torch.cat([self.conv_near(x), features, after_first_block], 1))
        image: Tensor = self.depth_to_space(last(fused))
        return image


def is_spanf(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of SPANF, of any layout, in either form, with or without LoRA."""
    has_first = 'block_1.c1_r.eval_conv.weight' in state or 'block_1.c1_r.sk.weight' in state
    body = {'conv_near', *(f'block_{i + 1}' for i in range(SPANF.num_blocks))}
    parts = {key.partition('.')[0] for key in state}
    return has_first and any(parts == body | set(tail) for tail in LAYOUTS.values())


def spanf_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the SPANF that a state dict belongs to: widths, scale, layout and form are read from it.

    Raises:
        InputError: The network makes other images than RGB, or its sizes are those of no SPANF.
    """
    layout = 'PDS' if any(key.startswith('conv_cat_1.') for key in state) else 'SPANF'
    deploy = 'block_1.c1_r.sk.weight' not in state
    return dict(
        feature_channels=state[f'block_1.c1_r.{"eval_conv" if deploy else "sk"}.weight'].shape[0],
        upscale=scale_of('SPANF', state['conv_near.weight'].shape[0]),
        tail_channels=state[f'{LAYOUTS[layout][0]}.weight'].shape[0],
        layout=layout,
        deploy=deploy,
    )
