"""How large a tile of an image may be for a network and the memory that is free."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

# Features that are alive at once, in multiples of the widest: inputs, outputs, what skips ahead, and workspaces.
FEATURES_AT_ONCE = 4
MEMORY_SHARE = 0.5  # of what is free
# Bytes by kind of device, and tiles in overlaps, beyond which larger tiles are hardly faster.
ENOUGH_MEMORY = {'cpu': 1 << 29, 'cuda': 1 << 33, 'mps': 1 << 31}
ENOUGH_OVERLAPS = 16
LARGEST_TENSOR_OF_MPS = 1 << 32  # bytes; the process is ended by a larger one
UNKNOWN_MEMORY = 4 << 30  # bytes taken to be free where the system does not tell
CGROUP = Path('/sys/fs/cgroup')  # what limits a container (Linux, version 2)


@torch.inference_mode()
def bytes_per_pixel(network: nn.Module, image: Tensor) -> int:
    """What running a network takes for each pixel of its input, estimated from the widest features of its modules.

    Args:
        network: Any network, in float32.
        image: What it is tried with, (N, C, H, W).

    Returns:
        Bytes, rather too many.
    """
    widest = 0

    def measure(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal widest
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor):
                widest = max(widest, tensor.numel() * tensor.element_size())

    hooks = [module.register_forward_hook(measure) for module in network.modules()]
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return -(-FEATURES_AT_ONCE * widest // (image.shape[-2] * image.shape[-1]))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on the CPU, within the limit of the container as well."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if device.type == 'mps':
        if not hasattr(torch.mps, 'recommended_max_memory'):  # before torch 2.5
            return UNKNOWN_MEMORY
        free_on_gpu = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(free_on_gpu, FEATURES_AT_ONCE * LARGEST_TENSOR_OF_MPS))
    free = []
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        free += [int(line.split()[1]) << 10 for line in lines if line.startswith('MemAvailable')]
        limit, used = (int((CGROUP / name).read_text()) for name in ('memory.max', 'memory.current'))
        # Files that were read count as used, and give way when memory is needed.
        lines = (CGROUP / 'memory.stat').read_text().splitlines()
        free.append(limit - used + sum(int(line.split()[1]) for line in lines if line.startswith('inactive_file ')))
    except (OSError, ValueError):  # another system, another version of it, or a container without limit
        pass
    return min(free, default=UNKNOWN_MEMORY)


def largest_tile(network_bytes_per_pixel: int, memory: float) -> int:
    """The side of the largest square tile, in LR pixels, that runs in so many bytes."""
    return int((memory / network_bytes_per_pixel) ** 0.5)
