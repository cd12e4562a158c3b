"""Images to files. They are compressed in blocks of rows, so that none has to be in memory as a whole."""

from __future__ import annotations

import io
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import IO, Any

import cv2
import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from lora_sr.errors import InputError
from lora_sr.images import jpeg2000, tags
from lora_sr.images import metadata as extras
from lora_sr.images.blocks import Block, Run, encoded
from lora_sr.images.bmp import bmp_header
from lora_sr.images.formats import NAMES, Picture, bare_exif_block, exif_block, has_avif
from lora_sr.images.modes import swap_red_and_blue
from lora_sr.images.png_writing import write_png
from lora_sr.images.tga import tga_footer, tga_header
from lora_sr.images.tiff_writing import write_tiff

# Pixels: of libjpeg, of WebP's 14 bits, of TGA's 16 bits, and of what AVIF is read by.
LARGEST_SIDE = {'jpeg': 65500, 'webp': 16383, 'tga': 65535, 'avif': 32768}
MOST_BMP_BYTES = (1 << 32) - (1 << 24)  # of pixels: the rest is left to the header and a profile
PILLOW_NAMES = {'jp2': 'jpeg2000'}  # where they are others than ours
DEEP_FORMATS = ('png', 'tiff', 'jp2', 'j2k')  # that hold 16 bits
LOSSLESS = 100  # the quality at which WebP and JPEG 2000 are lossless
# PSNR of JPEG 2000 in dB at quality 0, and by how much it grows with each step: near that of JPEG.
PSNR_AT_ZERO, PSNR_PER_STEP = 18, 0.3
OPENCV_LOSSLESS = (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000)
SMALLEST_OF_OPENCV = 32  # pixels a side of JPEG 2000: it halves five times
JPEG_BLOCK = 8  # pixels a side, without subsampling
LONGEST_RESTART_INTERVAL = (1 << 16) - 1  # in such blocks (ITU-T T.81, B.2.4.4)
FRAME, RESTART, START_OF_SCAN, RESTART_INTERVAL = 0xC0, 0xD0, 0xDA, 0xDD  # markers; of restart the first of eight

RESOLUTION_TAGS = (tags.X_RESOLUTION, tags.Y_RESOLUTION, tags.RESOLUTION_UNIT)


def check_format(file_format: str, dtype: np.dtype, height: int, width: int, channels: int) -> None:
    """See that a format holds such pixels, before there are any.

    Args:
        file_format: A key of ``FORMATS``.
        dtype: uint8, uint16 or float32.
        height: Pixels.
        width: Pixels.
        channels: 1 to 4, see :class:`Picture`.

    Raises:
        InputError: It cannot hold 16 bits, an alpha channel, or sides of that length; or Pillow does not write it.
    """
    stored = _stored_type(dtype, file_format)
    if stored == np.uint16 and file_format not in DEEP_FORMATS:
        raise InputError(f'{NAMES[file_format]} cannot hold 16 bits: PNG, TIFF and JPEG 2000 can.')
    if file_format == 'jpeg' and channels in (2, 4):
        raise InputError('JPEG cannot hold an alpha channel: PNG, for one, can.')
    if file_format == 'avif' and not has_avif():
        raise InputError(f'AVIF must be written by Pillow 11.3 or later, with AVIF, got {pillow_version}.')
    if (
        file_format in ('jp2', 'j2k')
        and stored == np.uint16
        and channels > 1
        and min(height, width) < SMALLEST_OF_OPENCV
    ):
        raise InputError(
            f'JPEG 2000 of 16 bits with colors or alpha must have {SMALLEST_OF_OPENCV} pixels or more a side, got '
            f'{width} x {height}: PNG and TIFF hold it.'
        )
    if file_format == 'bmp' and height * (width * (4 if channels == 2 else channels) + 3) > MOST_BMP_BYTES:
        raise InputError(f'BMP cannot hold {width} x {height} pixels, as it ends at 4 GiB: PNG can (--format png).')
    longest = LARGEST_SIDE.get(file_format)
    if longest is not None and max(height, width) > longest:
        raise InputError(
            f'{NAMES[file_format]} cannot hold {width} x {height} pixels, as it ends at {longest} a side: PNG can '
            '(--format png).'
        )


def encode_picture(picture: Picture, file_format: str, quality: int) -> bytes:
    """The bytes of an image file, see :func:`write_picture`."""
    file = io.BytesIO()
    write_picture(file, picture, [picture.pixels], picture.pixels.shape[:2], file_format, quality)
    return file.getvalue()


def write_picture(
    file: IO[bytes],
    picture: Picture,
    bands: Iterable[np.ndarray],
    size: tuple[int, int],
    file_format: str,
    quality: int,
    run: Run = map,
) -> None:
    """Write an image file.

    The rows of PNG, TIFF, JPEG, BMP and TGA are forgotten as they are written; WebP, JPEG 2000 and AVIF want them all.

    Args:
        file: Open for writing at its beginning, where it can be sought.
        picture: What describes the pixels, and pixels of the type and the channels that are written. Sizes in its EXIF
            are set to those that are written.
        bands: The pixels from top to bottom, each (rows, width, channels) of any number of rows.
        size: Height and width of them all.
        file_format: A key of ``FORMATS``. WebP knows no gray, and gets three equal channels; so does gray with alpha in
            BMP, TGA and AVIF, and beyond 8 bits in JPEG 2000 and TIFF, as few programs read gray there. A gray ICC
            profile is left out of these. Floating point stays so in TIFF; elsewhere it is clipped to [0, 1] and
            rounded, to 16 bits in PNG and JPEG 2000, and to 8 bits in the others.
        quality: 1 to 100, of JPEG and AVIF, whose colors have full resolution (4:4:4), of WebP and JPEG 2000, which are
            lossless at 100. 16 bits of JPEG 2000 are lossless in any case.
        run: Does what `map` does, e.g. in threads, with the blocks of a band.

    Raises:
        InputError: The format cannot hold 16 bits, an alpha channel, or so many pixels.
    """
    height, width = size
    channels = picture.pixels.shape[2]
    check_format(file_format, picture.pixels.dtype, height, width, channels)
    exif, metadata = _with_size(picture.exif, height, width), picture.metadata
    if metadata.xmp:
        metadata = replace(metadata, xmp=extras.xmp_with_size(metadata.xmp, height, width))
    icc_profile = None if _loses_profile(picture, file_format) else picture.icc_profile
    stored, makes_colors = _stored_type(picture.pixels.dtype, file_format), _makes_colors(picture.pixels, file_format)

    def as_stored(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels if pixels.dtype == stored else _rounded(pixels, stored)
        return pixels[:, :, [0, 0, 0, 1][: channels + 2]] if makes_colors else pixels

    picture = Picture(as_stored(picture.pixels[:1]), icc_profile, exif, metadata, picture.has_alpha)
    bands = map(as_stored, bands)
    if file_format == 'png':
        write_png(file, picture, bands, size, run)
    elif file_format == 'tiff':
        write_tiff(file, picture, bands, size, run)
    elif file_format == 'jpeg':
        _write_jpeg(file, picture, bands, size, quality, run)
    elif file_format == 'bmp':
        _write_bmp(file, picture, bands, size)
    elif file_format == 'tga':
        _write_tga(file, picture, bands, size)
    elif file_format in ('jp2', 'j2k'):
        _write_jpeg2000(file, picture, bands, file_format, quality)
    else:
        _write_webp_or_avif(file, picture, bands, file_format, quality)


def kinds_left_out(picture: Picture, file_format: str) -> list[str]:
    """What :func:`write_picture` leaves out of a file, or was left out when it was read, by names for the user."""
    loses_profile = _loses_profile(picture, file_format)
    has_profile = picture.icc_profile is not None
    kinds = extras.kinds_left_out(picture.metadata, file_format, has_profile)
    if loses_profile:
        kinds = kinds - {'a color profile'} | {'a gray color profile'}
    # Of an upright picture its orientation tells nothing, and resolution is kept by itself.
    if 'EXIF' not in extras.HELD[file_format] and picture.exif.keys() - {tags.ORIENTATION, *RESOLUTION_TAGS}:
        kinds.add('EXIF')
    return sorted(kinds, key=str.lower)


def _stored_type(dtype: np.dtype, file_format: str) -> np.dtype:
    """The type of the pixels in a file."""
    if dtype != np.float32 or file_format == 'tiff':
        return np.dtype(dtype)
    return np.dtype(np.uint16 if file_format in DEEP_FORMATS else np.uint8)


def _rounded(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floating point as whole numbers over the whole range of a type."""
    values = pixels.clip(0, 1)  # in place from here on: a band may be large
    values *= np.iinfo(dtype).max
    return values.round(out=values).astype(dtype)


def _makes_colors(pixels: np.ndarray, file_format: str) -> bool:
    """Whether gray is written as three channels."""
    channels = pixels.shape[2]
    if file_format == 'webp':
        return channels < 3
    without_gray_alpha = ('bmp', 'tga', 'avif') if pixels.dtype == np.uint8 else NAMES.keys() - {'png'}
    return channels == 2 and file_format in without_gray_alpha


def _loses_profile(picture: Picture, file_format: str) -> bool:
    profile = picture.icc_profile
    is_gray = profile is not None and profile[16:20] == b'GRAY'  # the color space of the data (ICC.1, section 7.2)
    # The gray of a BMP is a palette of colors.
    return is_gray and (file_format == 'bmp' or _makes_colors(picture.pixels, file_format))


def _with_size(exif: Mapping[int, Any], height: int, width: int) -> dict[int, Any]:
    """The tags with sizes of these pixels where they have any, without a description that is a size."""
    exif = dict(exif)
    if str(exif.get(tags.IMAGE_DESCRIPTION, '')).startswith('{"shape": '):  # tifffile's, of the pixels before
        del exif[tags.IMAGE_DESCRIPTION]
    if tags.EXIF_IFD in exif:
        exif[tags.EXIF_IFD] = dict(exif[tags.EXIF_IFD])
    for directory, of_width, of_height in (
        (exif, tags.IMAGE_WIDTH, tags.IMAGE_LENGTH),
        (exif.get(tags.EXIF_IFD, {}), tags.PIXEL_X_DIMENSION, tags.PIXEL_Y_DIMENSION),
    ):
        directory.update({tag: value for tag, value in ((of_width, width), (of_height, height)) if tag in directory})
    return exif


# --- BMP and TGA ---


def _write_bmp(file: IO[bytes], picture: Picture, bands: Iterable[np.ndarray], size: tuple[int, int]) -> None:
    """Pillow writes no alpha that it reads again, and no profile."""
    height, width = size
    profile = picture.icc_profile
    header, row_bytes = bmp_header(height, width, picture.pixels.shape[2], picture.metadata.resolution, profile)
    file.write(header)
    _write_from_below(file, bands, height, row_bytes)
    file.write(profile or b'')


def _write_tga(file: IO[bytes], picture: Picture, bands: Iterable[np.ndarray], size: tuple[int, int]) -> None:
    height, width = size
    channels = picture.pixels.shape[2]
    file.write(tga_header(height, width, channels))
    _write_from_below(file, bands, height, width * channels)
    file.write(tga_footer())


def _write_from_below(file: IO[bytes], bands: Iterable[np.ndarray], height: int, row_bytes: int) -> None:
    """Write rows of BGR from the lowest up, as every program reads them, though they come from the highest down."""
    start = file.tell()
    end = start + height * row_bytes
    below = end
    for band in bands:
        rows = np.zeros((len(band), row_bytes), np.uint8)
        colors = swap_red_and_blue(band[::-1]) if band.shape[2] > 2 else band[::-1]
        rows[:, : colors[0].size] = colors.reshape(len(band), -1)
        below -= rows.size
        file.seek(below)
        file.write(rows.data)
    file.seek(end)


# --- Pillow: JPEG, WebP, AVIF and JPEG 2000 ---


def _write_jpeg(
    file: IO[bytes],
    picture: Picture,
    bands: Iterable[np.ndarray],
    size: tuple[int, int],
    quality: int,
    run: Run,
) -> None:
    """A JPEG, or of a large image several in one scan, with restart markers between them (ITU-T T.81, E.1.4)."""
    height, width = size
    blocks_across = -(-width // JPEG_BLOCK)
    blocks_down = LONGEST_RESTART_INTERVAL // blocks_across
    rows, interval = blocks_down * JPEG_BLOCK, blocks_down * blocks_across
    options = {'quality': quality, 'subsampling': 0}

    def encode(block: Block) -> bytes:
        if not block.is_first:
            return _encode_by_pillow(block.pixels, 'jpeg', options)
        return extras.with_segments(
            _encode_by_pillow(block.pixels, 'jpeg', {**options, **_described(picture)}), picture.metadata
        )

    for number, jpeg in enumerate(encoded(encode, bands, height, rows, run)):
        starts = _segments(jpeg)
        scan = starts[START_OF_SCAN] + 2 + struct.unpack_from('>H', jpeg, starts[START_OF_SCAN] + 2)[0]
        if number:
            file.write(bytes([0xFF, RESTART + (number - 1) % 8]))
        else:
            head = bytearray(jpeg[:scan])
            struct.pack_into('>H', head, starts[FRAME] + 5, height)
            if rows < height:
                at = starts[START_OF_SCAN]
                head[at:at] = struct.pack('>BBHH', 0xFF, RESTART_INTERVAL, 4, interval)
            file.write(head)
        file.write(jpeg[scan:-2])
    file.write(jpeg[-2:])  # the end of an image


def _segments(jpeg: bytes) -> dict[int, int]:
    """Marker -> start of its segment, up to the header of the scan."""
    starts: dict[int, int] = {}
    start = 2
    while START_OF_SCAN not in starts:
        marker, length = struct.unpack_from('>xBH', jpeg, start)
        starts[marker] = start
        start += 2 + length
    return starts


def _write_webp_or_avif(
    file: IO[bytes], picture: Picture, bands: Iterable[np.ndarray], file_format: str, quality: int
) -> None:
    exif = {**picture.exif, **extras.resolution_tags(picture.metadata.resolution)}
    options = _described(replace(picture, exif=exif))
    if file_format == 'avif':
        options.update(quality=quality, subsampling='4:4:4' if picture.pixels.shape[2] > 1 else '4:0:0')
    else:
        options.update({'lossless': True} if quality == LOSSLESS else {'quality': quality})
        options['exact'] = True  # the colors under alpha 0 as well
    if picture.metadata.xmp:
        options['xmp'] = picture.metadata.xmp
    file.write(_encode_by_pillow(np.concatenate(list(bands)), file_format, options))


def _write_jpeg2000(
    file: IO[bytes], picture: Picture, bands: Iterable[np.ndarray], file_format: str, quality: int
) -> None:
    """A JP2 file, or of it the pixels alone. Pillow writes no colors of 16 bits, and OpenCV no gray with alpha."""
    pixels = np.concatenate(list(bands))
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        encoded = _encode_by_opencv(swap_red_and_blue(pixels))
    else:
        options: dict[str, Any] = {}
        if quality != LOSSLESS and pixels.dtype == np.uint8:
            psnr = PSNR_AT_ZERO + PSNR_PER_STEP * quality
            options = {'irreversible': True, 'quality_mode': 'dB', 'quality_layers': [psnr]}
        options['mct'] = int(pixels.shape[2] == 3)
        encoded = _encode_by_pillow(pixels, 'jp2', options)
    if file_format == 'j2k':
        file.write(jpeg2000.codestream_of(encoded))
        return
    exif = bare_exif_block(picture.exif)
    file.write(jpeg2000.with_boxes(encoded, picture.icc_profile, exif, picture.metadata))


def _encode_by_opencv(pixels: np.ndarray) -> bytes:
    """A lossless JP2 file."""
    try:
        written, encoded = cv2.imencode('.jp2', pixels, OPENCV_LOSSLESS)
    except cv2.error:  # it was built without JPEG 2000, or lacks memory
        written = False
    if not written:
        raise InputError('JPEG 2000 cannot hold it: OpenCV does not encode it.')
    return encoded.tobytes()


def _described(picture: Picture) -> dict[str, Any]:
    """What Pillow is told besides the pixels."""
    options: dict[str, Any] = {}
    if picture.icc_profile:
        options['icc_profile'] = picture.icc_profile
    if picture.exif:
        options['exif'] = exif_block(picture.exif)
    return options


def _encode_by_pillow(pixels: np.ndarray, file_format: str, options: Mapping[str, Any]) -> bytes:
    name = PILLOW_NAMES.get(file_format, file_format)
    with _file_in_memory() as file:
        try:
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, name, **options)
        except (OSError, ValueError) as error:
            raise InputError(f'{NAMES[file_format]} cannot hold it: {str(error).rstrip(".")}.') from None
        file.seek(0)
        return file.read()


def _file_in_memory() -> IO[bytes]:
    """A file without a name: Pillow lets other threads run while it encodes JPEG into a file, not into ``BytesIO``."""
    if hasattr(os, 'memfd_create'):  # Linux
        return os.fdopen(os.memfd_create('image'), 'w+b')
    return tempfile.TemporaryFile()
