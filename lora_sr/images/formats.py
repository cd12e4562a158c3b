"""Images from files: pixels of 8 and 16 bits as they are stored, with what describes their colors."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from lora_sr.errors import InputError
from lora_sr.images import metadata as extras
from lora_sr.images import tiff
from lora_sr.images.metadata import Metadata, split_chunks
from lora_sr.images.modes import ALPHA_MODES, GRAY_MODES, MODES_OF_8_BITS
from lora_sr.images.png import PNG_SIGNATURE, PNGError, read_chunks, write_chunks
from lora_sr.images.tags import (
    ASSOCIATED,
    BITS_PER_SAMPLE,
    EXIF_IFD,
    EXTRA_SAMPLES,
    GPS_IFD,
    INTEROPERABILITY_IFD,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR_CONFIGURATION,
    SAMPLE_FORMAT,
    SIGNED,
    UNSPECIFIED,
    X_RESOLUTION,
    Y_RESOLUTION,
)

# Format -> the suffixes of its files; the first is what a new file gets.
FORMATS = {'png': ('.png',), 'jpeg': ('.jpg', '.jpeg', '.jpe', '.jfif'), 'webp': ('.webp',), 'tiff': ('.tif', '.tiff')}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
BEGINNINGS = (PNG_SIGNATURE, b'\xff\xd8', b'RIFF', b'II', b'MM')
MOST_BYTES = (1 << 31) - 1  # of a file, as many as OpenCV takes
READABLE = ('PNG', 'JPEG', 'WEBP', 'TIFF')
# What a TIFF says of a picture, and not of how its pixels are stored: description, make, model, orientation,
# resolution (X, Y and unit), software, date and time, artist, copyright.
DESCRIPTIVE_TAGS = (270, 271, 272, ORIENTATION, 282, 283, 296, 305, 306, 315, 33432, EXIF_IFD, GPS_IFD)


@dataclass(frozen=True)
class Picture:
    """What an image file holds.

    Args:
        pixels: uint8 or uint16 of shape (height, width, channels), over the whole range of the type: gray, gray and
            alpha, RGB, or RGB and alpha (1 to 4 channels). They stand upright: the orientation was applied.
        icc_profile: The color profile.
        exif: EXIF, tag -> value, with the tags of the inner directories as dictionaries under 34665 and 34853. An
            orientation in it is 1. There is no thumbnail.
        metadata: What the file tells besides.
        has_alpha: Whether a second or fourth channel is alpha; one of a TIFF may be anything.
    """

    pixels: np.ndarray
    icc_profile: bytes | None = None
    exif: dict[int, Any] = field(default_factory=dict)
    metadata: Metadata = field(default_factory=Metadata)
    has_alpha: bool = True


def format_of(path: str | os.PathLike[str]) -> str | None:
    """The format that a file's suffix stands for, a key of ``FORMATS``; ``None`` for others."""
    suffix = Path(path).suffix.lower()
    return next((name for name, suffixes in FORMATS.items() if suffix in suffixes), None)


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a PNG, JPEG, WebP or TIFF file; its bytes tell which, not its name.

    Palettes become RGB, images of 1, 2 and 4 bits gray of 8 bits, and a transparent color an alpha channel. Colors that
    are multiplied by alpha, as in a TIFF with associated alpha, are divided by it.

    Raises:
        InputError: The file cannot be read, is none of these, is damaged or cut short; it holds an animation or several
            pages; its pixels are of another kind: CMYK, Lab, floating point, 32 bits; it needs more memory than there
            is; or it has more pixels than Pillow reads, twice ``PIL.Image.MAX_IMAGE_PIXELS``, or compressed texts and a
            profile of more than ``png.MOST_INFLATED`` bytes.
    """
    data = b''
    try:
        try:
            with open(path, 'rb') as file:
                size, beginning = os.fstat(file.fileno()).st_size, file.read(len(PNG_SIGNATURE))
                is_image = beginning.startswith(BEGINNINGS)
                if is_image and size <= MOST_BYTES:  # what is no image may be of any size
                    data = beginning + file.read()
        except OSError as error:
            raise InputError(f'{path} cannot be read: {error.strerror}.') from None
        if not is_image:
            raise UnidentifiedImageError
        if not data:
            raise InputError(f'{path} must be an image of less than 2 GiB, got {size / (1 << 30):.1f} GiB.')
        if data.startswith(PNG_SIGNATURE):
            return _decode_png(data, path)
        folded = tiff.fold_gray_alpha(data)
        data = data if folded is None else folded.data
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            return _decode(image, data, path, folded)
    except InputError:
        raise
    except PNGError as error:
        raise InputError(f'{path} {error}.') from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # never 0 here: without a limit there is no such error
        raise InputError(f'{path} has more than {most} pixels, the most that are read.') from None
    except UnidentifiedImageError:
        kind = tiff.describe(data) if data else None
        if kind is not None:
            raise InputError(f'{path} must be gray or RGB of 8 or 16 bits, got {kind}: convert it first.') from None
        raise InputError(f'{path} is not a PNG, JPEG, WebP or TIFF image, or its beginning is damaged.') from None
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, MemoryError) or getattr(error, 'code', None) == cv2.Error.StsNoMem:
            raise InputError(f'{path} needs more memory than there is.') from None
        raise InputError(f'{path} is damaged: {str(error).rstrip(".") or type(error).__name__}.') from None


def _decode_png(data: bytes, path: str | os.PathLike[str]) -> Picture:
    chunks = read_chunks(data)
    metadata, icc_profile, chunks = split_chunks(chunks)
    depth, color_type = chunks[0][1][8:10]
    transparent = None
    if color_type in (0, 2):  # OpenCV does not heed it in gray of 16 bits, nor Pillow in gray of 2 and 4
        transparent = next((content for name, content in chunks if name == b'tRNS'), None)
        chunks = [chunk for chunk in chunks if chunk[0] != b'tRNS']
    data = write_chunks(chunks)
    with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
        _refuse_several(image, path)
        orientation, exif, lost = _read_exif(image)
        if ORIENTATION not in exif:
            orientation = extras.xmp_orientation(metadata.xmp)
        if depth == 16:
            pixels = _decode_16_bits(data, path)
            if color_type == 4:  # gray and alpha, which OpenCV gives as BGR and alpha
                pixels = pixels[:, :, [0, 3]]
        else:
            pixels = _decode_8_bits(image)
    if transparent is not None:
        pixels = _with_alpha(pixels, transparent, depth)
    metadata = replace(
        metadata,
        resolution=metadata.resolution or extras.exif_resolution(exif),
        lost=metadata.lost | lost,
    )
    pixels, metadata = _turn(pixels, orientation), extras.upright(metadata, orientation)
    return Picture(np.ascontiguousarray(pixels), icc_profile, _turn_exif(exif, orientation), metadata)


def _with_alpha(pixels: np.ndarray, transparent: bytes, depth: int) -> np.ndarray:
    """Add an alpha channel, 0 where the color is the transparent one (tRNS of a PNG, of gray or RGB).

    Args:
        pixels: (H, W, 1 or 3).
        transparent: Two bytes for each channel, of which the lowest ``depth`` bits count.
        depth: Bits of the file: 1, 2, 4, 8 or 16.
    """
    colors = pixels.shape[2]
    if len(transparent) != 2 * colors:
        raise PNGError(f'is damaged: its transparent color has {len(transparent)} bytes, where {2 * colors} are right')
    peak = np.iinfo(pixels.dtype).max
    most = (1 << depth) - 1
    color = np.frombuffer(transparent, '>u2').astype(int) & most
    is_seen = (pixels != color * (peak // most)).any(2, keepdims=True)
    return np.concatenate([pixels, is_seen * pixels.dtype.type(peak)], 2)


def _decode(image: Image.Image, data: bytes, path: str | os.PathLike[str], folded: tiff.GrayAlpha | None) -> Picture:
    """A JPEG, WebP or TIFF."""
    _refuse_several(image, path)
    # A block of 64 pixels takes a bit at least; what is missing libjpeg makes up.
    if image.format == 'JPEG' and len(data) * 8 * 64 < image.width * image.height:
        raise InputError(f'{path} is damaged: it is far too short for {image.width} x {image.height} pixels.')
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    icc_profile = image.info.get('icc_profile')
    if not isinstance(icc_profile, bytes):  # a tag of a TIFF may be of any type
        icc_profile = None
    orientation, exif, lost = _read_exif(image)
    metadata = extras.read_metadata(image, exif)
    extra_samples = tags.get(EXTRA_SAMPLES, ()) if folded is None else folded.extra_samples
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise InputError(f'{path} must be gray or RGB of 8 or 16 bits, got {tiff.describe(data)}: convert it first.')
    is_deep = 16 in tags.get(BITS_PER_SAMPLE, ())
    if tags.get(PLANAR_CONFIGURATION) == 2 and (
        is_deep or (extra_samples and (image.mode in GRAY_MODES or extra_samples[0] == ASSOCIATED))
    ):
        kind = '16 bits' if is_deep else '8 bits with alpha'
        raise InputError(f'{path} must have interleaved colors, got each color apart, in {kind}.')
    if is_deep:
        turned_by_opencv = ORIENTATION in tags  # and not where XMP alone tells it
        image.load()  # strict where OpenCV is not
        pixels = _decode_16_bits(data, path)
        if folded is not None:
            orientation = folded.orientation
            pixels = _turn(folded.unfold(pixels), orientation)
        elif not turned_by_opencv:
            pixels = _turn(pixels, orientation)
        if tags.get(PHOTOMETRIC) == 0:  # white is zero
            pixels = 65535 - pixels
        if extra_samples[:1] == (ASSOCIATED,):
            pixels = _divided_by_alpha(pixels)
    elif image.mode in MODES_OF_8_BITS:
        pixels = _decode_8_bits(image, is_turned=True)
    else:
        raise InputError(
            f'{path} must be gray or RGB of 8 or 16 bits, got pixels of the kind {image.mode}: convert it first.'
        )
    if len(extra_samples) > (pixels.shape[2] in (2, 4)):
        lost |= {'channels that are not alpha'}
    metadata = extras.upright(replace(metadata, lost=metadata.lost | lost), orientation)
    has_alpha = extra_samples[:1] != (UNSPECIFIED,)
    return Picture(np.ascontiguousarray(pixels), icc_profile, _turn_exif(exif, orientation), metadata, has_alpha)


def _refuse_several(image: Image.Image, path: str | os.PathLike[str]) -> None:
    frames = getattr(image, 'n_frames', 1)
    if frames > 1 and image.format != 'MPO':  # a JPEG with previews, or both eyes' views
        raise InputError(f'{path} must hold one picture, got {frames}: take them apart first.')


def _decode_8_bits(image: Image.Image, is_turned: bool = False) -> np.ndarray:
    """uint8 (H, W, C), as it is stored, or turned by its EXIF orientation."""
    image.load()
    is_gray = image.mode in GRAY_MODES
    has_alpha = image.mode in ALPHA_MODES or 'transparency' in image.info
    image = ImageOps.exif_transpose(image) if is_turned else image  # Pillow turns a TIFF as it loads it
    pixels = np.asarray(image.convert(('L' if is_gray else 'RGB') + ('A' if has_alpha else '')))
    return pixels.reshape(*pixels.shape[:2], -1)


def _divided_by_alpha(pixels: np.ndarray) -> np.ndarray:
    """Colors of uint16 (H, W, 2 or 4) as they are without alpha; black where it is 0."""
    alpha = pixels[:, :, -1:].astype(np.uint64)
    colors = (pixels[:, :, :-1] * np.uint64(65535) + alpha // 2) // np.maximum(alpha, 1)
    colors = np.where(alpha > 0, np.minimum(colors, 65535), 0).astype(np.uint16)
    return np.concatenate([colors, pixels[:, :, -1:]], 2)


def _decode_16_bits(data: bytes, path: str | os.PathLike[str]) -> np.ndarray:
    """uint16 (H, W, C), RGB; Pillow has 8 bits for each of three colors alone."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise InputError(f'{path} is damaged, or has pixels of another kind than whole numbers of 16 bits.')
    if pixels.ndim == 2:
        return pixels[:, :, None]
    return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    # A copy, since numpy calls an axis of one pixel contiguous in any direction, which torch does not.
    return pixels if orientation == 1 else pixels.copy()


def _read_exif(image: Image.Image) -> tuple[int, dict[int, Any], frozenset[str]]:
    """The orientation, the tags as :class:`Picture` has them, and what is lost: all where they are damaged."""
    try:
        exif = image.getexif()
        orientation = exif.get(ORIENTATION, 1)
        tags = {tag: value for tag, value in exif.items() if tag not in (EXIF_IFD, GPS_IFD)}
        for directory in (EXIF_IFD, GPS_IFD):
            inner = dict(exif.get_ifd(directory))
            inner.pop(INTEROPERABILITY_IFD, None)  # a place in the file that was read
            if inner:
                tags[directory] = inner
        if image.format == 'TIFF':
            tags = {tag: value for tag, value in tags.items() if tag in DESCRIPTIVE_TAGS}
        if ORIENTATION in tags:
            tags[ORIENTATION] = 1
        exif_block(tags)
    except Exception:  # EXIF is often damaged, in ways that concern nothing but EXIF
        return 1, {}, frozenset({'damaged EXIF'})
    return orientation, tags, frozenset()


def _turn_exif(exif: Mapping[int, Any], orientation: int) -> dict[int, Any]:
    """The tags of pixels that were turned: the resolution changes sides with them."""
    exif = dict(exif)
    if orientation in (5, 6, 7, 8) and {X_RESOLUTION, Y_RESOLUTION} <= exif.keys():
        exif[X_RESOLUTION], exif[Y_RESOLUTION] = exif[Y_RESOLUTION], exif[X_RESOLUTION]
    return exif


def exif_block(tags: Mapping[int, Any]) -> bytes:
    """EXIF as bytes, which begin with ``Exif``."""
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes()
