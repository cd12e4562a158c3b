"""SPAN and LKDN as programs of the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, cast

import torch
from torch import Tensor, nn

from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDB, LKDN, BSConvU, LargeKernelAttention
from lora_sr.archs.span import SPAB, SPAN, Conv3XC
from lora_sr.runtime.native.library import load_library
from lora_sr.runtime.native.program import Map, Program

# What the kernels compute. A module of another class, such as one derived from these, may compute something else.
KNOWN: frozenset[type[nn.Module]] = frozenset(
    (SPAN, DSCLoRA, SPAB, Conv3XC, LKDN, LKDB, LargeKernelAttention, BSConvU)
    + (nn.Sequential, nn.Conv2d, nn.LayerNorm, nn.PixelShuffle)
)


def compile_network(network: nn.Module, dtype: torch.dtype) -> Program | None:
    """The program that computes what ``network`` does, or ``None`` where the kernels cannot: then torch has to.

    Args:
        network: In deploy form: SPAN (DSCLoRA once it is merged is one) or LKDN, but not with ``BSConvU_idt``, with
            hooks or modules of other classes, nor of unusual size: with more than 16 blocks, or more than 1024 channels
            in all that are fused.
        dtype: ``torch.float32``, or ``torch.bfloat16``; on a CPU that does not have that, the program is of float32.
    """
    lower = next((verb for base, verb in LOWER.items() if isinstance(network, base)), None)
    if lower is None or dtype not in (torch.float32, torch.bfloat16) or not all(map(_is_known, network.modules())):
        return None
    library = load_library()
    if library is None:
        return None
    program = Program(library, dtype if library.has_bfloat16() else torch.float32)
    lower(program, network)
    return program if program.fits else None


def _is_known(module: nn.Module) -> bool:
    is_plain = 'forward' not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
    return type(module) in KNOWN and is_plain


def _lower_span(program: Program, network: SPAN) -> None:
    def conv(
        source: Map,
        layer: nn.Module,
        activation: str | None = None,
        combination: str | None = None,
        other: Map | None = None,
    ) -> Map:
        plain = cast(nn.Conv2d, layer.eval_conv)
        return program.conv([source], plain.weight, plain.bias, activation, combination, other)

    factor = network.conv_cat.weight.new_ones(network.num_in_ch)
    summand = torch.zeros_like(factor)
    if network.norm:
        factor = factor * network.img_range
        summand = -network.mean.flatten() * factor
    shallow = features = conv(program.load_image(factor, summand), network.conv_1)
    after_first_block = first_of_block = shallow  # until there is a block
    for i in range(network.num_blocks):
        block = getattr(network, f'block_{i + 1}')
        first_of_block = conv(features, block.c1_r, 'silu')
        features = conv(conv(first_of_block, block.c2_r, 'silu'), block.c3_r, None, 'gate', features)
        if i == 0:
            after_first_block = features
    parts = [shallow, conv(features, network.conv_2), after_first_block, first_of_block]
    fused = program.conv(parts, network.conv_cat.weight, network.conv_cat.bias)
    program.conv_to_image([fused], *_weight_and_bias(network.upsampler[0]), network.upscale)


def _lower_lkdn(program: Program, network: LKDN) -> None:
    def pointwise(
        sources: Sequence[Map], layer: nn.Conv2d, activation: str | None = None, dtype: torch.dtype | None = None
    ) -> Map:
        return program.conv(sources, layer.weight, layer.bias, activation, dtype=dtype)

    def separable(
        source: Map,
        layer: nn.Module,
        activation: str | None = None,
        combination: str | None = None,
        other: Map | None = None,
        dtype: torch.dtype | None = None,
    ) -> Map:
        between = pointwise([source], cast(nn.Conv2d, layer.pw), dtype=dtype)
        depthwise = _weight_and_bias(layer.dw)
        return program.depthwise(between, *depthwise, 1, activation, combination, other, dtype=dtype)

    def block(source: Map, layers: LKDB) -> Map:
        halves: list[Map] = []
        refined = source
        for distill, refine in ((layers.c1_d, layers.c1_r), (layers.c2_d, layers.c2_r), (layers.c3_d, layers.c3_r)):
            halves.append(pointwise([refined], distill, 'gelu'))
            refined = separable(refined, refine, 'gelu')
        halves.append(separable(refined, layers.c4, 'gelu'))
        fused = pointwise(halves, layers.c5)
        near, far = layers.atten.depthwise, layers.atten.depthwise_dilated
        attention = program.depthwise(pointwise([fused], layers.atten.pointwise), *_weight_and_bias(near))
        attended = program.depthwise(attention, *_weight_and_bias(far), 3, None, 'multiply', fused)
        norm = layers.pixel_norm
        return program.channel_norm(pointwise([attended], layers.c6), norm.weight, norm.bias, norm.eps, source)

    first = network.fea_conv
    # The image is there num_in times: its weights add up. What is done to the image itself, and what makes the image at
    # the end, stays in float32: bfloat16 has 8 bits, as the image does.
    weight = first.pw.weight.unflatten(1, (network.num_in, -1)).sum(1)
    image = program.load_image(weight.new_ones(weight.shape[1]), weight.new_zeros(weight.shape[1]))
    spread = program.conv([image], weight, None, dtype=torch.float32)
    shallow = program.depthwise(spread, *_weight_and_bias(first.dw))
    features = [shallow]
    for i in range(network.num_block):
        program.begin_group()
        features.append(block(features[-1], getattr(network, f'B{i + 1}')))
    program.begin_group()
    fused = pointwise(features[1:], network.c1, 'gelu')
    last = cast(nn.Sequential, network.upsampler)[0]
    summed = separable(fused, network.c2, None, 'add', shallow, dtype=torch.float32)
    program.conv_to_image([summed], *_weight_and_bias(last), network.upscale)


def _weight_and_bias(layer: object) -> tuple[Tensor, Tensor]:
    """Those of a convolution that has a bias in all known networks."""
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    return layer.weight, layer.bias


LOWER: dict[type[nn.Module], Callable[[Program, Any], None]] = {SPAN: _lower_span, LKDN: _lower_lkdn}
