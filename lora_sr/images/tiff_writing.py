"""TIFF files from blocks of rows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lora_sr.errors import InputError
from lora_sr.images import tags
from lora_sr.images.blocks import ZLIB_LEVEL, Block, Run, encoded, rows_of_block
from lora_sr.images.formats import Picture
from lora_sr.images.metadata import add_tags

# Each entry of a directory: tag, type, count, and the value or where it is.
TIFF_HEADER, TIFF_ENTRY = struct.Struct('<2sHL'), struct.Struct('<HHLL')


def write_tiff(file: IO[bytes], picture: Picture, bands: Iterable[np.ndarray], size: tuple[int, int], run: Run) -> None:
    """A TIFF 6.0, a strip a block, each deflated after horizontal differencing (predictor 2); its directory is the end.

    Floating point is deflated as it is, since not every program undoes the predictor that is made for it. Pillow writes
    no colors of 16 bits, OpenCV no metadata, and tifffile no EXIF.

    Args:
        file: Open for writing at its beginning, where it can be sought.
        picture: What describes the pixels, and pixels of the type, uint8, uint16 or float32, and the channels of the
            bands.
        bands: The pixels from top to bottom, each (rows, width, channels) of any number of rows.
        size: Height and width of them all.
        run: Does what `map` does, e.g. in threads, with the blocks of a band.

    Raises:
        InputError: The file would have 4 GiB or more.
    """
    height, width = size
    itemsize, channels = picture.pixels.itemsize, picture.pixels.shape[2]
    is_real = picture.pixels.dtype == np.float32

    def encode(block: Block) -> bytes:
        stored = block.pixels
        if not is_real:
            stored = stored.copy()
            np.subtract(block.pixels[:, 1:], block.pixels[:, :-1], out=stored[:, 1:])
        return zlib.compress(np.ascontiguousarray(stored, stored.dtype.newbyteorder('<')).data, ZLIB_LEVEL)

    rows = rows_of_block(width * channels * itemsize)
    starts, lengths = [], []
    file.write(TIFF_HEADER.pack(b'II', 42, 0))  # once more when it is known where the directory is
    for strip in encoded(encode, bands, height, rows, run):
        starts.append(file.tell())
        lengths.append(file.write(strip))
        _check_offset(file.tell())
    directory = ImageFileDirectory_v2()
    for tag, value in picture.exif.items():
        directory[tag] = value
    add_tags(directory, picture.metadata)
    directory[tags.IMAGE_WIDTH], directory[tags.IMAGE_LENGTH] = width, height
    directory[tags.BITS_PER_SAMPLE] = (8 * itemsize,) * channels
    directory[tags.COMPRESSION] = tags.DEFLATE
    directory[tags.PHOTOMETRIC] = tags.RGB if channels > 2 else tags.BLACK_IS_ZERO
    directory[tags.SAMPLES_PER_PIXEL] = channels
    directory[tags.ROWS_PER_STRIP] = min(rows, height)
    directory.tagtype[tags.STRIP_BYTE_COUNTS] = tags.LONG
    directory[tags.STRIP_BYTE_COUNTS] = tuple(lengths)
    directory[tags.PLANAR_CONFIGURATION] = tags.CONTIGUOUS
    if is_real:
        directory[tags.SAMPLE_FORMAT] = (tags.FLOATING_POINT,) * channels
    else:
        directory[tags.PREDICTOR] = tags.HORIZONTAL_DIFFERENCES
    if channels in (2, 4):
        directory[tags.EXTRA_SAMPLES] = tags.UNASSOCIATED if picture.has_alpha else tags.UNSPECIFIED
    if picture.icc_profile:
        directory.tagtype[tags.ICC_PROFILE] = tags.UNDEFINED
        directory[tags.ICC_PROFILE] = picture.icc_profile
    _finish_tiff(file, directory, starts)


def _finish_tiff(file: IO[bytes], directory: ImageFileDirectory_v2, starts: Sequence[int]) -> None:
    """Write where the strips start, then the directory: Pillow knows one strip, or counts them from there."""
    file.write(b'\0' * (file.tell() % 2))
    table = file.tell()
    offset = table + 4 * len(starts)
    directory[tags.STRIP_OFFSETS] = 0
    _check_offset(offset + len(directory.tobytes()))
    written = bytearray(directory.tobytes(offset))
    entry = (tags.STRIP_OFFSETS, tags.LONG, len(starts), starts[0] if len(starts) == 1 else table)
    TIFF_ENTRY.pack_into(written, 2 + TIFF_ENTRY.size * sorted(directory).index(tags.STRIP_OFFSETS), *entry)
    file.write(struct.pack(f'<{len(starts)}L', *starts) + written)
    file.seek(0)
    file.write(TIFF_HEADER.pack(b'II', 42, offset))


def _check_offset(offset: int) -> None:
    if offset >= 1 << 32:
        raise InputError('TIFF cannot hold it: it has 4 GiB or more.')
