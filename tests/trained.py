"""Networks with LoRA as if a training had moved them, and their state dicts compared."""

import torch
from torch import nn


@torch.no_grad()
def trained(network: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Fill every update of ``network``, in place, with normal random numbers of that standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        if 'lora_' in name:
            value.copy_(torch.randn(value.shape, generator=generator) * size)
    return network


def is_same(first, second) -> bool:
    """Whether two state dicts are equal, to the bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
