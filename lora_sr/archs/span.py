"""SPAN: Swift Parameter-free Attention Network (arXiv:2311.12770), in training and in deploy form."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.adapters import is_lora_key
from lora_sr.archs.info import NetworkInfo
from lora_sr.archs.reparam import Foldable, bias_of, laid_out_as, sum_type
from lora_sr.errors import InputError

NO_NORM = 'no_norm'  # the empty tensor by which neosr, traiNNer-redux and spandrel mark a SPAN without normalization
WIDE = re.compile(r'(conv_[12]|block_\d+\.c[123]_r)\.(sk|eval_conv)\.weight')  # as wide as the features
KINDS = ('weight', 'bias')
BRANCH_TENSORS = [f'{name}.{kind}' for name in ('sk', 'conv.0', 'conv.1', 'conv.2') for kind in KINDS]


class Conv3XC(Foldable):
    """A 3x3 convolution, trained as 1x1 -> 3x3 -> 1x1 with wider inner channels plus a 1x1 skip.

    The input is padded before the first 1x1, so at the border the 3x3 sees that layer's bias rather than zeros, and
    the four convolutions fold into one exactly. In deploy form there is only that one, ``eval_conv``.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        gain: Factor of the inner channels.
        deploy: Build the deploy form.
    """

    def __init__(self, in_channels: int, out_channels: int, gain: int = 2, deploy: bool = False):
        super().__init__()
        self.in_channels = in_channels
        if deploy:
            self.eval_conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        else:
            self.sk = nn.Conv2d(in_channels, out_channels, 1)
            self.conv = nn.Sequential(
                nn.Conv2d(in_channels, in_channels * gain, 1),
                nn.Conv2d(in_channels * gain, out_channels * gain, 3),
                nn.Conv2d(out_channels * gain, out_channels, 1),
            )

    @property
    def is_training_form(self) -> bool:
        """Whether the branches are still apart."""
        return hasattr(self, 'sk')

    def branches(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        output: Tensor
        if self.is_training_form:
            output = self.conv(F.pad(x, (1, 1, 1, 1))) + self.sk(x)
        else:
            output = self.eval_conv(x)
        return output

    def kernels(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weight (out_channels, in_channels, 3, 3) and bias (out_channels,)."""
        layers = {'sk': self.sk, **{f'conv.{index}': layer for index, layer in enumerate(self.conv)}}
        tensors = {f'{name}.{kind}': getattr(layer, kind) for name, layer in layers.items() for kind in KINDS}
        return _fold_branches(tensors, dtype)

    def convolve(self, x: Tensor, *kernels: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        weight, bias = kernels
        return F.conv2d(x, weight, bias, padding=1)

    def folded(self) -> Conv3XC:
        """The deploy form; summed in float64, rounded once."""
        weight, bias = self.kernels(torch.float64)
        plain = Conv3XC(weight.shape[1], weight.shape[0], deploy=True).to(weight)
        plain.eval_conv.weight.copy_(weight)
        bias_of(plain.eval_conv).copy_(bias)
        return plain

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        branches = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if key.startswith((f'{prefix}sk.', f'{prefix}conv.'))
        }
        if branches:
            # The authors' training checkpoints also hold an eval_conv, folded at some earlier step: the branches count.
            for name in ('weight', 'bias'):
                state_dict.pop(f'{prefix}eval_conv.{name}', None)
            if not self.is_training_form and any(map(is_lora_key, branches)):
                error_msgs.append(
                    f'{prefix}conv and {prefix}sk carry LoRA, which has to be merged before the branches are folded.'
                )
            elif not self.is_training_form and len(branches) == len(BRANCH_TENSORS):
                weight, bias = _fold_branches(branches, torch.float64)
                for name in branches:
                    del state_dict[prefix + name]
                state_dict[f'{prefix}eval_conv.weight'] = weight
                state_dict[f'{prefix}eval_conv.bias'] = bias
        elif self.is_training_form and f'{prefix}eval_conv.weight' in state_dict:
            error_msgs.append(
                f'{prefix}eval_conv is in deploy form and cannot be unfolded: build the network with '
                'deploy=True, or load a training-form checkpoint.'
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _fold_branches(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Weight (out, in, 3, 3) and bias (out,) of the one convolution that equals the branches of a Conv3XC."""
    weights = [state[f'{name}.weight'] for name in ('conv.0', 'conv.1', 'conv.2', 'sk')]
    like, dtype = weights[1], sum_type(weights[1], dtype)
    first, middle, last, skip = (weight.to(dtype) for weight in weights)
    b_first, b_middle, b_last, b_skip = (
        state[f'{name}.bias'].to(dtype) for name in ('conv.0', 'conv.1', 'conv.2', 'sk')
    )
    first, last = first.flatten(1), last.flatten(1)
    weight = torch.einsum('op,pmhw,mi->oihw', last, middle, first) + F.pad(skip, (1, 1, 1, 1))
    bias = last @ (middle.sum((2, 3)) @ b_first + b_middle) + b_last + b_skip
    return laid_out_as(weight, like), bias.to(like.dtype)


class SPAB(nn.Module):
    """Swift parameter-free attention block: three convolutions whose result o gates itself.

    The output is (o + x) * (sigmoid(o) - 0.5): an odd-symmetric gate without parameters.
    """

    def __init__(self, channels: int, deploy: bool = False):
        super().__init__()
        self.c1_r = Conv3XC(channels, channels, deploy=deploy)
        self.c2_r = Conv3XC(channels, channels, deploy=deploy)
        self.c3_r = Conv3XC(channels, channels, deploy=deploy)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> the block's output and its first convolution after SiLU, both (N, C, H, W)."""
        first = F.silu(self.c1_r(x))
        o = self.c3_r(F.silu(self.c2_r(first)))
        return (o + x) * (torch.sigmoid(o) - 0.5), first


class SPAN(nn.Module):
    """SPAN for RGB or gray images.

    Args:
        num_in_ch: Channels of the input, 3 or 1.
        num_out_ch: Channels of the output, 3 or 1.
        feature_channels: Width C: 48 in the paper, 26 and 28 in the NTIRE challenges.
        upscale: Scale factor.
        deploy: Build the deploy form, one 3x3 convolution for each Conv3XC.
        norm: Whether images are normalized first, as in the paper: the mean is subtracted, and the range is that of
            8-bit images. Of RGB the mean is DIV2K's. Of gray it is 0, as SwinIR and its kin have it: the authors' code,
            neosr, traiNNer-redux and spandrel fail there. Without it, the default of neosr and traiNNer-redux, a
            checkpoint has their empty tensor ``no_norm``, which tells.

    Raises:
        InputError: Other than 1 or 3 channels, a width or a scale below 1.
    """

    # The mean color of DIV2K (R, G, B in [0, 1]), and the range of 8-bit images, in which the features live.
    rgb_mean = (0.4488, 0.4371, 0.4040)
    img_range = 255.0
    num_blocks = 6

    mean: Tensor
    block_1: SPAB  # and so on, to block_6

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        feature_channels: int = 48,
        upscale: int = 4,
        deploy: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        for key, value in (('num_in_ch', num_in_ch), ('num_out_ch', num_out_ch)):
            if value not in (1, 3):
                raise InputError(f'"{key}" of SPAN must be 3 (RGB) or 1 (gray), got {value!r}.')
        for key, value in (('feature_channels', feature_channels), ('upscale', upscale)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f'"{key}" of SPAN is {value!r}: it must be an integer of at least 1.')
        self.num_in_ch, self.num_out_ch = num_in_ch, num_out_ch
        self.feature_channels, self.upscale, self.norm = feature_channels, upscale, norm
        if norm:
            mean = torch.tensor(self.rgb_mean if num_in_ch == 3 else (0.0,))
            self.register_buffer('mean', mean.view(1, num_in_ch, 1, 1), persistent=False)
        else:
            self.register_buffer(NO_NORM, torch.zeros(1))
        self.conv_1 = Conv3XC(num_in_ch, feature_channels, deploy=deploy)
        for i in range(self.num_blocks):
            setattr(self, f'block_{i + 1}', SPAB(feature_channels, deploy=deploy))
        self.conv_cat = nn.Conv2d(feature_channels * 4, feature_channels, 1)
        self.conv_2 = Conv3XC(feature_channels, feature_channels, deploy=deploy)
        self.upsampler = nn.Sequential(
            nn.Conv2d(feature_channels, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def declared_info(self) -> NetworkInfo:
        """Which images it takes and gives: RGB or gray, of any size."""
        return NetworkInfo(self.num_in_ch, self.num_out_ch, self.upscale)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in_ch, H, W), values in [0, 1] -> (N, num_out_ch, upscale * H, upscale * W)."""
        shallow = self.conv_1((x - self.mean) * self.img_range if self.norm else x)
        features, _ = self.block_1(shallow)
        after_first_block = features
        for i in range(2, self.num_blocks + 1):
            features, first_of_block = getattr(self, f'block_{i}')(features)
        fused = self.conv_cat(torch.cat([shallow, self.conv_2(features), after_first_block, first_of_block], 1))
        image: Tensor = self.upsampler(fused)
        return image


def is_span(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of SPAN, in training or in deploy form, with or without LoRA."""
    has_first = 'conv_1.eval_conv.weight' in state or 'conv_1.sk.weight' in state
    return has_first and {'conv_cat.weight', 'upsampler.0.weight'} <= state.keys()


def span_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the SPAN that a state dict belongs to: sizes and form are read from names and shapes.

    Raises:
        InputError: It takes or gives other than RGB or gray images.
    """
    return {**span_sizes(state), 'deploy': 'conv_1.sk.weight' not in state}


def span_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a SPAN with these names and shapes, in whichever form."""
    first = state.get('conv_1.sk.weight', state.get('conv_1.eval_conv.weight'))
    assert first is not None  # `is_span` has looked
    outputs = state['upsampler.0.weight'].shape[0]
    # As many for each channel of the image as the square of the scale: never both 3 times and once a square.
    is_gray = math.isqrt(outputs) ** 2 == outputs
    num_out_ch = 1 if is_gray else 3
    # That of most layers, so that an odd one is told as such.
    widths = Counter(value.shape[0] for name, value in state.items() if value.ndim and WIDE.fullmatch(name))
    return {
        'num_in_ch': first.shape[1],
        'num_out_ch': num_out_ch,
        'feature_channels': widths.most_common(1)[0][0],
        'upscale': math.isqrt(outputs // num_out_ch),
        'norm': NO_NORM not in state,
    }
