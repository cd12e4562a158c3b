"""Large images in tiles that overlap by as much as the network looks around, and how large a tile may be."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Two cuts meet at the corners of a tile, and images differ: well below the one 8-bit level that is promised.
TOLERANCE = 1 / 255 / 8
PROBE_LENGTHS, PROBE_WIDTH = (64, 128, 256), 32  # LR pixels
# Features that are alive at once, in multiples of the widest: inputs, outputs, what skips ahead, and workspaces.
FEATURES_AT_ONCE = 4
MEMORY_SHARE = 0.5  # of what is free
UNKNOWN_MEMORY = 4 << 30  # bytes taken to be free where the system does not tell
CGROUP = Path('/sys/fs/cgroup')  # what limits a container (Linux, version 2)


class Span(NamedTuple):
    """A tile along one axis: the network sees ``start`` to ``stop``; what it makes of ``first`` to ``last`` is kept."""

    start: int
    stop: int
    first: int
    last: int


def cut_axis(length: int, tile: int, overlap: int, multiple: int = 1) -> list[Span]:
    """Tiles along one axis, of equal size; at the borders of the image they have their own borders.

    Args:
        length: Pixels of the image.
        tile: Pixels that the network sees, at least :func:`smallest_tile`. It is rounded down to a multiple.
        overlap: Pixels on each inner side of a tile whose results are not kept; rounded up to a multiple.
        multiple: The tiles begin at multiples of this; where it is not 1 the last may be shorter by less than it.

    Returns:
        Tiles in order, the kept parts of which make up the axis without gaps.
    """
    tile, overlap = tile // multiple * multiple, -(-overlap // multiple) * multiple
    if length <= tile:
        return [Span(0, length, 0, length)]
    count = -(-(length - 2 * overlap) // (tile - 2 * overlap))
    # Evenly spread, and rounded up so that the last reaches the end.
    starts = [-(-index * (length - tile) // ((count - 1) * multiple)) * multiple for index in range(count)]
    stops = [min(start + tile, length) for start in starts]
    seams = [0, *((stop + start) // 2 for stop, start in zip(stops, starts[1:])), length]
    return [Span(*span) for span in zip(starts, stops, seams, seams[1:])]


def smallest_tile(overlap: int, multiple: int = 1) -> int:
    """The smallest tile that :func:`cut_axis` takes."""
    return 2 * -(-overlap // multiple) * multiple + multiple


@torch.inference_mode()
def find_overlap(network: nn.Module, channels: int, multiple: int = 1) -> int | None:
    """How far from a cut through an image a network's output still differs, for any network, by trying.

    Random images and patterns are run whole and cut in two, in both directions. Beyond the distance that is found, no
    value differs by more than an eighth of an 8-bit level. For deep networks this is much less than the receptive field
    in theory, in most of which pixels have no influence that can be seen.

    Args:
        network: RGB or gray in [0, 1], (N, channels, H, W) -> (N, C, f * H, f * W), on any device. It is not changed.
        channels: Channels of the input.
        multiple: Cuts are at multiples of this: those of attention windows, or of pixel unshuffling.

    Returns:
        LR pixels; ``None`` where the difference goes on beyond 192 pixels, or the network takes means over the image.
    """
    if any(isinstance(module, nn.AdaptiveAvgPool2d) for module in network.modules()):
        return None
    device = next(network.parameters(), torch.empty(0)).device
    precise = deepcopy(network).double()
    # GPUs may round convolutions to 10 bits (TF32).
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        for length in PROBE_LENGTHS:
            length = -(-length // multiple) * multiple
            probes = _probes(channels, -(-PROBE_WIDTH // multiple) * multiple, 2 * length).to(device)
            # Rounding errors differ from one size to another, and SPAN makes much of those of float32 in some noise.
            for tried, images in ((network, probes), (precise, probes.double())):
                distance = max(_reach(tried, images, 3), _reach(tried, images.transpose(2, 3), 2))
                if distance <= length * 3 // 4:
                    return distance
    return None


def _probes(channels: int, height: int, width: int) -> Tensor:
    """Images (3, channels, height, width) that try a network hard.

    Noise of several grains, whose halves differ in brightness; black and white noise; and a fine checkerboard.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.zeros(1, channels, height, width)
    for grain in (1, 4, 16):
        noise = torch.rand(1, channels, height // grain + 1, width // grain + 1, generator=generator)
        coarse += F.interpolate(noise, scale_factor=grain)[..., :height, :width] / 3
    coarse[..., : width // 2] *= 0.6
    coarse[..., width // 2 :] = 1 - 0.6 * coarse[..., width // 2 :]
    binary = torch.rand(1, 1, height, width, generator=generator).round().expand_as(coarse)
    checkered = ((torch.arange(height)[:, None] + torch.arange(width)) % 2).expand_as(coarse)
    return torch.cat([coarse, binary, checkered])


def _reach(network: nn.Module, probes: Tensor, axis: int) -> int:
    """The distance in LR pixels from a cut through the middle along which the output differs."""
    length = probes.shape[axis] // 2
    whole = network(probes)
    scale = whole.shape[axis] // probes.shape[axis]
    reach = 0
    for half in (0, 1):
        part = network(probes.narrow(axis, half * length, length))
        difference = (part - whole.narrow(axis, half * length * scale, length * scale)).abs()
        per_line = difference.amax([other for other in range(4) if other != axis])
        if half == 0:
            per_line = per_line.flip(0)
        differing = torch.nonzero(~(per_line <= TOLERANCE))  # NaN differs
        if len(differing):
            reach = max(reach, differing.max().item() // scale + 1)
    return reach


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


def largest_tile(network_bytes_per_pixel: int, device: torch.device) -> int:
    """The side of the largest square tile, in LR pixels, that runs in half of the free memory of a device."""
    return int((MEMORY_SHARE * free_memory(device) / network_bytes_per_pixel) ** 0.5)
