"""Images from files: pixels as they are stored, of 8 bits, 16 bits and floating point, with what describes them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL import __version__ as pillow_version
from PIL.TiffImagePlugin import TiffImageFile

from lora_sr.errors import InputError
from lora_sr.images import metadata as extras
from lora_sr.images import tga, tiff
from lora_sr.images.avif import is_box_file, read_avif
from lora_sr.images.bmp import BMP_SIGNATURE, read_bmp
from lora_sr.images.jpeg2000 import CODESTREAM_SIGNATURE, JP2_SIGNATURE, JPEG2000, plain_jp2, read_jpeg2000
from lora_sr.images.metadata import EXIF_HEADER, Metadata, split_chunks
from lora_sr.images.modes import ALPHA_MODES, GRAY_MODES, MODES_OF_8_BITS, swap_red_and_blue
from lora_sr.images.png import PNG_SIGNATURE, read_chunks, write_chunks
from lora_sr.images.tags import (
    ARTIST,
    ASSOCIATED,
    COPYRIGHT,
    DATE_TIME,
    EXIF_IFD,
    EXTRA_SAMPLES,
    GPS_IFD,
    IMAGE_DESCRIPTION,
    INTEROPERABILITY_IFD,
    MAKE,
    MODEL,
    ORIENTATION,
    RESOLUTION_UNIT,
    SAMPLE_FORMAT,
    SIGNED,
    SOFTWARE,
    UNSPECIFIED,
    X_RESOLUTION,
    Y_RESOLUTION,
)
from lora_sr.images.unreadable import UnreadableImage

# Format -> the suffixes of its files; the first is what a new file gets.
FORMATS = {
    'png': ('.png',),
    'jpeg': ('.jpg', '.jpeg', '.jpe', '.jfif'),
    'webp': ('.webp',),
    'tiff': ('.tif', '.tiff'),
    'bmp': ('.bmp', '.dib'),
    'tga': ('.tga',),
    'jp2': ('.jp2', '.jpx', '.jpf'),
    'j2k': ('.j2k', '.j2c', '.jpc'),  # of JPEG 2000 the pixels alone
    'avif': ('.avif',),
}
NAMES = {
    'png': 'PNG',
    'jpeg': 'JPEG',
    'webp': 'WebP',
    'tiff': 'TIFF',
    'bmp': 'BMP',
    'tga': 'TGA',
    'jp2': 'JPEG 2000',
    'j2k': 'JPEG 2000',
    'avif': 'AVIF',
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
BEGINNINGS = (
    *(PNG_SIGNATURE, b'\xff\xd8', b'RIFF', b'II', b'MM', BMP_SIGNATURE),
    *(JP2_SIGNATURE, CODESTREAM_SIGNATURE),
)
BEGINNING_BYTES = 32  # that tell the format
NO_IMAGE = 'is not a PNG, JPEG, WebP, TIFF, BMP, TGA, JPEG 2000 or AVIF image, or its beginning is damaged'
MOST_BYTES = (1 << 31) - 1  # of a file, as many as OpenCV takes
MOST_AVIF_PIXELS = 1 << 27  # which take 2 GB while they are decoded
READABLE = ('JPEG', 'WEBP', 'TIFF', 'BMP')
# What a TIFF says of a picture, and not of how its pixels are stored.
DESCRIPTIVE_TAGS = (
    *(IMAGE_DESCRIPTION, MAKE, MODEL, ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT, SOFTWARE, DATE_TIME),
    *(ARTIST, COPYRIGHT, EXIF_IFD, GPS_IFD),
)


@dataclass(frozen=True)
class Picture:
    """What an image file holds.

    Args:
        pixels: uint8 or uint16 of shape (height, width, channels), over the whole range of the type, or float32, black
            and white being 0 and 1: gray, gray and alpha, RGB, or RGB and alpha (1 to 4 channels). They stand upright:
            the orientation was applied.
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


def has_avif() -> bool:
    """Whether the Pillow that is installed reads and writes AVIF."""
    return 'avif' in features.get_supported_modules()


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF, BMP, TGA, JPEG 2000 or AVIF file; its bytes tell which, not its name.

    Palettes become RGB, images of 1, 2 and 4 bits gray of 8 bits, and a transparent color an alpha channel. Colors that
    are multiplied by alpha, as in a TIFF with associated alpha, are divided by it. Of AVIF 8 bits are read.

    Raises:
        InputError: The file cannot be read, is none of these, is damaged or cut short; it holds an animation or several
            pages; its pixels are of another kind: CMYK, Lab, whole numbers of 32 bits; values of a float TIFF are not
            finite; it needs more memory than there is; or it has more pixels than Pillow reads, twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, or compressed texts and a profile of more than ``png.MOST_INFLATED`` bytes.
    """
    data = b''
    try:
        try:
            with open(path, 'rb') as file:
                size, beginning = os.fstat(file.fileno()).st_size, file.read(BEGINNING_BYTES)
                is_image = beginning.startswith(BEGINNINGS) or is_box_file(beginning) or tga.is_tga(beginning)
                if is_image and size <= MOST_BYTES:  # what is no image may be of any size
                    data = beginning + file.read()
        except OSError as error:
            raise UnreadableImage(f'cannot be read: {error.strerror}') from None
        if not is_image:
            raise UnidentifiedImageError
        if not data:
            raise UnreadableImage(f'must be an image of less than 2 GiB, got {size / (1 << 30):.1f} GiB')
        return _read(data)
    except UnreadableImage as error:
        raise InputError(f'{path} {error}.') from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # never 0 here: without a limit there is no such error
        raise InputError(f'{path} has more than {most} pixels, the most that are read.') from None
    except UnidentifiedImageError:
        kind = tiff.describe(data) if data else None
        if kind is not None:
            raise InputError(f'{path} must be gray or RGB of 8 or 16 bits, got {kind}: convert it first.') from None
        raise InputError(f'{path} {NO_IMAGE}.') from None
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, MemoryError) or getattr(error, 'code', None) == cv2.Error.StsNoMem:
            raise InputError(f'{path} needs more memory than there is.') from None
        raise InputError(f'{path} is damaged: {str(error).rstrip(".") or type(error).__name__}.') from None


def _read(data: bytes) -> Picture:
    if data.startswith(PNG_SIGNATURE):
        return _decode_png(data)
    if data.startswith((JP2_SIGNATURE, CODESTREAM_SIGNATURE)):
        return _decode_jpeg2000(data)
    if tga.is_tga(data):
        return _decode_tga(data)
    is_avif = is_box_file(data)
    if is_avif and not has_avif():
        raise UnreadableImage(f'must be read by Pillow 11.3 or later, with AVIF, got {pillow_version}')
    folded = tiff.fold(data)
    formats = ('AVIF',) if is_avif else READABLE  # which an earlier Pillow does not know by name
    with Image.open(io.BytesIO(data if folded is None else folded.data), formats=formats) as image:
        return _decode(image, data, folded)


def _decode_png(data: bytes) -> Picture:
    chunks = read_chunks(data)
    metadata, icc_profile, chunks = split_chunks(chunks)
    depth, color_type = chunks[0][1][8:10]
    transparent = None
    if color_type in (0, 2):  # OpenCV does not heed it in gray of 16 bits, nor Pillow in gray of 2 and 4
        transparent = next((content for name, content in chunks if name == b'tRNS'), None)
        chunks = [chunk for chunk in chunks if chunk[0] != b'tRNS']
    data = write_chunks(chunks)
    with Image.open(io.BytesIO(data), formats=('PNG',)) as image:
        _refuse_several(image)
        orientation, exif, lost = _read_exif(image)
        if ORIENTATION not in exif:
            orientation = extras.xmp_orientation(metadata.xmp)
        if depth == 16:
            pixels = _decode_16_bits(data)
            if color_type == 4:  # gray and alpha, which OpenCV gives as BGR and alpha
                pixels = pixels[:, :, [0, 3]]
        else:
            pixels = _decode_8_bits(image)
    if transparent is not None:
        pixels = _with_alpha(pixels, transparent, depth)
    metadata = replace(metadata, lost=metadata.lost | lost)
    return _upright(Picture(_turn(pixels, orientation), icc_profile, exif, metadata), orientation)


def _with_alpha(pixels: np.ndarray, transparent: bytes, depth: int) -> np.ndarray:
    """Add an alpha channel, 0 where the color is the transparent one (tRNS of a PNG, of gray or RGB).

    Args:
        pixels: (H, W, 1 or 3).
        transparent: Two bytes for each channel, of which the lowest ``depth`` bits count.
        depth: Bits of the file: 1, 2, 4, 8 or 16.
    """
    colors = pixels.shape[2]
    if len(transparent) != 2 * colors:
        raise UnreadableImage(
            f'is damaged: its transparent color has {len(transparent)} bytes, where {2 * colors} are right'
        )
    peak = np.iinfo(pixels.dtype).max
    most = (1 << depth) - 1
    color = np.frombuffer(transparent, '>u2').astype(int) & most
    is_seen = (pixels != color * (peak // most)).any(2, keepdims=True)
    return np.concatenate([pixels, is_seen * pixels.dtype.type(peak)], 2)


def _decode(image: Image.Image, data: bytes, folded: tiff.Folded | None) -> Picture:
    """A JPEG, WebP, TIFF, BMP or AVIF."""
    _refuse_several(image)
    if image.format == 'AVIF' and image.width * image.height > MOST_AVIF_PIXELS:
        raise UnreadableImage(f'must have {MOST_AVIF_PIXELS} pixels or fewer, as AVIF')
    # A block of 64 pixels takes a bit at least; what is missing libjpeg makes up.
    if image.format == 'JPEG' and len(data) * 8 * 64 < image.width * image.height:
        raise UnreadableImage(f'is damaged: it is far too short for {image.width} x {image.height} pixels')
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    icc_profile = image.info.get('icc_profile')
    if not isinstance(icc_profile, bytes):  # a tag of a TIFF may be of any type
        icc_profile = None
    orientation, exif, lost = _read_exif(image)
    if image.format == 'BMP':
        icc_profile, metadata = read_bmp(data)
    else:
        metadata = extras.read_metadata(image)
        if image.format == 'AVIF':
            lost |= read_avif(data, has_profile=icc_profile is not None)
    extra_samples = tags.get(EXTRA_SAMPLES, ())
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise UnreadableImage(f'must be gray or RGB of 8 or 16 bits, got {tiff.describe(data)}: convert it first')
    if folded is not None:
        extra_samples = folded.extra_samples
        orientation = folded.orientation if ORIENTATION in tags else orientation  # where XMP alone tells it
        pixels = _turn(folded.pixels(), orientation)
        if extra_samples[:1] == (ASSOCIATED,):
            pixels = _divided_by_alpha(pixels)
    elif image.mode in MODES_OF_8_BITS:
        pixels = _decode_8_bits(image, is_turned=True)
    else:
        raise UnreadableImage(
            f'must be gray or RGB of 8 or 16 bits, got pixels of the kind {image.mode}: convert it first'
        )
    if len(extra_samples) > (pixels.shape[2] in (2, 4)):
        lost |= {'channels that are not alpha'}
    metadata = replace(metadata, lost=metadata.lost | lost)
    has_alpha = extra_samples[:1] != (UNSPECIFIED,)
    return _upright(Picture(pixels, icc_profile, exif, metadata, has_alpha), orientation)


def _decode_jpeg2000(data: bytes) -> Picture:
    described = read_jpeg2000(data)
    # Of the codestream alone: Pillow knows nothing of the order of channels, and of palettes not all.
    with Image.open(io.BytesIO(described.codestream), formats=('JPEG2000',)) as image:
        if described.exif:
            image.info['exif'] = EXIF_HEADER + described.exif
        orientation, exif, lost = _read_exif(image)
        if described.depth > 8:
            pixels = _decode_deep_jpeg2000(described)
        else:
            pixels = _decode_8_bit_jpeg2000(image, described)
    if described.order is not None:
        pixels = pixels[:, :, described.order]
    if described.is_ycc and pixels.shape[2] > 2:
        colors = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]), 'YCbCr').convert('RGB')
        pixels = np.concatenate([colors, pixels[:, :, 3:]], 2)
    if described.is_premultiplied:
        pixels = _divided_by_alpha(pixels)
    pixels, metadata = _turn(pixels, orientation), replace(described.metadata, lost=described.metadata.lost | lost)
    return _upright(Picture(pixels, described.icc_profile, exif, metadata, described.has_alpha), orientation)


def _decode_8_bit_jpeg2000(image: Image.Image, described: JPEG2000) -> np.ndarray:
    """uint8 (H, W, C), the channels as they come."""
    values = _decode_8_bits(image) >> (8 - described.depth)  # Pillow moves up what has fewer bits
    pixels = _over_whole_range(values, described.depth, np.uint8)
    if described.palette is None:
        return pixels
    colors = described.palette.colors
    indices = np.minimum(values, len(colors) - 1)
    return np.stack(
        [
            colors[indices[:, :, component], column] if is_mapped else pixels[:, :, component]
            for component, is_mapped, column in described.palette.mapping
        ],
        2,
    )


def _decode_deep_jpeg2000(described: JPEG2000) -> np.ndarray:
    """uint16 (H, W, C), the channels as they come; Pillow has 8 bits for each of several."""
    kinds = {
        'a palette': described.palette is not None,
        'sYCC': described.is_ycc,
        'gray and alpha': described.components == 2,
    }
    kind = next((kind for kind, is_there in kinds.items() if is_there), None)
    if kind is not None:
        raise UnreadableImage(f'must be gray or RGB of more than 8 bits, as JPEG 2000, got {kind}: convert it first')
    # OpenCV warns on stderr where colors are not told to be sRGB, and has no switch that threads do not share.
    return _over_whole_range(_decode_16_bits(plain_jp2(described.codestream)), described.depth, np.uint16)


def _over_whole_range(values: np.ndarray, depth: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Values of so many bits, rounded to the whole range of a type."""
    most, peak = (1 << depth) - 1, int(np.iinfo(dtype).max)
    return values if most == peak else ((values.astype(np.uint32) * peak + most // 2) // most).astype(dtype)


def _decode_tga(data: bytes) -> Picture:
    described = tga.read_tga(data)
    try:
        pixels, has_palette = _decode_tga_pixels(described.data)
    except OSError:
        pixels, has_palette = _decode_tga_pixels(tga.without_run_lengths(described.data))
    lost = described.lost
    if pixels.shape[2] in (2, 4):
        is_flat = (pixels[:, :, -1] == pixels[0, 0, -1]).all()
        if described.alpha_kind in (tga.NO_ALPHA, tga.MEANINGLESS) or (has_palette and is_flat):
            pixels = pixels[:, :, :-1]
            lost |= frozenset() if is_flat else {'channels that are not alpha'}
        elif described.alpha_kind == tga.PREMULTIPLIED:
            pixels = _divided_by_alpha(pixels)
    metadata = Metadata(lost=lost)
    return Picture(np.ascontiguousarray(pixels), metadata=metadata, has_alpha=described.alpha_kind != tga.KEPT)


def _decode_tga_pixels(data: bytes) -> tuple[np.ndarray, bool]:
    """uint8 (H, W, C), and whether they had a palette."""
    # Pillow looks for a footer at the end, and fails where there are fewer bytes than one has.
    with Image.open(io.BytesIO(data + bytes(tga.FOOTER.size)), formats=('TGA',)) as image:
        return _decode_8_bits(image), image.mode == 'P'


def _refuse_several(image: Image.Image) -> None:
    frames = getattr(image, 'n_frames', 1)
    if frames > 1 and image.format != 'MPO':  # a JPEG with previews, or both eyes' views
        raise UnreadableImage(f'must hold one picture, got {frames}: take them apart first')


def _decode_8_bits(image: Image.Image, is_turned: bool = False) -> np.ndarray:
    """uint8 (H, W, C), as it is stored, or turned by its EXIF orientation."""
    image.load()
    is_gray = image.mode in GRAY_MODES
    has_alpha = image.mode in ALPHA_MODES or 'transparency' in image.info or _palette_has_alpha(image)
    mode = ('L' if is_gray else 'RGB') + ('A' if has_alpha else '')
    if is_turned:
        ImageOps.exif_transpose(image, in_place=True)  # Pillow turns a TIFF as it loads it
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)


def _palette_has_alpha(image: Image.Image) -> bool:
    return image.mode == 'P' and image.palette is not None and image.palette.mode == 'RGBA'


def _divided_by_alpha(pixels: np.ndarray) -> np.ndarray:
    """Colors of (H, W, 2 or 4) as they are without alpha; black where it is 0."""
    alpha = pixels[:, :, -1:]
    if pixels.dtype == np.float32:
        colors = np.divide(pixels[:, :, :-1], alpha, out=np.zeros_like(pixels[:, :, :-1]), where=alpha > 0)
    else:
        alpha, peak = alpha.astype(np.uint64), np.uint64(np.iinfo(pixels.dtype).max)
        colors = (pixels[:, :, :-1] * peak + alpha // 2) // np.maximum(alpha, 1)
        colors = np.where(alpha > 0, np.minimum(colors, peak), 0).astype(pixels.dtype)
    return np.concatenate([colors, pixels[:, :, -1:]], 2)


def _decode_16_bits(data: bytes) -> np.ndarray:
    """uint16 (H, W, C), RGB; Pillow has 8 bits for each of three colors alone."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise UnreadableImage('is damaged, or has pixels of another kind than whole numbers of 16 bits')
    return pixels[:, :, None] if pixels.ndim == 2 else swap_red_and_blue(pixels)


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


def _upright(picture: Picture, orientation: int) -> Picture:
    """A picture whose pixels were turned by an EXIF orientation: what describes them turns with them.

    The resolution is that of EXIF where the file has none of its own.
    """
    resolution = picture.metadata.resolution or extras.exif_resolution(picture.exif)
    exif = dict(picture.exif)
    if orientation in (5, 6, 7, 8) and {X_RESOLUTION, Y_RESOLUTION} <= exif.keys():
        exif[X_RESOLUTION], exif[Y_RESOLUTION] = exif[Y_RESOLUTION], exif[X_RESOLUTION]
    metadata = extras.upright(replace(picture.metadata, resolution=resolution), orientation)
    return replace(picture, pixels=np.ascontiguousarray(picture.pixels), exif=exif, metadata=metadata)


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


def exif_block(tags: Mapping[int, Any]) -> bytes:
    """EXIF as bytes, which begin with ``Exif``."""
    exif = Image.Exif()
    for tag, value in tags.items():
        exif[tag] = value
    return exif.tobytes()


def bare_exif_block(tags: Mapping[int, Any]) -> bytes:
    """EXIF as PNG and JPEG 2000 hold it, without ``Exif``; empty where there are no tags."""
    return exif_block(tags).removeprefix(EXIF_HEADER) if tags else b''
