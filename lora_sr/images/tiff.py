"""TIFF as bytes: what Pillow and OpenCV do not read of it."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lora_sr.images.tags import (
    BITS_PER_SAMPLE,
    COMPRESSION,
    EXTRA_SAMPLES,
    IMAGE_WIDTH,
    LONG,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR_CONFIGURATION,
    PREDICTOR,
    SAMPLE_FORMAT,
    SAMPLES_PER_PIXEL,
    SHORT,
    TILE_WIDTH,
)

TIFF_SIGNATURES = (b'II*\0', b'MM\0*')
BIG_SIGNATURES = (b'II+\0', b'MM\0+')
BYTEWISE = ((1,), (5,), (8,), (32773,), (32946,))  # none, LZW, Deflate, PackBits, Deflate: they see no pixels
SAMPLE_FORMATS = {1: 'whole numbers', 2: 'whole numbers with signs', 3: 'floating point'}


@dataclass(frozen=True)
class GrayAlpha:
    """A TIFF of gray and alpha of 16 bits, as one of gray that is twice as wide: the two take turns.

    Args:
        data: That file, without predictor and orientation.
        extra_samples: What the second channel is, as the tag has it.
        orientation: As EXIF has it.
        white_is_zero: Whether gray has to be inverted.
        block: Width of the columns within which pixels are differences from their left neighbors; 0 where they are not.
    """

    data: bytes
    extra_samples: tuple[int, ...]
    orientation: int
    white_is_zero: bool
    block: int

    def unfold(self, wide: np.ndarray) -> np.ndarray:
        """uint16 (H, 2 * W, 1) as Pillow and OpenCV read it -> (H, W, 2)."""
        pixels = wide.reshape(len(wide), -1, 2)
        for start in range(0, pixels.shape[1], self.block) if self.block else ():
            columns = pixels[:, start : start + self.block]
            np.add.accumulate(columns, 1, np.uint16, columns)
        if self.white_is_zero:
            pixels[:, :, 0] = 65535 - pixels[:, :, 0]
        return pixels


def fold_gray_alpha(data: bytes) -> GrayAlpha | None:
    """Make a TIFF readable whose pixels are gray and alpha of 16 bits, side by side; ``None`` for all others."""
    if data[:4] not in TIFF_SIGNATURES:
        return None
    order = '<' if data[:2] == b'II' else '>'
    try:
        (start,) = struct.unpack_from(f'{order}I', data, 4)
        (count,) = struct.unpack_from(f'{order}H', data, start)
        entries = [list(struct.unpack_from(f'{order}HHI4s', data, start + 2 + 12 * i)) for i in range(count)]
        following = data[start + 2 + 12 * count :][:4]
    except struct.error:
        return None
    values = {tag: _values(order, *rest) for tag, *rest in entries}
    if (
        values.get(SAMPLES_PER_PIXEL) != (2,)
        or values.get(BITS_PER_SAMPLE) != (16, 16)
        or values.get(PHOTOMETRIC) not in ((0,), (1,))
        or values.get(PLANAR_CONFIGURATION, (1,)) != (1,)
        or set(values.get(SAMPLE_FORMAT, (1,))) != {1}
        or values.get(COMPRESSION, (1,)) not in BYTEWISE
        or values.get(PREDICTOR, (1,)) not in ((1,), (2,))
        or len(values.get(IMAGE_WIDTH, ())) != 1
        or len(following) < 4
    ):
        return None
    changed = {
        SAMPLES_PER_PIXEL: 1,
        BITS_PER_SAMPLE: 16,
        SAMPLE_FORMAT: 1,
        PREDICTOR: 1,
        ORIENTATION: 1,
        PHOTOMETRIC: 1,
    }
    changed.update({tag: 2 * values[tag][0] for tag in (IMAGE_WIDTH, TILE_WIDTH) if values.get(tag)})
    directory = b''
    for tag, kind, length, value in entries:
        if tag in changed:
            directory += struct.pack(f'{order}HHII', tag, LONG, 1, changed[tag])
        elif tag != EXTRA_SAMPLES:
            directory += struct.pack(f'{order}HHI4s', tag, kind, length, value)
    size = len(directory) // 12
    folded = bytearray(data)
    folded[start : start + 6 + 12 * size] = struct.pack(f'{order}H', size) + directory + following
    is_predicted = values.get(PREDICTOR) == (2,)
    return GrayAlpha(
        bytes(folded),
        values.get(EXTRA_SAMPLES, ()),
        (values.get(ORIENTATION) or (1,))[0],
        values[PHOTOMETRIC] == (0,),
        (values.get(TILE_WIDTH) or values[IMAGE_WIDTH])[0] if is_predicted else 0,
    )


def _values(order: str, kind: int, count: int, content: bytes) -> tuple[int, ...]:
    """Whole numbers that stand in the entry of a directory itself; none of others."""
    code = {SHORT: 'H', LONG: 'I'}.get(kind)
    if code is None or not 0 < count * struct.calcsize(f'={code}') <= 4:
        return ()
    return struct.unpack_from(f'{order}{count}{code}', content)


def describe(data: bytes) -> str | None:
    """The pixels of a TIFF in words; ``None`` for what is no TIFF, or damaged."""
    if data[:4] not in (*TIFF_SIGNATURES, *BIG_SIGNATURES):
        return None
    file = io.BytesIO(data)
    try:
        directory = ImageFileDirectory_v2(file.read(16 if data[:4] in BIG_SIGNATURES else 8))
        file.seek(directory.next)
        directory.load(file)
        bits = directory[BITS_PER_SAMPLE]
        samples = directory.get(SAMPLES_PER_PIXEL, 1)
        sample_format = directory.get(SAMPLE_FORMAT, (1,))[0]
    except Exception:  # Pillow raises what it likes for damaged directories
        return None
    kind = SAMPLE_FORMATS.get(sample_format, 'of a special format')
    apart = ', each apart' if directory.get(PLANAR_CONFIGURATION) == 2 else ''
    return f'{samples} channel{"s" if samples > 1 else ""} of {max(bits)} bits, {kind}{apart}'
