"""TIFF as bytes: pixels that neither Pillow nor OpenCV reads, or not exactly, of any layout."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from lora_sr.images.tags import (
    BITS_PER_SAMPLE,
    BLACK_IS_ZERO,
    COMPRESSION,
    CONTIGUOUS,
    EXTRA_SAMPLES,
    FLOATING_POINT,
    FLOATING_POINT_DIFFERENCES,
    HORIZONTAL_DIFFERENCES,
    IMAGE_LENGTH,
    IMAGE_WIDTH,
    LONG,
    LONG8,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR_CONFIGURATION,
    PREDICTOR,
    RGB,
    ROWS_PER_STRIP,
    SAMPLE_FORMAT,
    SAMPLES_PER_PIXEL,
    SEPARATE,
    SHORT,
    STRIP_BYTE_COUNTS,
    STRIP_OFFSETS,
    TILE_BYTE_COUNTS,
    TILE_LENGTH,
    TILE_OFFSETS,
    TILE_WIDTH,
    WHITE_IS_ZERO,
)
from lora_sr.images.unreadable import UnreadableImage

TIFF_SIGNATURES = (b'II*\0', b'MM\0*')
BIG_SIGNATURES = (b'II+\0', b'MM\0+')
# Compressions that see bytes and no pixels: besides these LZW, PackBits, LZMA and Zstandard.
NONE, DEFLATES = 1, (8, 32946)
BYTEWISE = (NONE, 5, *DEFLATES, 32773, 34925, 50000)
WITHOUT_PREDICTOR = (NONE, 32773)  # whatever the tag says, to libtiff
SAMPLE_FORMATS = {1: 'whole numbers', 2: 'whole numbers with signs', 3: 'floating point'}
INPUT_BYTES = 1 << 20  # that are inflated at once
MOST_PIECES = 1 << 15  # strips or tiles, each of which takes libtiff half a millisecond
ROWS_AT_ONCE = 64  # whose samples are made of bytes
MOST_SAMPLE_BYTES = 1 << 30  # of all values: RGB of 16 bits has as many at the most pixels that Pillow reads
MOST_PADDING = 1 << 28  # bytes of values beyond twice those of the image, in strips and tiles
BAND_BYTES = 1 << 26  # of fewer rows at once, where they are long
MOST_ENTRIES = (1 << 16) - 1  # of a directory, as many as one that is no BigTIFF can have
# Types of whole numbers -> bytes; one with a sign that is below 0 is a size beyond all others.
WHOLE_NUMBERS = {1: 1, 6: 1, SHORT: 2, 8: 2, LONG: 4, 9: 4, 13: 4, LONG8: 8, 17: 8, 18: 8}
TIFF_START = 8  # bytes of the header
# Tags that stand once.
SIZES = (
    *(IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_OFFSETS, STRIP_BYTE_COUNTS),
    *(TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTE_COUNTS),
)


class _Entry(NamedTuple):
    """One of a directory: a tag, the type and the number of its values, and they or where they are."""

    tag: int
    kind: int
    length: int
    content: bytes


@dataclass
class _Directory:
    """The first directory of a TIFF.

    Args:
        data: The file.
        order: '<' or '>'.
        is_big: Whether it is a BigTIFF.
        start: Where it is.
        entries: By their tags.
        following: What stands behind them: where the next one is.
    """

    data: bytes
    order: str
    is_big: bool
    start: int
    entries: dict[int, _Entry]
    following: bytes

    def numbers(self, tag: int) -> np.ndarray:
        """The whole numbers of a tag; none where it is of another type, or missing.

        Raises:
            UnreadableImage: They are beyond the end of the file.
        """
        entry = self.entries.get(tag)
        size = WHOLE_NUMBERS.get(entry.kind) if entry is not None else None
        if entry is None or size is None:
            return np.empty(0, np.uint8)
        dtype = np.dtype(f'{self.order}u{size}')
        if entry.length * size <= len(entry.content):
            return np.frombuffer(entry.content, dtype, entry.length)
        (offset,) = struct.unpack(f'{self.order}{"Q" if self.is_big else "I"}', entry.content)
        if offset + entry.length * size > len(self.data):
            raise UnreadableImage('is damaged: it is cut short')
        return np.frombuffer(self.data, dtype, entry.length, offset)

    def values(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The whole numbers of a tag that has few, or the default where there are none."""
        return tuple(self.numbers(tag)[:MOST_PIECES].tolist()) or default

    def value(self, tag: int, default: int) -> int:
        """The first whole number of a tag."""
        return self.values(tag, (default,))[0]

    def set(self, tag: int, value: int) -> None:
        """Give a tag one whole number."""
        code, kind = ('Q', LONG8) if self.is_big else ('I', LONG)
        self.entries[tag] = _Entry(tag, kind, 1, struct.pack(f'{self.order}{code}', value))

    def in_place(self) -> bytes:
        """The file with this directory in the place of its own, which had as many entries or more."""
        count, entry = ('Q', 'HHQ8s') if self.is_big else ('H', 'HHI4s')
        written = struct.pack(f'{self.order}{count}', len(self.entries))
        written += b''.join(struct.pack(f'{self.order}{entry}', *self.entries[tag]) for tag in sorted(self.entries))
        written += self.following
        changed = bytearray(self.data)
        changed[self.start : self.start + len(written)] = written
        return bytes(changed)


def _read_directory(data: bytes) -> _Directory | None:
    """The first directory; ``None`` for what is no TIFF, or cut short.

    Raises:
        UnreadableImage: It has far too many entries, or several for what has one.
    """
    is_big = data[:4] in BIG_SIGNATURES
    if not is_big and data[:4] not in TIFF_SIGNATURES:
        return None
    order = '<' if data[:2] == b'II' else '>'
    offset, count_code, entry_code = ('Q', 'Q', 'HHQ8s') if is_big else ('I', 'H', 'HHI4s')
    entry = struct.Struct(order + entry_code)
    try:
        (start,) = struct.unpack_from(order + offset, data, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + count_code, data, start)
        first = start + struct.calcsize(f'={count_code}')
        if first + count * entry.size > len(data):
            return None
        if count > MOST_ENTRIES:
            raise UnreadableImage(f'must have {MOST_ENTRIES} entries or fewer in its directory, got {count}')
        entries = [_Entry(*entry.unpack_from(data, first + index * entry.size)) for index in range(count)]
    except struct.error:
        return None
    seen = Counter(entry.tag for entry in entries)
    if any(seen[tag] > 1 for tag in SIZES):  # of which libtiff takes the first, and Pillow the last
        raise UnreadableImage('is damaged: its directory has several sizes')
    end = first + count * entry.size
    following = data[end : end + struct.calcsize(f'={offset}')]
    return _Directory(data, order, is_big, start, {entry.tag: entry for entry in entries}, following)


@dataclass(frozen=True)
class Folded:
    """A TIFF as one of gray of 8 bits, whose pixels are the bytes of samples.

    Args:
        data: A file that Pillow opens, for all but its pixels.
        source: The file itself.
        layout: How its samples are stored.
        dtype: Of the samples, in the file's order of bytes.
        shape: Height, width and channels: the colors, and what comes first of the others.
        extra_samples: What the channels besides the colors are, as the tag has it.
        orientation: As EXIF has it.
        white_is_zero: Whether gray has to be inverted.
    """

    data: bytes
    source: bytes
    layout: _Layout
    dtype: np.dtype
    shape: tuple[int, int, int]
    extra_samples: tuple[int, ...]
    orientation: int
    white_is_zero: bool

    def pixels(self) -> np.ndarray:
        """uint8, uint16 or float32 (H, W, C), not turned.

        Raises:
            UnreadableImage: It is cut short, or values are not finite.
            OSError: It is damaged.
        """
        height, width, channels = self.shape
        is_real = self.dtype.kind == 'f'
        pixels = np.empty(self.shape, np.float32 if is_real else self.dtype.newbyteorder('='))
        layout = self.layout
        for plane in range(min(layout.planes, channels)):
            channel = slice(plane, plane + 1) if layout.planes > 1 else slice(None)
            for start, blocks in layout.blocks(self.source, plane, height):
                with np.errstate(over='ignore', invalid='ignore'):  # beyond float32: infinite, which is told
                    samples = layout.samples(blocks, self.dtype)[:, :width, :channels]
                    pixels[start : start + len(samples), :, channel] = samples
        if is_real:
            bad = next((row for row in range(height) if not np.isfinite(pixels[row]).all()), None)
            if bad is not None:
                raise UnreadableImage(f'must have finite values, got NaN or infinity in row {bad}, counted from 0')
        if self.white_is_zero:
            pixels[:, :, 0] = (1 if is_real else np.iinfo(pixels.dtype).max) - pixels[:, :, 0]
        return pixels


@dataclass(frozen=True)
class _Layout:
    """How the samples of a TIFF are stored: in pieces, which are strips or tiles.

    Args:
        planes: 1, or the number of channels, where each is apart.
        channels: Of a plane.
        compression: As the tag has it.
        predictor: 1 to 3, as the tag has it.
        across: Pieces in a row of them.
        rows: Of a piece; the last strip may have fewer.
        columns: Pixels of a piece across.
        pixel_bytes: Of a plane.
        offsets: Where the pieces are.
        lengths: How many bytes they have.
    """

    planes: int
    channels: int
    compression: int
    predictor: int
    across: int
    rows: int
    columns: int
    pixel_bytes: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    def blocks(self, data: bytes, plane: int, height: int) -> Iterator[tuple[int, np.ndarray]]:
        """A plane from top to bottom, some rows at a time: the first row, and bytes (rows, pieces across, bytes)."""
        whole = memoryview(data)
        for row in range(0, height, self.rows):
            first = (plane * -(-height // self.rows) + row // self.rows) * self.across
            numbers = range(first, first + self.across)
            parts = (whole[self.offsets[number] : self.offsets[number] + self.lengths[number]] for number in numbers)
            stop = min(row + self.rows, height)
            for chunks in zip(*(self._decompressed(part, stop - row) for part in parts)):
                yield row, np.stack(chunks, 1)
                row += len(chunks[0])

    def _decompressed(self, part: memoryview, height: int) -> Iterator[np.ndarray]:
        """The upper rows of a piece as bytes (rows, bytes), some at a time: whole ones may be large."""
        width = self.columns * self.pixel_bytes
        at_once = min(max(BAND_BYTES // (self.across * width), 1), ROWS_AT_ONCE)
        chunks = [min(at_once, height - row) for row in range(0, height, at_once)]
        if self.compression in DEFLATES:
            contents: Iterator[bytes | memoryview] = _inflated(part, [rows * width for rows in chunks])
        elif self.compression == NONE:
            step = at_once * width
            contents = (part[start : start + step] for start in range(0, height * width, step))
        else:
            image = _by_libtiff(part, self.compression, height, width)
            for start, rows in zip(count(0, at_once), chunks):
                yield np.asarray(image.crop((0, start, width, start + rows)))
            return
        for rows, content in zip(chunks, contents):
            if len(content) < rows * width:
                raise UnreadableImage('is damaged: it is cut short')
            yield np.frombuffer(content, np.uint8, rows * width).reshape(rows, width)

    def samples(self, blocks: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Bytes (rows, pieces across, bytes) -> samples (rows, columns, channels)."""
        size = dtype.itemsize
        if self.predictor == FLOATING_POINT_DIFFERENCES:
            # Of each row first the highest bytes of all samples, as differences, then the next ones.
            differences = blocks.reshape(*blocks.shape[:2], -1, self.channels)
            planes = np.add.accumulate(differences, 2, np.uint8).reshape(*blocks.shape[:2], size, -1)
            samples = np.ascontiguousarray(planes.swapaxes(2, 3)).view(dtype.newbyteorder('>'))
        elif self.predictor == HORIZONTAL_DIFFERENCES:
            whole = np.dtype(f'u{size}')
            stored = np.ascontiguousarray(blocks).view(whole.newbyteorder(dtype.byteorder))
            differences = stored.reshape(*blocks.shape[:2], -1, self.channels)
            samples = np.add.accumulate(differences, 2, whole).view(dtype.newbyteorder('='))
        else:
            samples = np.ascontiguousarray(blocks).view(dtype)
        return samples.reshape(len(blocks), -1, self.channels)


def _inflated(part: memoryview, sizes: list[int]) -> Iterator[bytes]:
    """What was deflated, in parts of such sizes; fewer bytes where there are no more."""
    inflater, place = zlib.decompressobj(), 0
    left: bytes | memoryview = b''
    for number, size in enumerate(sizes):
        content = bytearray()
        while len(content) < size and (left or place < len(part)) and not inflater.eof:
            if not left:
                left, place = part[place : place + INPUT_BYTES], place + INPUT_BYTES
            content += inflater.decompress(left, size - len(content))
            left = inflater.unconsumed_tail
        if number == len(sizes) - 1:  # where nothing but the checksum is left, it is read
            inflater.decompress(bytes(left) + part[place : place + INPUT_BYTES], 1)
        yield bytes(content)


def _by_libtiff(part: memoryview, compression: int, height: int, width: int) -> Image.Image:
    """Bytes as the gray of an image, by way of libtiff."""
    fields = {
        IMAGE_WIDTH: width,
        IMAGE_LENGTH: height,
        BITS_PER_SAMPLE: 8,
        COMPRESSION: compression,
        PHOTOMETRIC: BLACK_IS_ZERO,
        STRIP_OFFSETS: TIFF_START,
        SAMPLES_PER_PIXEL: 1,
        ROWS_PER_STRIP: height,
        STRIP_BYTE_COUNTS: len(part),
    }
    directory = struct.pack('<H', len(fields))
    directory += b''.join(struct.pack('<HHII', tag, LONG, 1, value) for tag, value in fields.items()) + bytes(4)
    file = struct.pack('<2sHI', b'II', 42, TIFF_START + len(part)) + part + directory
    image = TiffImageFile(io.BytesIO(file))
    try:
        image.load()
    except Image.DecompressionBombError:
        size = height * width >> 20
        raise UnreadableImage(f'must be stored in smaller strips or tiles, got some of {size} MiB') from None
    return image


def fold(data: bytes) -> Folded | None:
    """Make a TIFF readable that has more than 8 bits, or planes of more than the colors; ``None`` for all others.

    Raises:
        UnreadableImage: Its pixels are of a kind that is not read, too many, or not all there; or, of any TIFF, it
            would take far more time or memory than it has pixels.
        Image.DecompressionBombError: It has more pixels than Pillow reads.
    """
    if data.startswith(BIG_SIGNATURES[1]):  # which Pillow takes for damaged
        raise UnreadableImage('must be a TIFF or a BigTIFF of little-endian numbers, got a BigTIFF of big-endian ones')
    directory = _read_directory(data)
    if directory is None:
        return None
    _check_pieces(directory)
    is_apart = directory.value(PLANAR_CONFIGURATION, CONTIGUOUS) == SEPARATE
    if max(directory.values(BITS_PER_SAMPLE, (1,))) <= 8 and not (is_apart and directory.values(EXTRA_SAMPLES)):
        return None
    dtype, colors = _sample_type(directory)
    stored = directory.value(SAMPLES_PER_PIXEL, 1)
    return Folded(
        _as_gray(directory),
        data,
        _layout(directory, dtype, stored, planes=stored if is_apart else 1),
        dtype,
        (directory.value(IMAGE_LENGTH, 0), directory.value(IMAGE_WIDTH, 0), min(stored, colors + 1)),
        directory.values(EXTRA_SAMPLES),
        directory.value(ORIENTATION, 1),
        directory.value(PHOTOMETRIC, -1) == WHITE_IS_ZERO,
    )


def _check_pieces(directory: _Directory) -> None:
    """See that strips and tiles are no larger than the image, nor together than the file, but for what is usual.

    A small file may have large tiles for a narrow image, and all of them may be one and the same place in it.
    """
    width, height = directory.value(IMAGE_WIDTH, 0), directory.value(IMAGE_LENGTH, 0)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    columns, rows = _size_of_pieces(directory)
    if columns and rows:
        bits = directory.value(SAMPLES_PER_PIXEL, 1) * max(directory.values(BITS_PER_SAMPLE, (1,)))
        padded = -(-width // columns) * columns * -(-height // rows) * rows
        if padded * bits // 8 > 2 * (width * height * bits // 8) + MOST_PADDING:
            got = f'{columns} x {rows} for {width} x {height} pixels'
            raise UnreadableImage(f'must be stored in smaller tiles, got {got}')
    for tag in (STRIP_BYTE_COUNTS, TILE_BYTE_COUNTS):
        if directory.numbers(tag).sum(dtype=float) > max(len(directory.data), MOST_SAMPLE_BYTES):
            raise UnreadableImage('is damaged: its strips or tiles are larger than the file')


def _size_of_pieces(directory: _Directory) -> tuple[int, int]:
    """Width and height of tiles or strips in pixels."""
    if TILE_WIDTH in directory.entries:
        return directory.value(TILE_WIDTH, 0), directory.value(TILE_LENGTH, 0)
    height = directory.value(IMAGE_LENGTH, 0)
    return directory.value(IMAGE_WIDTH, 0), min(directory.value(ROWS_PER_STRIP, height), height)


def _sample_type(directory: _Directory) -> tuple[np.dtype, int]:
    """The type of samples, in the file's order of bytes, and how many of a pixel are colors."""
    bits = directory.values(BITS_PER_SAMPLE, (1,))
    formats = set(directory.values(SAMPLE_FORMAT, (1,)))
    is_real = formats == {FLOATING_POINT}
    colors = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3}.get(directory.value(PHOTOMETRIC, -1), 0)
    if (
        len(set(bits)) != 1
        or bits[0] not in ((16, 32, 64) if is_real else (8, 16))
        or not (is_real or formats == {1})
        or not 0 < colors <= directory.value(SAMPLES_PER_PIXEL, 1)
    ):
        kind = describe(directory.data)
        if kind is None:
            raise UnreadableImage('is damaged: its directory makes no sense')
        raise UnreadableImage(f'must be gray or RGB of 8 or 16 bits or floating point, got {kind}: convert it first')
    return np.dtype(f'{directory.order}{"f" if is_real else "u"}{bits[0] // 8}'), colors


def _layout(directory: _Directory, dtype: np.dtype, stored: int, planes: int) -> _Layout:
    """How so many samples of a pixel are stored."""
    compression = directory.value(COMPRESSION, NONE)
    predictor = 1 if compression in WITHOUT_PREDICTOR else directory.value(PREDICTOR, 1)
    if compression not in BYTEWISE or not 1 <= predictor <= (3 if dtype.kind == 'f' else 2):
        raise UnreadableImage(
            'must be compressed by LZW, Deflate, PackBits, LZMA, Zstandard or not at all, got compression '
            f'{compression} and predictor {predictor}'
        )
    width, height = directory.value(IMAGE_WIDTH, 0), directory.value(IMAGE_LENGTH, 0)
    if width * height * stored * dtype.itemsize > MOST_SAMPLE_BYTES:
        raise UnreadableImage(f'must have {MOST_SAMPLE_BYTES >> 30} GiB of values or less')
    columns, rows = _size_of_pieces(directory)
    if not (width and height and columns and rows):
        raise UnreadableImage('is damaged: its sizes are impossible')
    is_tiled = TILE_WIDTH in directory.entries
    offsets = directory.numbers(TILE_OFFSETS if is_tiled else STRIP_OFFSETS)
    lengths = directory.numbers(TILE_BYTE_COUNTS if is_tiled else STRIP_BYTE_COUNTS)
    across, down = -(-width // columns), -(-height // rows)
    if len(offsets) != across * down * planes or len(lengths) != len(offsets):
        raise UnreadableImage('is damaged: it does not say where all of its pixels are')
    if len(offsets) > MOST_PIECES:
        raise UnreadableImage(f'must be stored in {MOST_PIECES} strips or tiles or fewer, got {len(offsets)}')
    places = tuple(offsets.tolist()), tuple(lengths.tolist())
    if any(offset + length > len(directory.data) for offset, length in zip(*places)):
        raise UnreadableImage('is damaged: it is cut short')
    channels = stored // planes
    return _Layout(planes, channels, compression, predictor, across, rows, columns, channels * dtype.itemsize, *places)


def _as_gray(directory: _Directory) -> bytes:
    """The file as one of gray of 8 bits, which stands as it is stored."""
    entries = dict(directory.entries)
    gray = replace(directory, entries=entries)
    for tag, one in (
        (SAMPLES_PER_PIXEL, 1),
        (BITS_PER_SAMPLE, 8),
        (SAMPLE_FORMAT, 1),
        (PHOTOMETRIC, BLACK_IS_ZERO),
        (PLANAR_CONFIGURATION, CONTIGUOUS),
        (PREDICTOR, 1),
        (ORIENTATION, 1),
    ):
        if tag in entries:
            gray.set(tag, one)
    entries.pop(EXTRA_SAMPLES, None)
    return gray.in_place()


def open_directory(data: bytes) -> ImageFileDirectory_v2 | None:
    """The first directory as Pillow reads it; ``None`` for what is no TIFF.

    Raises:
        Exception: It is damaged: Pillow raises what it likes, also when a value is taken.
    """
    head = bytes(data[:4])
    if head not in (*TIFF_SIGNATURES, *BIG_SIGNATURES):
        return None
    file = io.BytesIO(data)
    directory = ImageFileDirectory_v2(file.read(16 if head in BIG_SIGNATURES else 8))
    file.seek(directory.next)
    directory.load(file)
    return directory


def describe(data: bytes) -> str | None:
    """The pixels of a TIFF in words; ``None`` for what is no TIFF, or damaged."""
    try:
        directory = open_directory(data)
        if directory is None:
            return None
        bits = directory[BITS_PER_SAMPLE]
        samples = directory.get(SAMPLES_PER_PIXEL, 1)
        sample_format = directory.get(SAMPLE_FORMAT, (1,))[0]
        numbers = f'{samples:d} channel{"s" if samples > 1 else ""} of {max(bits):d} bits'
    except Exception:  # of a damaged directory
        return None
    kind = SAMPLE_FORMATS.get(sample_format, 'of a special format')
    apart = ', each apart' if directory.get(PLANAR_CONFIGURATION) == SEPARATE else ''
    return f'{numbers}, {kind}{apart}'
