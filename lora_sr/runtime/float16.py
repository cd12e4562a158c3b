"""LKDN within the range of float16."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_sr.archs.lkdn import LKDB
from lora_sr.archs.reparam import bias_of

# What the calibration images reach at most. A product of two such values is still 256 times below float16's largest.
LARGEST = 16.0


@torch.no_grad()
def fit_float16(network: nn.Module, images: list[Tensor]) -> nn.Module:
    """Scale the inner values of LKDN's blocks by powers of two such that float16 can hold them, in place.

    A block multiplies its features with a map made of them, and LayerNorm takes the size of the product away again. So
    the official LKDN has values up to 6e10 there, where float16 ends at 65504. Each convolution between is scaled down,
    its bias as well, and LayerNorm's epsilon by the square of what has come together. Powers of two do not round: in
    float32 the network gives the same images as before, to the bit. Other networks are left as they are.

    Args:
        network: In deploy form, float32, in eval mode.
        images: Some images (N, C, H, W) in the network's range of values; their inner values choose the scales.

    Returns:
        ``network`` itself.
    """
    blocks = [module for module in network.modules() if isinstance(module, LKDB)]
    largest = _largest_values(network, [layer for block in blocks for layer in _chain(block)], images)
    for block in blocks:
        scales = {layer: _power_of_two(largest[layer]) for layer in _chain(block)}
        c5, pointwise, depthwise, dilated, c6 = _chain(block)
        _rescale(c5, 1.0, scales[c5])
        _rescale(pointwise, scales[c5], scales[pointwise])
        _rescale(depthwise, scales[pointwise], scales[depthwise])
        _rescale(dilated, scales[depthwise], scales[dilated])
        _rescale(c6, scales[c5] * scales[dilated], scales[c6])
        block.pixel_norm.eps *= scales[c6] ** 2
    return network


def _chain(block: LKDB) -> list[nn.Conv2d]:
    """The convolutions from the features that are attended to, to what LayerNorm takes."""
    attention = block.atten
    return [block.c5, attention.pointwise, attention.depthwise, attention.depthwise_dilated, block.c6]


def _power_of_two(largest: float) -> float:
    """The largest factor, at most 1, that brings ``largest`` to :data:`LARGEST` or below."""
    return min(1.0, 2.0 ** math.floor(math.log2(LARGEST / largest))) if 0 < largest < math.inf else 1.0


def _rescale(layer: nn.Conv2d, scale_in: float, scale_out: float) -> None:
    """Let a layer take its input times ``scale_in`` and give its output times ``scale_out``."""
    layer.weight.mul_(scale_out / scale_in)
    bias_of(layer).mul_(scale_out)


def _largest_values(network: nn.Module, layers: list[nn.Conv2d], images: list[Tensor]) -> dict[nn.Conv2d, float]:
    """The largest absolute value that each layer gives for the images."""
    largest = dict.fromkeys(layers, 0.0)

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        largest[layer] = max(largest[layer], output.abs().max().item())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    for image in images if layers else ():
        network(image)
    for hook in hooks:
        hook.remove()
    return largest
