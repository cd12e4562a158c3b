"""The memory layout of networks, and the blocks that they are made of."""

from __future__ import annotations

import torch
from torch import nn

from lora_sr.archs.reparam import Foldable

LEAST_SHARE = 0.6  # of a network's layers, in the blocks that stand for it


def lay_out(network: nn.Module, memory_format: torch.memory_format) -> None:
    """As ``network.to(memory_format=...)`` does, which refuses parameters of five dimensions, as FFTformer's are."""
    for value in (*network.parameters(), *network.buffers()):
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=memory_format)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of which a network is a sequence: SwinIR's transformer blocks, say, or the dense blocks of RRDBNet.

    They are the instances of the class that occurs most often, of those whose instances hold most of the layers, at
    least two each. Modules that fold into one convolution are layers here. One block in another is not given twice.

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
    best: list[nn.Module] = []
    for kind in dict.fromkeys(type(module) for module, count in held.items() if count > 1):
        blocks: list[nn.Module] = []
        covered: set[nn.Module] = set()
        for module in held:
            if type(module) is kind and held[module] > 1 and module not in covered:
                blocks.append(module)
                covered.update(module.modules())
        if len(blocks) > max(1, len(best)) and len(covered & layers) >= LEAST_SHARE * len(layers):
            best = blocks
    return best
