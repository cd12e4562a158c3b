"""What a network costs: multiply-adds, as the field's tables count them."""

from __future__ import annotations

from copy import deepcopy

import torch
from basicsr.archs.ecbsr_arch import ECB
from torch import nn

OUTPUT_HEIGHT, OUTPUT_WIDTH = 720, 1280  # the output of which the tables give the multiply-adds


@torch.no_grad()
def count_multi_adds(network: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of one forward pass; nothing is computed for it.

    The convention is that of the tool ``thop``, with which the LKDN paper counts: every multiplication by a weight of
    ``Conv2d``, ``ConvTranspose2d`` and ``Linear`` is one, their biases are free, and ``LayerNorm`` is 2 for each of its
    values, 4 with its own weight and bias. Activations and products of features, as in attention, are not counted.
    A layer with LoRA counts as the merged one.

    Args:
        network: Any network whose layers are modules, in training or in deploy form. It is not changed.
        height: Height of the input (1, 3, height, width), in pixels.
        width: Its width.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.LayerNorm):
            total += output.numel() * (4 if layer.elementwise_affine else 2)
        elif isinstance(layer, ECB):  # runs as the one convolution that its branches add up to
            total += output.numel() * layer.conv3x3.weight[0].numel()
        else:
            # weight[0] is what one output value is summed from or, transposed, what one input value is spread over.
            values = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            total += values.numel() * layer.weight[0].numel()

    network = deepcopy(network).to('meta').eval()
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.LayerNorm, ECB)):
            layer.register_forward_hook(count)
    with torch.device('meta'):  # also for what a forward pass makes without naming a device
        network(torch.empty(1, 3, height, width))
    return total


def count_multi_adds_720p(network: nn.Module, scale: int) -> int:
    """Multiply-adds for an output of 1280x720 pixels, as in the field's tables; x3 starts from 426x240, rounded down.

    Args:
        network: See :func:`count_multi_adds`.
        scale: Its scale factor.
    """
    return count_multi_adds(network, OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale)
