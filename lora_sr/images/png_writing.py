"""PNG files from blocks of rows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from lora_sr.images.blocks import ZLIB_LEVEL, Block, Run, encoded, rows_of_block
from lora_sr.images.formats import Picture, bare_exif_block
from lora_sr.images.metadata import png_chunks
from lora_sr.images.png import PNG_SIGNATURE, write_chunk


class _Deflated(NamedTuple):
    data: bytes
    checksum: int
    length: int  # before it was deflated


def _deflate(content: np.ndarray, is_last: bool) -> _Deflated:
    """A part of a zlib stream that refers to none before it; it ends at a byte."""
    deflater = zlib.compressobj(ZLIB_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = deflater.compress(content.data)
    data += deflater.flush(zlib.Z_FINISH if is_last else zlib.Z_SYNC_FLUSH)
    return _Deflated(data, zlib.adler32(content.data), content.nbytes)


def _zlib_stream(parts: Iterable[_Deflated]) -> Iterator[bytes]:
    """Make one stream of parts (RFC 1950), a piece of it for each; the last has the checksum of all."""
    low, high, prefix, before = 1, 0, zlib.compress(b'', ZLIB_LEVEL)[:2], None
    for part in parts:
        if before is not None:
            yield prefix + before
            prefix = b''
        before = part.data
        # Adler-32 of what is joined: two sums modulo the largest prime below 2 ** 16, which begin at 1 and 0.
        high = (high + (part.checksum >> 16) + part.length * (low - 1)) % 65521
        low = (low + (part.checksum & 0xFFFF) - 1) % 65521
    yield prefix + (before or b'') + struct.pack('>HH', high, low)


def write_png(file: IO[bytes], picture: Picture, bands: Iterable[np.ndarray], size: tuple[int, int], run: Run) -> None:
    """A PNG (W3C recommendation, third edition) with the filter "up" in each row.

    OpenCV writes no metadata and no gray with alpha, Pillow no colors of 16 bits and four times as slowly.

    Args:
        file: Open for writing.
        picture: What describes the pixels, and pixels of the type, uint8 or uint16, and the channels of the bands.
        bands: The pixels from top to bottom, each (rows, width, channels) of any number of rows.
        size: Height and width of them all.
        run: Does what `map` does, e.g. in threads, with the blocks of a band.

    Raises:
        InputError: A chunk would have 2 GiB or more.
    """
    height, width = size
    channels, itemsize = picture.pixels.shape[2], picture.pixels.itemsize
    header = struct.pack('>IIBBBBB', width, height, 8 * itemsize, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    chunks = [(b'IHDR', header)]
    if picture.icc_profile:
        chunks.append((b'iCCP', b'ICC profile\0\0' + zlib.compress(picture.icc_profile)))
    if picture.exif:
        chunks.append((b'eXIf', bare_exif_block(picture.exif)))
    chunks += png_chunks(picture.metadata)
    file.write(PNG_SIGNATURE)
    for name, content in chunks:
        file.write(write_chunk(name, content))

    def encode(block: Block) -> _Deflated:
        rows, above = (
            np.ascontiguousarray(pixels, pixels.dtype.newbyteorder('>')).view(np.uint8).reshape(len(pixels), -1)
            for pixels in (block.pixels, block.above[None])
        )
        filtered = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
        filtered[:, 0] = 2
        np.subtract(rows[0], above[0], out=filtered[0, 1:])
        np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
        return _deflate(filtered, block.is_last)

    rows = rows_of_block(width * channels * itemsize)
    for piece in _zlib_stream(encoded(encode, bands, height, rows, run)):
        file.write(write_chunk(b'IDAT', piece))
    file.write(write_chunk(b'IEND', b''))
