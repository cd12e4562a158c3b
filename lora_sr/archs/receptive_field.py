"""How far a network looks, and where an image may be cut for it, measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.archs.info import NetworkInfo

# Two cuts meet at the corners of a tile, and images differ: well below the one 8-bit level that is promised.
TOLERANCE = 1 / 255 / 8
PROBE_LENGTHS, PROBE_WIDTH = (64, 128, 256), 32  # LR pixels
LARGEST_MULTIPLE = 64  # LR pixels
MULTIPLES = (64, 48, 60, 56, 40, 36, 54)  # which the sides of windows divide: 1 to 10, 12, and most of what is larger
MOST_AT_END = 4  # times what differs elsewhere
NEARLY = 2  # times the least difference
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67)


class Alignment(NamedTuple):
    """Where an image may be cut.

    Args:
        multiple: LR pixels from the beginning of the image, of which every cut is a multiple.
        is_exact: Whether a network makes the same of what is far behind such a cut.
    """

    multiple: int
    is_exact: bool


@torch.inference_mode()
def find_alignment(network: nn.Module, info: NetworkInfo) -> Alignment:
    """Where an image may be cut for a network, by trying.

    Convolutions allow a cut anywhere. A network whose attention has windows makes something else of an image that
    starts within one of them, even where it pads images to whole windows by itself and takes any size. What pads makes
    something else of the end of the image if its length is another one within a window.

    Noise is rolled, which changes no mean over the image: far from the borders no value may differ by more than an
    eighth of an 8-bit level. And it is cut, where its end may not differ by more than what is between. A distance that
    fits or fails tells of all that divide it, so that few are tried.

    Args:
        network: Any network, on any device. It is not changed.
        info: Its channels, and the multiple of which sizes have to be.

    Returns:
        A multiple of ``info.size_multiple`` up to 64. Where none is exact, as where distant pixels attend to each
        other, the smallest that changes about as little as 64 does.
    """
    multiple = info.size_multiple
    # Up to the largest multiple, this is a multiple of no other one.
    first = next(multiple * prime for prime in PRIMES if multiple * prime > LARGEST_MULTIPLE)
    others = [found for found in (math.lcm(multiple, other) for other in MULTIPLES) if found <= LARGEST_MULTIPLE]
    cuts: list[_Cut] = []
    for length in PROBE_LENGTHS[:2]:
        for tried, images in _forms(network, info, info.side(2 * (LARGEST_MULTIPLE + length))):
            cuts = [_Cut(tried, images[:1], axis, length * 3 // 4, info) for axis in (3, 2)]
            if _are_exact(cuts, first):
                return Alignment(multiple, True)
        for found in others:
            if _are_exact(cuts, found):
                return Alignment(_smallest(found, multiple, partial(_are_exact, cuts)), True)
    # Windows may be there none the less, and what pads.
    aligned = others[0] if others else multiple
    most = NEARLY * _largest(cuts, aligned)
    if _largest(cuts, first) <= most:
        return Alignment(multiple, False)
    return Alignment(_smallest(aligned, multiple, lambda other: _largest(cuts, other) <= most), False)


def _smallest(found: int, multiple: int, fits: Callable[[int], bool]) -> int:
    """The smallest distance that divides one that fits, and fits."""
    for prime in PRIMES:
        while found % (prime * multiple) == 0 and fits(found // prime):
            found //= prime
    return found


def _are_exact(cuts: Sequence[_Cut], distance: int) -> bool:
    return all(cut.is_exact(distance) for cut in cuts)


def _largest(cuts: Sequence[_Cut], distance: int) -> float:
    """The largest difference that a shift makes, or a cut at the end of the image."""
    return max(max(cut.by_shift(distance), cut.at_end(distance)[0]) for cut in cuts)


class _Cut:
    """A network, and images that are rolled or cut along an axis before it."""

    def __init__(self, network: nn.Module, images: Tensor, axis: int, far: int, info: NetworkInfo):
        self.network, self.axis, self.far, self.scale = network, axis, far, info.scale
        self.images = images if axis == 3 else images.transpose(2, 3)
        self.length = images.shape[3]
        self.tolerance = TOLERANCE * info.value_range
        self.whole = network(self.images)

        # Not asked twice for one distance.
        self.by_shift = lru_cache(maxsize=None)(self._by_shift)
        self.at_end = lru_cache(maxsize=None)(self._at_end)

    def is_exact(self, distance: int) -> bool:
        """Whether images may be cut so far from their beginning."""
        if not self.by_shift(distance) <= self.tolerance:  # NaN differs
            return False
        end, before = self.at_end(distance)
        return end <= max(self.tolerance, MOST_AT_END * before)  # means over the image are others, and change all of it

    def _by_shift(self, distance: int) -> float:
        rolled = self.network(self.images.roll(-distance, self.axis))
        return self._difference(rolled, distance, self.far, self.length - self.far)

    def _at_end(self, distance: int) -> tuple[float, float]:
        """What a cut changes at the end of the image, and before that."""
        rest = self.network(self.images.narrow(self.axis, distance, self.length - distance))
        end = self.length - self.far
        return self._difference(rest, distance, end - distance, self.length), self._difference(
            rest, distance, self.far, end
        )

    def _difference(self, output: Tensor, distance: int, start: int, stop: int) -> float:
        """The largest one, from a start in LR pixels of the output to a stop in those of the image."""
        kept = (stop - distance - start) * self.scale
        before = self.whole.narrow(self.axis, (start + distance) * self.scale, kept)
        return float((output.narrow(self.axis, start * self.scale, kept) - before).abs().max())


def _forms(network: nn.Module, info: NetworkInfo, length: int) -> Iterator[tuple[nn.Module, Tensor]]:
    """A network and its probes, of so many LR pixels, in its own precision and in float64.

    Rounding errors differ from one size to another, and SPAN makes much of those of float32 in some noise.
    """
    device = next(network.parameters(), torch.empty(0)).device
    probes = _probes(info.in_channels, info.side(PROBE_WIDTH), length).to(device) * info.value_range
    # GPUs may round convolutions to 10 bits (TF32).
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield network, probes
        precise = deepcopy(network).double()
        try:
            precise(probes[:1].double())
        except RuntimeError:  # of a network that makes tensors of its own in float32, as GRL does for most sizes
            return
        yield precise, probes.double()


@torch.inference_mode()
def receptive_radius(network: nn.Module, info: NetworkInfo) -> int | None:
    """How far from a cut through an image a network's output still differs, for any network, by trying.

    Random images and patterns are run whole and cut in two, in both directions. Beyond the distance that is found, no
    value differs by more than an eighth of an 8-bit level. For deep networks this is much less than the receptive field
    in theory, in most of which pixels have no influence that can be seen.

    Args:
        network: Any network, on any device. It is not changed.
        info: Its channels, and the multiple at which it is cut: that of pixel unshuffling, and of attention windows,
            see :func:`find_alignment`.

    Returns:
        LR pixels; ``None`` where the difference goes on beyond 192 pixels, or the network takes means over the image.
    """
    if any(isinstance(module, nn.AdaptiveAvgPool2d) for module in network.modules()):
        return None
    for shortest in PROBE_LENGTHS:
        length = info.side(shortest)
        for tried, images in _forms(network, info, 2 * length):
            distance = max(_reach(tried, images, axis, TOLERANCE * info.value_range) for axis in (3, 2))
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
