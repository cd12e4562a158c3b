"""JPEG 2000 as bytes (ISO/IEC 15444-1): what neither Pillow nor OpenCV reads or writes of it."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from lora_sr.errors import shown
from lora_sr.images.boxes import boxes_in, make_box
from lora_sr.images.metadata import Metadata, Resolution, resolution_of
from lora_sr.images.unreadable import UnreadableImage

JP2_SIGNATURE, CODESTREAM_SIGNATURE = b'\0\0\0\x0cjP  \r\n\x87\n', b'\xff\x4f\xff\x51'
# Of int32 each while they are decoded: three or four times as much as in other formats.
MOST_SAMPLES = 3 << 26
SYCC = 18
COLOR_SPACES = {16: 'sRGB', 17: 'gray', SYCC: 'sYCC'}
ENUMERATED, PROFILES = 1, (2, 3)  # methods of a color specification
ALPHA_TYPES = OPACITY, PREMULTIPLIED_OPACITY = (1, 2)  # of a channel
START_OF_TILE_PART = 0xFF90
EXIF_UUID = b'JpgTiffExif->JP2'
XMP_UUID = bytes.fromhex('be7acfcb97a942e89c71999491e3afac')
IPTC_UUID = bytes.fromhex('33c7a4d2b81d4723a0baf1a3e097ad38')


@dataclass(frozen=True)
class JPEG2000:
    """What a file says of its pixels and besides.

    Args:
        channels: 1 to 4.
        depth: Bits of each channel, 1 to 16.
        has_palette: Whether the channel has indices of colors.
        is_ycc: Whether the channels are luma and chroma.
        has_alpha: Whether a second or fourth channel is alpha; where nothing tells, it is taken for it.
        is_premultiplied: Whether the colors are multiplied by alpha.
        icc_profile: The color profile.
        exif: A block of EXIF without ``Exif``; empty where there is none.
        metadata: The rest.
    """

    channels: int
    depth: int
    has_palette: bool = False
    is_ycc: bool = False
    has_alpha: bool = True
    is_premultiplied: bool = False
    icc_profile: bytes | None = None
    exif: bytes = b''
    metadata: Metadata = Metadata()


def read_jpeg2000(data: bytes) -> JPEG2000:
    """Read all but the pixels of a JP2 file or a codestream.

    Raises:
        UnreadableImage: It has pixels of a kind that is not read, several pictures, or is damaged.
    """
    if data.startswith(CODESTREAM_SIGNATURE):
        described = JPEG2000(*_sizes(data, 0))
        _check_tiles(data, 0, len(data))
        return described
    boxes = list(boxes_in(data))
    codestreams = [box for box in boxes if box.kind == b'jp2c']
    if not codestreams:
        raise UnreadableImage('is damaged: it has no pixels, or its boxes do not fit')
    if len(codestreams) > 1:
        raise UnreadableImage(f'must hold one picture, got {len(codestreams)}: take them apart first')
    _, start, stop = codestreams[0]
    channels, depth = _sizes(data, start)
    _check_tiles(data, start, stop)
    icc_profile, exif, lost = None, b'', set()
    resolutions: dict[bytes, Resolution | None] = {}
    xmp = iptc = alpha_type = color_space = None
    has_palette = False
    for header in (box for box in boxes if box.kind == b'jp2h'):
        for box in boxes_in(data, header.start, header.stop):
            content = data[box.start : box.stop]
            if box.kind == b'colr' and color_space is None and icc_profile is None:
                if content[:1] == bytes([ENUMERATED]) and len(content) >= 7:
                    (color_space,) = struct.unpack_from('>I', content, 3)
                elif content and content[0] in PROFILES:
                    icc_profile = content[3:]
            elif box.kind == b'cdef':
                alpha_type = _alpha_type(content)
            elif box.kind == b'pclr':
                has_palette = True
            elif box.kind == b'res ':
                for inner in boxes_in(data, box.start, box.stop):
                    resolutions[inner.kind] = _resolution(data[inner.start : inner.stop])
    for box in boxes:
        content = data[box.start : box.stop] if box.kind == b'uuid' else b''
        if content.startswith(EXIF_UUID):
            exif = content[16:].removeprefix(b'Exif\0\0')
        elif content.startswith(XMP_UUID):
            xmp = content[16:]
        elif content.startswith(IPTC_UUID):
            iptc = content[16:]
        elif box.kind in (b'uuid', b'xml '):
            lost.add(f'JPEG 2000 {box.kind.decode().strip()}')
    profile_space = icc_profile and shown(icc_profile[16:20].decode('latin-1').strip())
    if color_space not in (None, *COLOR_SPACES) or profile_space not in (None, '', 'RGB', 'GRAY'):
        kind = profile_space or f'the color space {color_space}'
        raise UnreadableImage(f'must be {", ".join(COLOR_SPACES.values())}, or have a profile of RGB, got {kind}')
    resolution = resolutions.get(b'resc') or resolutions.get(b'resd')
    return JPEG2000(
        channels,
        depth,
        has_palette,
        color_space == SYCC,
        alpha_type in (None, *ALPHA_TYPES),
        alpha_type == PREMULTIPLIED_OPACITY,
        icc_profile,
        exif,
        Metadata(resolution, xmp, iptc, lost=frozenset(lost)),
    )


def _sizes(data: bytes, start: int) -> tuple[int, int]:
    """Channels and bits of a codestream, from its first marker segment (A.5.1)."""
    try:
        if not data.startswith(CODESTREAM_SIGNATURE, start):
            raise UnreadableImage('is damaged: its codestream does not begin with its sizes')
        x, y, left, top, *_, channels = struct.unpack_from('>8IH', data, start + 8)
        components = list(struct.iter_unpack('3B', data[start + 42 : start + 42 + 3 * channels]))
    except struct.error:
        raise UnreadableImage('is damaged: it is cut short') from None
    if not 1 <= channels <= 4:
        raise UnreadableImage(f'must have 1 to 4 channels, got {channels}')
    if len(components) < channels or x <= left or y <= top:
        raise UnreadableImage('is damaged: its sizes are impossible')
    if (x - left) * (y - top) * channels > MOST_SAMPLES:
        raise UnreadableImage(f'must have {MOST_SAMPLES} values or fewer in all its channels, as JPEG 2000')
    if any(steps != [1, 1] for _, *steps in components):
        raise UnreadableImage('must have all channels in full resolution, got some of fewer pixels')
    depths = {bits for bits, *_ in components}
    if len(depths) > 1 or max(depths) > 15:  # of one less than its bits; the highest bit says that there is a sign
        raise UnreadableImage('must have channels of equally many bits, 16 at most, and without a sign')
    return channels, max(depths) + 1


def _check_tiles(data: bytes, start: int, stop: int) -> None:
    """See that each tile of a codestream has a part, as its size tells where the next part begins (A.4.2).

    OpenJPEG leaves those that are missing black.

    Raises:
        UnreadableImage: One has none.
    """
    x, y, _, _, width, height, left, top = struct.unpack_from('>8I', data, start + 8)
    tiles = -(-(x - left) // width) * -(-(y - top) // height) if width and height else 0
    found, place = set(), start + 2
    try:
        while place < stop:
            marker, length = struct.unpack_from('>2H', data, place)
            if marker == START_OF_TILE_PART:
                number, size = struct.unpack_from('>HI', data, place + 4)
                found.add(number)
                place += size or stop  # the last one may reach to the end
            elif found:  # the end of the codestream
                break
            else:
                place += 2 + length
    except struct.error:
        pass
    if len(found) < tiles or not tiles:
        raise UnreadableImage(f'is damaged: it has {len(found)} of {tiles} tiles')


def _alpha_type(content: bytes) -> int:
    """What of a channel definition (I.5.3.6) says which kind of alpha there is; 65535 where none is."""
    entries = list(struct.iter_unpack('>3H', content[2 : 2 + (len(content) - 2) // 6 * 6]))
    return next((kind for _, kind, _ in entries if kind in ALPHA_TYPES), 65535)


def _resolution(content: bytes) -> Resolution | None:
    try:
        y, y_over, x, x_over, y_power, x_power = struct.unpack('>4H2b', content)
        return resolution_of(x / x_over * 10.0**x_power, y / y_over * 10.0**y_power, 'm')
    except (struct.error, ZeroDivisionError):
        return None


def codestream_of(jp2: bytes) -> bytes:
    """The pixels of a JP2 file, which are a file as well."""
    return next(jp2[box.start : box.stop] for box in boxes_in(jp2) if box.kind == b'jp2c')


def with_boxes(jp2: bytes, icc_profile: bytes | None, exif: bytes, metadata: Metadata) -> bytes:
    """A JP2 file with what it can hold besides its pixels; EXIF without ``Exif``."""
    written = []
    for box in boxes_in(jp2):
        content = jp2[box.start : box.stop]
        if box.kind == b'jp2h':
            content = b''.join(
                make_box(b'colr', bytes([PROFILES[0], 0, 0]) + icc_profile)
                if icc_profile and inner.kind == b'colr'
                else make_box(inner.kind, jp2[inner.start : inner.stop])
                for inner in boxes_in(jp2, box.start, box.stop)
            )
            content += _resolution_box(metadata.resolution)
        if box.kind == b'jp2c':
            for uuid, value in ((EXIF_UUID, exif), (XMP_UUID, metadata.xmp), (IPTC_UUID, metadata.iptc)):
                if value:
                    written.append(make_box(b'uuid', uuid + value))
        written.append(make_box(box.kind, content))
    return b''.join(written)


def _resolution_box(resolution: Resolution | None) -> bytes:
    if resolution is None or not resolution.unit:
        return b''
    x, y, _ = resolution.per('m')
    (x, x_over, x_power), (y, y_over, y_power) = _fraction(x), _fraction(y)
    content = struct.pack('>4H2b', y, y_over, x, x_over, y_power, x_power)
    return make_box(b'res ', make_box(b'resc', content))


def _fraction(value: float) -> tuple[int, int, int]:
    """A number as numerator and denominator of 16 bits, and a power of ten."""
    power = max(0, math.ceil(math.log10(value / 65535)))
    value /= 10**power
    denominator = min(65535, max(1, int(65535 / value)))
    return round(value * denominator), denominator, power
