"""Boxes, of which JPEG 2000 (ISO/IEC 15444-1, annex I) and AVIF (ISO/IEC 14496-12) are made."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from lora_sr.images.unreadable import UnreadableImage

MOST_BOXES = 1 << 16  # beside each other: a file of nothing else would have more of them than memory holds


class Box(NamedTuple):
    """Its type, and where its content begins and ends in the file."""

    kind: bytes
    start: int
    stop: int


def boxes_in(data: bytes, start: int = 0, stop: int | None = None) -> Iterator[Box]:
    """The boxes in a part of a file, up to one that does not fit into it.

    Raises:
        UnreadableImage: There are far too many.
    """
    stop = len(data) if stop is None else stop
    found = 0
    while start + 8 <= stop:
        found += 1
        if found > MOST_BOXES:
            raise UnreadableImage(f'must have {MOST_BOXES} boxes or fewer beside each other, got more')
        length, kind = struct.unpack_from('>I4s', data, start)
        content = start + 8
        if length == 1 and content + 8 <= stop:
            (length,) = struct.unpack_from('>Q', data, content)
            content += 8
        end = start + length if length else stop
        if not content <= end <= stop:
            return
        yield Box(kind, content, end)
        start = end


def make_box(kind: bytes, content: bytes) -> bytes:
    """A box of less than 4 GiB."""
    return struct.pack('>I4s', 8 + len(content), kind) + content
