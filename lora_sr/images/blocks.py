"""Blocks of rows, by which an image is encoded, so that none has to be in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple

import numpy as np

# Level 1 of zlib: on photographs higher ones take 2 to 7 times as long for files 9 to 16% smaller.
ZLIB_LEVEL = 1
BLOCK_BYTES = 1 << 23  # of pixels that zlib gets at once, and which threads share out

Run = Callable[[Callable[['Block'], Any], Iterable['Block']], Iterable[Any]]


class Block(NamedTuple):
    """Rows that are compressed by themselves.

    Args:
        pixels: (rows, width, channels).
        above: The row before, (width, channels); zeros for the first.
        is_first: Whether no rows come before.
        is_last: Whether no rows follow.
    """

    pixels: np.ndarray
    above: np.ndarray
    is_first: bool
    is_last: bool


def _blocks(bands: Iterable[np.ndarray], height: int, rows: int) -> Iterator[list[Block]]:
    """Cut the rows of bands into blocks of so many, the last of fewer: for each band those that it completes."""
    start, above = 0, None
    held: list[np.ndarray] = []
    for band in bands:
        complete = []
        while len(band):
            wanted = min(rows, height - start) - sum(len(part) for part in held)
            held.append(band[:wanted])
            if len(band) < wanted:
                break
            pixels = held[0] if len(held) == 1 else np.concatenate(held)
            above = np.zeros_like(pixels[0]) if above is None else above
            complete.append(Block(pixels, above, start == 0, start + len(pixels) == height))
            # Copies, for else whole bands stay in memory.
            start, held, above, band = start + len(pixels), [], pixels[-1].copy(), band[wanted:]
        held = [part.copy() for part in held]
        yield complete


def encoded(
    encode: Callable[[Block], Any], bands: Iterable[np.ndarray], height: int, rows: int, run: Run
) -> Iterator[Any]:
    """What a function makes of blocks of so many rows, in their order; those that a band completes at once.

    Args:
        encode: The function.
        bands: The pixels from top to bottom, each (rows, width, channels) of any number of rows.
        height: Rows of them all.
        rows: Of a block; the last may have fewer.
        run: Does what `map` does, e.g. in threads, with the blocks of a band.
    """
    return (part for blocks in _blocks(bands, height, rows) for part in run(encode, blocks))


def rows_of_block(row_bytes: int) -> int:
    """How many rows of so many bytes go into a block for zlib."""
    return max(1, BLOCK_BYTES // row_bytes)
