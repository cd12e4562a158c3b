"""Large images in tiles that overlap by as much as the network looks around."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn

from lora_sr.archs.info import NetworkInfo
from lora_sr.archs.receptive_field import find_alignment, receptive_radius

BLIND_OVERLAP = 32  # LR pixels, for networks that look at the whole image


class Cut(NamedTuple):
    """How a network's images may be cut.

    Args:
        overlap: LR pixels on each inner side of a tile that are not kept.
        multiple: LR pixels of which tiles begin at multiples: as sizes have to be, and as windows stand.
        is_exact: Whether the results are those of the whole image, to an eighth of an 8-bit level.
    """

    overlap: int
    multiple: int
    is_exact: bool


def find_cut(network: nn.Module, info: NetworkInfo) -> Cut:
    """Measure how a network's images may be cut; one that looks at the whole image gets an overlap none the less."""
    multiple, is_aligned = find_alignment(network, info)
    radius = receptive_radius(network, replace(info, size_multiple=multiple)) if is_aligned else None
    return Cut(BLIND_OVERLAP if radius is None else radius, multiple, radius is not None)


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
