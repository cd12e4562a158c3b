"""What an image file tells besides pixels, color profile and EXIF: resolution, XMP, IPTC, comments, PNG's chunks."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from lora_sr.errors import printable
from lora_sr.images.png import MOST_INFLATED, inflate
from lora_sr.images.tags import BYTE, IPTC, RESOLUTION_UNIT, UNDEFINED, X_RESOLUTION, XMP, Y_RESOLUTION

TIFF_UNITS = {1: '', 2: 'inch', 3: 'cm'}
JFIF_UNITS = {0: '', 1: 'inch', 2: 'cm'}
INCHES = {'inch': 1.0, 'cm': 1 / 2.54, 'm': 1 / 0.0254}

# PNG (W3C recommendation, third edition): what says how numbers become colors, in the order in which it is heeded.
COLOR_CHUNKS = (b'cICP', b'iCCP', b'sRGB', b'gAMA', b'cHRM')
HDR_CHUNKS = (b'mDCV', b'cLLI')
TEXT_CHUNKS = (b'tEXt', b'zTXt', b'iTXt')
# What says how pixels are stored, and the time of the last change: no longer true of other pixels.
STORAGE_CHUNKS = (b'IHDR', b'PLTE', b'IDAT', b'IEND', b'tRNS', b'sBIT', b'hIST', b'sPLT', b'tIME', b'iDOT')
ANIMATION_CHUNKS = (b'acTL', b'fcTL', b'fdAT')
SRGB_CHUNKS = {  # in which an image without any of them is shown as well
    (b'cICP', b'\x01\x0d\x00\x01'),
    (b'gAMA', struct.pack('>I', 45455)),
    (b'cHRM', struct.pack('>8I', 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
}
# Format -> what it holds besides pixels.
HELD = {
    'png': {'EXIF', 'profile', 'XMP', 'resolution', 'ratio'},
    'jpeg': {'EXIF', 'profile', 'XMP', 'IPTC', 'comment', 'resolution', 'ratio'},
    'webp': {'EXIF', 'profile', 'XMP', 'resolution', 'ratio'},
    'tiff': {'EXIF', 'profile', 'XMP', 'IPTC', 'resolution', 'ratio'},
    'bmp': {'profile', 'resolution'},
    'tga': set[str](),
    'jp2': {'EXIF', 'profile', 'XMP', 'IPTC', 'resolution'},
    'j2k': set[str](),
    'avif': {'EXIF', 'profile', 'XMP', 'resolution', 'ratio'},
}
XMP_KEYWORD, EXIF_KEYWORDS = b'XML:com.adobe.xmp', (b'Raw profile type exif', b'Raw profile type APP1')

EXIF_HEADER = b'Exif\0\0'  # of JPEG's segment
XMP_HEADER, LONG_XMP_HEADER = b'http://ns.adobe.com/xap/1.0/\0', b'http://ns.adobe.com/xmp/extension/\0'
IPTC_RESOURCE = 0x0404  # of Photoshop's
LARGEST_RESOLUTION = 1e9  # beyond all that can be meant
LARGEST_SEGMENT = 65533  # bytes, of JPEG


class Resolution(NamedTuple):
    """Pixels per unit: 'inch', 'cm', 'm', or '' where only the ratio of the two is known."""

    x: float
    y: float
    unit: str

    def per(self, unit: str) -> Resolution:
        """The same in another unit; a ratio stays one."""
        if not self.unit:
            return self
        factor = INCHES[self.unit] ** -1 * INCHES[unit]
        return Resolution(self.x * factor, self.y * factor, unit)

    def whole(self) -> tuple[int, int]:
        """As whole numbers."""
        factor = 1 if self.unit or (self.x % 1 == 0 and self.y % 1 == 0) else 1000
        return round(self.x * factor), round(self.y * factor)


@dataclass(frozen=True)
class Metadata:
    """What is kept of a file where the format of the next one can hold it.

    Args:
        resolution: That of the file itself, or else of its EXIF; ``None`` where there is none.
        xmp: An XMP packet. An orientation in it is 1.
        iptc: An IPTC block.
        comment: That of a JPEG.
        chunks: Those of a PNG about colors and texts, (name, content), as they stood.
        lost: Kinds that are kept in no format, by names for the user.
    """

    resolution: Resolution | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    comment: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    lost: frozenset[str] = frozenset()


class PNGMetadata(NamedTuple):
    """What the chunks of a PNG hold, see :func:`split_chunks`."""

    metadata: Metadata
    icc_profile: bytes | None
    for_decoders: list[tuple[bytes, bytes]]


def split_chunks(chunks: Sequence[tuple[bytes, bytes]]) -> PNGMetadata:
    """Part the chunks of a PNG into metadata and what a decoder needs: pixels, EXIF, and whether it is an animation.

    Texts stay compressed; that bounds them, and no decoder's limit on them matters.

    Raises:
        UnreadableImage: Texts and profile would need more than ``MOST_INFLATED`` bytes.
    """
    depth, color_type = chunks[0][1][8:10]
    metadata, icc_profile, raw_exif, left = Metadata(), None, None, MOST_INFLATED
    for_decoders, kept, lost = [], [], set()
    for name, content in chunks:
        if name in (*STORAGE_CHUNKS, *ANIMATION_CHUNKS, b'eXIf'):
            for_decoders.append((name, content))
        elif name == b'iCCP':
            try:
                icc_profile = inflate(content.partition(b'\0')[2][1:], left)
                left -= len(icc_profile)
            except zlib.error:
                lost.add('a damaged color profile')
        elif name in TEXT_CHUNKS:
            keyword, text = _read_text(name, content, left)
            left -= len(text) if text is not None and name != b'tEXt' else 0
            if keyword == XMP_KEYWORD and text:
                metadata = replace(metadata, xmp=text)
                continue
            block = _raw_profile(text) if keyword in EXIF_KEYWORDS and text else b''
            if block.startswith(EXIF_HEADER):
                raw_exif = block[len(EXIF_HEADER) :]
            else:
                kept.append((name, content))
        elif name == b'pHYs' and len(content) == 9:
            x, y, unit = struct.unpack('>IIB', content)
            metadata = replace(metadata, resolution=resolution_of(x, y, 'm' if unit == 1 else ''))
        elif name in (*COLOR_CHUNKS, *HDR_CHUNKS) or (name == b'bKGD' and color_type != 3 and depth >= 8):
            kept.append((name, content))
        else:
            lost.add(f'PNG {printable(name.decode("latin-1"))}')
    if raw_exif and b'eXIf' not in dict(for_decoders):
        for_decoders.insert(1, (b'eXIf', raw_exif))
    return PNGMetadata(replace(metadata, chunks=tuple(kept), lost=frozenset(lost)), icc_profile, for_decoders)


def _read_text(name: bytes, content: bytes, most: int) -> tuple[bytes, bytes | None]:
    """Keyword and text of a chunk; ``None`` for a text that is damaged, which is kept as it is."""
    keyword, _, rest = content.partition(b'\0')
    if name == b'tEXt':
        return keyword, rest
    is_compressed = name == b'zTXt' or rest[:1] == b'\1'
    text = rest[1:] if name == b'zTXt' else rest[2:].partition(b'\0')[2].partition(b'\0')[2]
    try:
        return keyword, inflate(text, most) if is_compressed else text
    except zlib.error:
        return keyword, None


def _raw_profile(text: bytes) -> bytes:
    """What ImageMagick wrote as a text before eXIf was: a line break, a name, a length, and hexadecimal digits."""
    try:
        return bytes.fromhex(''.join(text.decode('ascii').split('\n')[3:]))
    except ValueError:
        return b''


def resolution_of(x: Any, y: Any, unit: str | None) -> Resolution | None:
    """A resolution, if the numbers tell one; equal ones without a unit tell nothing."""
    try:
        x, y = float(x), float(y)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if unit is None or not (0 < x < LARGEST_RESOLUTION and 0 < y < LARGEST_RESOLUTION) or (not unit and x == y):
        return None
    return Resolution(x, y, unit)


def read_metadata(image: Image.Image) -> Metadata:
    """That of an opened JPEG, WebP, AVIF or TIFF, as it is stored: nothing is turned, and no EXIF is looked at.

    Args:
        image: As Pillow opened it, not loaded yet.
    """
    if isinstance(image, TiffImageFile):
        return Metadata(None, _bytes_of(image, XMP), _bytes_of(image, IPTC))
    segments = getattr(image, 'applist', [])
    if not segments:  # WebP and AVIF
        return Metadata(None, image.info.get('xmp'))
    x, y = image.info.get('jfif_density', (0, 0))
    xmp = next((block[len(XMP_HEADER) :] for _, block in segments if block.startswith(XMP_HEADER)), None)
    iptc = image.info.get('photoshop', {}).get(IPTC_RESOURCE)
    return Metadata(
        resolution_of(x, y, JFIF_UNITS.get(image.info.get('jfif_unit', 0))),
        xmp,
        iptc or None,
        image.info.get('comment') or None,
        lost=frozenset({'extended XMP'} if any(block.startswith(LONG_XMP_HEADER) for _, block in segments) else ()),
    )


def exif_resolution(exif: Mapping[int, Any]) -> Resolution | None:
    """That of EXIF, or of the tags of a TIFF."""
    unit = TIFF_UNITS.get(exif.get(RESOLUTION_UNIT, 2))
    return resolution_of(exif.get(X_RESOLUTION), exif.get(Y_RESOLUTION), unit)


def _bytes_of(image: TiffImageFile, tag: int) -> bytes | None:
    value = image.tag_v2.get(tag)
    if isinstance(value, str):
        return value.encode('latin-1') or None  # as Pillow decoded it
    if isinstance(value, (tuple, int)):  # of the type LONG, as Photoshop declares IPTC
        numbers = value if isinstance(value, tuple) else (value,)
        order = '<' if image.tag_v2.prefix == b'II' else '>'
        try:
            return struct.pack(f'{order}{len(numbers)}L', *numbers)
        except struct.error:
            return None
    return value if isinstance(value, bytes) and value else None  # of a tag that may be of any type


def upright(metadata: Metadata, orientation: int) -> Metadata:
    """That of the pixels once they are turned by an EXIF orientation."""
    resolution = metadata.resolution
    if resolution is not None and orientation in (5, 6, 7, 8):
        resolution = Resolution(resolution.y, resolution.x, resolution.unit)
    xmp = metadata.xmp and re.sub(rb'(tiff:Orientation\s*(?:=\s*["\']|>)\s*)[0-9]', rb'\g<1>1', metadata.xmp)
    return replace(metadata, resolution=resolution, xmp=xmp)


def xmp_orientation(xmp: bytes | None) -> int:
    """The orientation that an XMP packet tells; 1 if it tells none."""
    found = re.search(rb'tiff:Orientation\s*(?:=\s*["\']|>)\s*([1-8])', xmp or b'')
    return int(found[1]) if found else 1


def xmp_with_size(xmp: bytes, height: int, width: int) -> bytes:
    """An XMP packet with sizes, where it has any, of these pixels."""
    for names, length in (
        (rb'tiff:ImageWidth|exif:PixelXDimension', width),
        (rb'tiff:ImageLength|exif:PixelYDimension', height),
    ):
        xmp = re.sub(rb'((?:' + names + rb')\s*(?:=\s*["\']|>)\s*)[0-9]+', rb'\g<1>%d' % length, xmp)
    return xmp


def kinds_left_out(metadata: Metadata, file_format: str, has_profile: bool) -> set[str]:
    """What a format cannot hold of it, by names for the user; gAMA and cHRM count for nothing beside a profile."""
    kinds = set(metadata.lost)
    if file_format != 'png':
        names = {name for name, _ in metadata.chunks}
        if names & set(TEXT_CHUNKS):
            kinds.add('PNG text')
        kinds |= {f'PNG {name.decode("latin-1")}' for name in names & {b'bKGD', *HDR_CHUNKS}}
        kinds |= {f'PNG {name.decode("latin-1")}' for name in _color_names(metadata.chunks, has_profile)}
    held, resolution = HELD[file_format], metadata.resolution
    for kind, value, name in (
        ('XMP', metadata.xmp, 'XMP'),
        ('IPTC', metadata.iptc, 'IPTC'),
        ('comment', metadata.comment, 'JPEG comment'),
        ('profile', has_profile, 'a color profile'),
    ):
        if value and kind not in held:
            kinds.add(name)
    if resolution and ('resolution' if resolution.unit else 'ratio') not in held:
        kinds.add('resolution')
    if file_format == 'jpeg':
        kinds |= {name for name, segment in _segments(metadata) if len(segment) > LARGEST_SEGMENT}
        if resolution and not _jfif_density(resolution):
            kinds.add('resolution')
    return kinds


def _color_names(chunks: Sequence[tuple[bytes, bytes]], has_profile: bool) -> set[bytes]:
    """Of the chunks about colors those that count, but for such as tell what no chunk tells as well: sRGB."""
    present = dict(chunks)
    if b'cICP' in present:
        return {b'cICP'} if (b'cICP', present[b'cICP']) not in SRGB_CHUNKS else set()
    if has_profile or b'sRGB' in present:
        return set()
    return {name for name in (b'gAMA', b'cHRM') if name in present and (name, present[name]) not in SRGB_CHUNKS}


def png_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """What goes between IHDR and IDAT."""
    chunks = list(metadata.chunks)
    if metadata.resolution:
        x, y = metadata.resolution.per('m').whole()
        if max(x, y) < 1 << 31:
            chunks.append((b'pHYs', struct.pack('>IIB', x, y, bool(metadata.resolution.unit))))
    if metadata.xmp:
        chunks.append((b'iTXt', XMP_KEYWORD + b'\0\0\0\0\0' + metadata.xmp))
    return chunks


def with_segments(jpeg: bytes, metadata: Metadata) -> bytes:
    """A JPEG that begins with JFIF's segment, with the rest that it can hold."""
    end = 2
    while jpeg[end] == 0xFF and 0xE0 <= jpeg[end + 1] <= 0xEF:
        end += 2 + struct.unpack_from('>H', jpeg, end + 2)[0]
    head = bytearray(jpeg[:end])
    density = _jfif_density(metadata.resolution)
    if density:
        struct.pack_into('>BHH', head, 13, *density)
    for name, segment in _segments(metadata):
        if len(segment) <= LARGEST_SEGMENT:
            marker = {'XMP': 0xE1, 'IPTC': 0xED, 'JPEG comment': 0xFE}[name]
            head += struct.pack('>BBH', 0xFF, marker, len(segment) + 2) + segment
    return bytes(head) + jpeg[end:]


def _jfif_density(resolution: Resolution | None) -> tuple[int, int, int] | None:
    """Unit, X and Y; ``None`` where 16 bits do not hold them."""
    if resolution is None:
        return None
    resolution = resolution if resolution.unit == 'cm' else resolution.per('inch')
    x, y = resolution.whole()
    if not (0 < x < 1 << 16 and 0 < y < 1 << 16):
        return None
    return ('', 'inch', 'cm').index(resolution.unit), x, y


def _segments(metadata: Metadata) -> list[tuple[str, bytes]]:
    """Those of JPEG, by names for the user."""
    segments = []
    if metadata.xmp:
        segments.append(('XMP', XMP_HEADER + metadata.xmp))
    if metadata.iptc:
        resource = struct.pack('>4sHHI', b'8BIM', IPTC_RESOURCE, 0, len(metadata.iptc)) + metadata.iptc
        segments.append(('IPTC', b'Photoshop 3.0\0' + resource + b'\0' * (len(metadata.iptc) % 2)))
    if metadata.comment:
        segments.append(('JPEG comment', metadata.comment))
    return segments


def add_tags(directory: ImageFileDirectory_v2, metadata: Metadata) -> None:
    """Put into the directory of a TIFF what it can hold."""
    for tag, value, kind in ((XMP, metadata.xmp, BYTE), (IPTC, metadata.iptc, UNDEFINED)):
        if value:
            directory.tagtype[tag] = kind
            directory[tag] = value
    directory.update(resolution_tags(metadata.resolution))


def resolution_tags(resolution: Resolution | None) -> dict[int, Any]:
    """Tags of TIFF and EXIF."""
    if resolution is None:
        return {}
    if resolution.unit == 'm':
        resolution = resolution.per('cm')
    unit = ('', 'inch', 'cm').index(resolution.unit) + 1
    return {X_RESOLUTION: resolution.x, Y_RESOLUTION: resolution.y, RESOLUTION_UNIT: unit}
