"""How far a network looks, measured."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.info import NetworkInfo

# Two cuts meet at the corners of a tile, and images differ: well below the one 8-bit level that is promised.
TOLERANCE = 1 / 255 / 8
PROBE_LENGTHS, PROBE_WIDTH = (64, 128, 256), 32  # LR pixels


@torch.inference_mode()
def receptive_radius(network: nn.Module, info: NetworkInfo) -> int | None:
    """How far from a cut through an image a network's output still differs, for any network, by trying.

    Random images and patterns are run whole and cut in two, in both directions. Beyond the distance that is found, no
    value differs by more than an eighth of an 8-bit level. For deep networks this is much less than the receptive field
    in theory, in most of which pixels have no influence that can be seen.

    Args:
        network: Any network, on any device. It is not changed.
        info: Its channels, and the multiple at which it is cut: that of attention windows, or of pixel unshuffling.

    Returns:
        LR pixels; ``None`` where the difference goes on beyond 192 pixels, or the network takes means over the image.
    """
    if any(isinstance(module, nn.AdaptiveAvgPool2d) for module in network.modules()):
        return None
    device = next(network.parameters(), torch.empty(0)).device
    precise = deepcopy(network).double()
    # GPUs may round convolutions to 10 bits (TF32).
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        for shortest in PROBE_LENGTHS:
            length = info.side(shortest)
            probes = _probes(info.in_channels, info.side(PROBE_WIDTH), 2 * length).to(device) * info.value_range
            tolerance = TOLERANCE * info.value_range
            # Rounding errors differ from one size to another, and SPAN makes much of those of float32 in some noise.
            for tried, images in ((network, probes), (precise, probes.double())):
                distance = max(_reach(tried, images, axis, tolerance) for axis in (3, 2))
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


def _reach(network: nn.Module, probes: Tensor, axis: int, tolerance: float) -> int:
    """The distance in LR pixels from a cut through the middle along which the output differs."""
    probes = probes if axis == 3 else probes.transpose(2, 3)
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
        differing = torch.nonzero(~(per_line <= tolerance))  # NaN differs
        if len(differing):
            reach = max(reach, int(differing.max()) // scale + 1)
    return reach
