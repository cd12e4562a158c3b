"""The memory layout of networks, and the blocks that they are made of."""

from __future__ import annotations

import torch
from torch import nn

from lora_sr.archs.reparam import Foldable

LEAST_SHARE = 0.5  # of a network's layers, in the blocks that stand for it
NEARLY_ALL = 0.8  # of the layers that are in larger blocks, for smaller ones to stand for it


def lay_out(network: nn.Module, memory_format: torch.memory_format) -> None:
    """As ``network.to(memory_format=...)`` does, which refuses parameters of five dimensions, as FFTformer's are."""
    for value in (*network.parameters(), *network.buffers()):
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=memory_format)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of which a network is a sequence: SwinIR's transformer blocks, say, or the dense blocks of RRDBNet.

    They are the instances of one class, at least two, with two layers or more each and half of all layers together. Of
    blocks in blocks the smaller ones are taken, unless they leave layers of the larger ones out. Modules that fold into
    one convolution are layers here.

    Returns:
        The blocks, in their order; none for a network that is not made of any.
    """
    layers, inner = set(), set()
    for module in network.modules():
        if module in inner:
            continue
        if isinstance(module, Foldable) or any(value.ndim > 1 for value in module.parameters(recurse=False)):
            layers.add(module)
            inner.update(set(module.modules()) - {module})
    held = {
        module: sum(part in layers for part in module.modules())
        for module in network.modules()
        if module is not network
        and module not in layers | inner
        and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }
    found: list[tuple[list[nn.Module], int]] = []
    for kind in dict.fromkeys(type(module) for module, count in held.items() if count > 1):
        blocks: list[nn.Module] = []
        covered: set[nn.Module] = set()
        for module in held:
            if type(module) is kind and held[module] > 1 and module not in covered:
                blocks.append(module)
                covered.update(module.modules())
        if len(blocks) > 1:
            found.append((blocks, len(covered & layers)))
    most = max((count for _, count in found), default=0)
    if not most or most < LEAST_SHARE * len(layers):
        return []
    return max((blocks for blocks, count in found if count >= NEARLY_ALL * most), key=len)
