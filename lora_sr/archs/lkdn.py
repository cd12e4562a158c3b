"""LKDN: Large Kernel Distillation Network for efficient single-image super-resolution (CVPR Workshops 2023)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.info import NetworkInfo
from lora_sr.archs.reparam import Foldable, bias_of, laid_out_as, sum_type
from lora_sr.errors import InputError, shown


class BSConvU(nn.Module):
    """Blueprint separable convolution: 1x1 across channels, then 3x3 in each channel (the paper's BSB).

    Source: BSConv (arXiv:2003.13549), its unconstrained variant.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dw = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        output: Tensor = self.dw(self.pw(x))
        return output


class BSConvU_idt(BSConvU):
    """BSConvU with an identity around it (the paper's BSRB). The identity runs, too: there is nothing to fold.

    Its weights have the names and shapes of BSConvU's, and the two compute different things. So a checkpoint of ours
    also says which it is, by the tensor ``identity``, and BSConvU refuses that. The other way round nothing is refused:
    a file of the authors' code has no ``identity`` and has to load here, and a BSConvU of ours looks the same.

    ``out_channels`` is there for the sake of BSConvU's signature, and has to equal ``channels``: the input is added.
    """

    identity: Tensor

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels)
        self.register_buffer('identity', torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W)."""
        return super().forward(x) + x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f'{prefix}identity', self.identity)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BSConvU_rep(Foldable, BSConvU):
    """Reparameterizable BSConvU (the RBSB): an identity beside the 1x1, an identity and a 1x1 beside the 3x3.

    ``out_channels`` is there for the sake of BSConvU's signature, and has to equal ``channels``: the input is added.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels)
        self.in_channels = channels
        self.rep1x1 = nn.Conv2d(out_channels, out_channels, 1, groups=out_channels)

    def branches(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W)."""
        x = self.pw(x) + x
        output: Tensor = self.dw(x) + x + self.rep1x1(x)
        return output

    def kernels(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the 1x1 (channels, channels, 1, 1) and the 3x3 (channels, 1, 3, 3), and its bias (channels,)."""
        pointwise, depthwise = self.pw.weight, self.dw.weight
        kind, dtype = pointwise.dtype, sum_type(pointwise, dtype)
        pointwise, depthwise = pointwise.to(dtype), depthwise.to(dtype)
        pointwise = pointwise + torch.eye(self.in_channels, dtype=dtype, device=pointwise.device)[:, :, None, None]
        depthwise = depthwise + F.pad(1 + self.rep1x1.weight.to(dtype), (1, 1, 1, 1))  # at the center of the 3x3 alone
        bias = bias_of(self.dw).to(dtype) + bias_of(self.rep1x1).to(dtype)
        return pointwise.to(kind), depthwise.to(kind), bias.to(kind)

    def convolve(self, x: Tensor, *kernels: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W)."""
        pointwise, depthwise, bias = kernels
        return F.conv2d(F.conv2d(x, pointwise), depthwise, bias, padding=1, groups=self.in_channels)

    def folded(self) -> BSConvU:
        """The BSConvU that computes the same."""
        plain = BSConvU(self.in_channels, self.in_channels).to(self.pw.weight)
        names = ('pw.weight', 'dw.weight', 'dw.bias')
        plain.load_state_dict(dict(zip(names, self.kernels(torch.float64))))
        return plain


class LargeKernelAttention(nn.Module):
    """x times a map made of it: 1x1, 5x5 in each channel, 5x5 of dilation 3 in each channel (together 17x17)."""

    def __init__(self, channels: int):
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.depthwise_dilated = nn.Conv2d(channels, channels, 5, padding=6, groups=channels, dilation=3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        attention: Tensor = self.depthwise_dilated(self.depthwise(self.pointwise(x)))
        return x * attention


class LKDB(nn.Module):
    """Large kernel distillation block.

    Three times a 1x1 sets half the channels aside (distills) and ``conv`` refines; the four halves are fused, attended
    to, normalized at each pixel over the channels, and added to the input.
    """

    def __init__(self, channels: int, atten_channels: int, conv: type[BSConvU]):
        super().__init__()
        half = channels // 2
        self.c1_d = nn.Conv2d(channels, half, 1)
        self.c1_r = conv(channels, channels)
        self.c2_d = nn.Conv2d(channels, half, 1)
        self.c2_r = conv(channels, channels)
        self.c3_d = nn.Conv2d(channels, half, 1)
        self.c3_r = conv(channels, channels)
        self.c4 = BSConvU(channels, half)
        self.c5 = nn.Conv2d(half * 4, atten_channels, 1)
        self.atten = LargeKernelAttention(atten_channels)
        self.c6 = nn.Conv2d(atten_channels, channels, 1)
        self.pixel_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        refined = x
        halves = []
        for distill, refine in ((self.c1_d, self.c1_r), (self.c2_d, self.c2_r), (self.c3_d, self.c3_r)):
            halves.append(distill(refined))
            refined = F.gelu(refine(refined))
        halves.append(self.c4(refined))
        # One activation of all halves, as the gradient of each would not be contiguous.
        fused = self.c6(self.atten(self.c5(F.gelu(torch.cat(halves, 1)))))
        # LayerNorm wants the channels last. In that memory format neither permutation copies anything.
        normalized: Tensor = self.pixel_norm(fused.permute(0, 2, 3, 1))
        return normalized.permute(0, 3, 1, 2) + x


class RepUpsampler(Foldable):
    """The upsampler's 3x3 convolution as three branches: 1x1, 3x3, and 1x1 -> 3x3 with twice the channels between.

    The input is padded before the last branch's 1x1, so at the border its 3x3 sees that layer's bias rather than
    zeros, and the branches fold into one convolution exactly.
    """

    def __init__(self, channels: int, out_channels: int, upscale: int):
        super().__init__()
        self.in_channels, self.upscale = channels, upscale
        out_channels *= upscale**2
        self.conv1 = nn.Conv2d(channels, out_channels, 1)
        self.conv3 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv1x1 = nn.Conv2d(channels, channels * 2, 1)
        self.conv3x3 = nn.Conv2d(channels * 2, out_channels, 3)

    def branches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, upscale * H, upscale * W)."""
        wide = self.conv3x3(self.conv1x1(F.pad(x, (1, 1, 1, 1))))
        return F.pixel_shuffle(self.conv1(x) + self.conv3(x) + wide, self.upscale)

    def kernels(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight (upscale**2 * out_channels, C, 3, 3) and bias (upscale**2 * out_channels,)."""
        like = self.conv3.weight
        dtype = sum_type(like, dtype)
        outer, inner = self.conv3x3.weight.to(dtype), self.conv1x1.weight.to(dtype).flatten(1)
        weight = like.to(dtype) + torch.einsum('omhw,mi->oihw', outer, inner)
        weight = weight + F.pad(self.conv1.weight.to(dtype), (1, 1, 1, 1))
        bias = sum(bias_of(layer).to(dtype) for layer in (self.conv1, self.conv3, self.conv3x3))
        bias = bias + outer.sum((2, 3)) @ bias_of(self.conv1x1).to(dtype)
        return laid_out_as(weight, like), bias.to(like.dtype)

    def convolve(self, x: Tensor, *kernels: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, upscale * H, upscale * W)."""
        weight, bias = kernels
        return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), self.upscale)

    def folded(self) -> nn.Sequential:
        """The plain upsampler that computes the same."""
        weight, bias = self.kernels(torch.float64)
        plain = make_upsampler(self.in_channels, len(bias) // self.upscale**2, self.upscale).to(self.conv3.weight)
        plain.load_state_dict({'0.weight': weight, '0.bias': bias})
        return plain


def make_upsampler(channels: int, out_channels: int, upscale: int) -> nn.Sequential:
    """A 3x3 convolution and a pixel shuffle: (N, C, H, W) -> (N, out_channels, upscale * H, upscale * W)."""
    return nn.Sequential(nn.Conv2d(channels, out_channels * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))


# The names are those of the authors' option files.
CONVS = {'BSConvU': BSConvU, 'BSConvU_idt': BSConvU_idt, 'BSConvU_rep': BSConvU_rep}
UPSAMPLERS = {'pixelshuffledirect': make_upsampler, 'pixelshuffle_rep': RepUpsampler}
LARGEST_DEPTH = 200  # of what a state dict tells of: torch looks through all of it for each block


class LKDN(nn.Module):
    """LKDN in all its forms; the defaults are the paper's LKDN, and :func:`LKDN_S` has those of its small preset.

    Args:
        num_in_ch: Channels of the input.
        num_out_ch: Channels of the output.
        num_feat: Width C of the blocks, even: half of it is distilled.
        num_atten: Channels of the attention.
        num_block: Number of blocks.
        upscale: Scale factor.
        num_in: How many times the input is repeated.
        conv: The convolution that refines in the blocks: ``BSConvU`` (BSB in the paper), ``BSConvU_idt`` (BSRB) or
            ``BSConvU_rep`` (RBSB), which :func:`lora_sr.archs.fold` turns into the first.
        upsampler: ``pixelshuffledirect``, or ``pixelshuffle_rep``, which is folded into the first likewise.

    Raises:
        InputError: A number below 1, an odd ``num_feat``, or a ``conv`` or an ``upsampler`` that does not exist.
    """

    B1: LKDB  # and so on, to B<num_block>

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 56,
        num_atten: int = 56,
        num_block: int = 8,
        upscale: int = 4,
        num_in: int = 4,
        conv: str = 'BSConvU',
        upsampler: str = 'pixelshuffledirect',
    ):
        super().__init__()
        numbers = {
            'num_in_ch': num_in_ch,
            'num_out_ch': num_out_ch,
            'num_feat': num_feat,
            'num_atten': num_atten,
            'num_block': num_block,
            'upscale': upscale,
            'num_in': num_in,
        }
        for key, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f'"{key}" of LKDN is {shown(repr(value))}: it must be an integer of at least 1.')
        if num_feat % 2:
            raise InputError(f'"num_feat" of LKDN is {num_feat}: it must be even, as half of it is distilled.')
        for key, name, known in (('conv', conv, list(CONVS)), ('upsampler', upsampler, list(UPSAMPLERS))):
            if name not in known:
                raise InputError(f'"{key}" of LKDN is {shown(repr(name))}: it must be one of {", ".join(known)}.')
        self.num_in, self.num_block, self.upscale = num_in, num_block, upscale
        self.num_feat, self.num_atten = num_feat, num_atten
        self.num_in_ch, self.num_out_ch = num_in_ch, num_out_ch
        self.fea_conv = BSConvU(num_in_ch * num_in, num_feat)
        for i in range(num_block):
            setattr(self, f'B{i + 1}', LKDB(num_feat, num_atten, CONVS[conv]))
        self.c1 = nn.Conv2d(num_feat * num_block, num_feat, 1)
        self.c2 = BSConvU(num_feat, num_feat)
        self.upsampler = UPSAMPLERS[upsampler](num_feat, num_out_ch, upscale)

    def declared_info(self) -> NetworkInfo:
        """Which images it takes and gives: of any size."""
        return NetworkInfo(self.num_in_ch, self.num_out_ch, self.upscale)

    @property
    def sizes(self) -> dict[str, int]:
        """What tells LKDN from LKDN-S: width of the blocks, channels of the attention, number of blocks."""
        return {'num_feat': self.num_feat, 'num_atten': self.num_atten, 'num_block': self.num_block}

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W), RGB in [0, 1] -> (N, num_out_ch, upscale * H, upscale * W)."""
        shallow = self.fea_conv(torch.cat([x] * self.num_in, 1))
        features = [shallow]
        for i in range(self.num_block):
            features.append(getattr(self, f'B{i + 1}')(features[-1]))
        fused = F.gelu(self.c1(torch.cat(features[1:], 1)))
        image: Tensor = self.upsampler(self.c2(fused) + shallow)
        return image


def LKDN_S(
    num_in_ch: int = 3,
    num_out_ch: int = 3,
    num_feat: int = 42,
    num_atten: int = 42,
    num_block: int = 5,
    upscale: int = 4,
    num_in: int = 4,
    conv: str = 'BSConvU',
    upsampler: str = 'pixelshuffledirect',
) -> LKDN:
    """LKDN-S: :class:`LKDN` with 5 blocks of 42 channels. The paper trains it with RBSB and the branched upsampler."""
    return LKDN(num_in_ch, num_out_ch, num_feat, num_atten, num_block, upscale, num_in, conv, upsampler)


def is_lkdn(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of LKDN, of any size and form, with or without LoRA."""
    has_last = 'upsampler.0.weight' in state or 'upsampler.conv3.weight' in state
    others = {'fea_conv.pw.weight', 'B1.c1_d.weight', 'B1.atten.pointwise.weight', 'c1.weight'}
    return has_last and others <= state.keys()


def lkdn_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the LKDN that a state dict belongs to, for RGB images: sizes and forms are read from it.

    ``BSConvU_idt`` is recognized in checkpoints of ours alone, by its tensor ``identity``.

    Raises:
        InputError: The network takes or makes other images than RGB, or its sizes are those of no LKDN.
    """
    branched = 'upsampler.conv3.weight' in state
    last = state['upsampler.conv3.weight' if branched else 'upsampler.0.weight']
    inputs, outputs = state['fea_conv.pw.weight'].shape[1], last.shape[0]
    upscale = math.isqrt(outputs // 3)
    if inputs % 3 or outputs != 3 * upscale**2:
        raise InputError(
            f'it is no LKDN for RGB images, with 3 channels in and out: fea_conv.pw takes {inputs}, which should be a '
            f'multiple of 3, and the upsampler convolves to {outputs}, which should be 3 times the square of a scale.'
        )
    blocks = {key.split('.')[0] for key in state if re.match(r'B\d+\.', key)}
    if len(blocks) > LARGEST_DEPTH:
        raise InputError(f'it is no LKDN: its blocks must be at most {LARGEST_DEPTH}, got {len(blocks):,}.')
    conv = 'BSConvU'
    if 'B1.c1_r.rep1x1.weight' in state:
        conv = 'BSConvU_rep'
    elif 'B1.c1_r.identity' in state:
        conv = 'BSConvU_idt'
    return dict(
        num_feat=state['c1.weight'].shape[0],
        num_atten=state['B1.atten.pointwise.weight'].shape[0],
        num_block=len(blocks),
        upscale=upscale,
        num_in=inputs // 3,
        conv=conv,
        upsampler='pixelshuffle_rep' if branched else 'pixelshuffledirect',
    )
