"""JPEG 2000 as bytes (ISO/IEC 15444-1): what neither Pillow nor OpenCV reads or writes of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lora_sr.errors import shown
from lora_sr.images.boxes import Box, boxes_in, make_box
from lora_sr.images.metadata import EXIF_HEADER, Metadata, Resolution, resolution_of
from lora_sr.images.unreadable import UnreadableImage

JP2_SIGNATURE, CODESTREAM_SIGNATURE = b'\0\0\0\x0cjP  \r\n\x87\n', b'\xff\x4f\xff\x51'
# Of int32 each while they are decoded: three or four times as much as in other formats.
MOST_SAMPLES = 3 << 26
SRGB, GRAY, SYCC = 16, 17, 18
COLOR_SPACES = {SRGB: 'sRGB', GRAY: 'gray', SYCC: 'sYCC'}
ENUMERATED, PROFILES = 1, (2, 3)  # methods of a color specification
COLOR = 0  # a type of a channel
ALPHA_TYPES = OPACITY, PREMULTIPLIED_OPACITY = (1, 2)  # others
BITS_OF_PALETTE = 8
START_OF_TILE_PART = 0xFF90
EXIF_UUID = b'JpgTiffExif->JP2'
XMP_UUID = bytes.fromhex('be7acfcb97a942e89c71999491e3afac')
IPTC_UUID = bytes.fromhex('33c7a4d2b81d4723a0baf1a3e097ad38')


@dataclass(frozen=True)
class JPEG2000:
    """What a file says of its pixels and besides.

    Args:
        codestream: The pixels, which are a file as well.
        components: Of the codestream, 1 to 4.
        depth: Bits of each component, 1 to 16.
        palette: What makes channels of components; ``None`` where these are the channels.
        order: The channel that each of gray or of R, G and B is, and then what is beside them; ``None`` as they come.
        is_ycc: Whether the channels are luma and chroma.
        has_alpha: Whether a second or fourth channel is alpha; where nothing tells, it is taken for it.
        is_premultiplied: Whether the colors are multiplied by alpha.
        icc_profile: The color profile.
        exif: A block of EXIF without ``Exif``; empty where there is none.
        metadata: The rest.
    """

    codestream: bytes
    components: int
    depth: int
    palette: Palette | None = None
    order: tuple[int, ...] | None = None
    is_ycc: bool = False
    has_alpha: bool = True
    is_premultiplied: bool = False
    icc_profile: bytes | None = None
    exif: bytes = b''
    metadata: Metadata = Metadata()


@dataclass(frozen=True)
class Palette:
    """Colors, and what becomes a channel.

    Args:
        colors: uint8 (indices, columns).
        mapping: For each channel its component, whether that has indices, and if so the column of their colors.
    """

    colors: np.ndarray
    mapping: tuple[tuple[int, bool, int], ...]


def read_jpeg2000(data: bytes) -> JPEG2000:
    """Read all but the pixels of a JP2 file or a codestream.

    Raises:
        UnreadableImage: It has pixels of a kind that is not read, several pictures, or is damaged.
    """
    if data.startswith(CODESTREAM_SIGNATURE):
        return _read_codestream(data)
    boxes = list(boxes_in(data))
    codestreams = [box for box in boxes if box.kind == b'jp2c']
    if not codestreams:
        raise UnreadableImage('is damaged: it has no pixels, or its boxes do not fit')
    if len(codestreams) > 1:
        raise UnreadableImage(f'must hold one picture, got {len(codestreams)}: take them apart first')
    described = _read_codestream(data[codestreams[0].start : codestreams[0].stop])
    header = next((box for box in boxes if box.kind == b'jp2h'), None)
    inner = list(boxes_in(data, header.start, header.stop)) if header is not None else []
    last = {box.kind: data[box.start : box.stop] for box in inner}
    color_space, icc_profile = _colors_of(data[box.start : box.stop] for box in inner if box.kind == b'colr')
    palette = _palette(last[b'pclr'], last.get(b'cmap'), described.components) if b'pclr' in last else None
    channels = described.components if palette is None else len(palette.mapping)
    order = alpha_type = None
    if b'cdef' in last and channels > 1:
        order, alpha_type = _channel_definitions(last[b'cdef'], channels)
    exif, metadata = _read_uuids(data, boxes)
    return replace(
        described,
        palette=palette,
        order=order,
        is_ycc=color_space == SYCC,
        has_alpha=alpha_type in (None, *ALPHA_TYPES),
        is_premultiplied=alpha_type == PREMULTIPLIED_OPACITY,
        icc_profile=icc_profile,
        exif=exif,
        metadata=replace(metadata, resolution=_resolution(last.get(b'res ', b''))),
    )


def _read_codestream(codestream: bytes) -> JPEG2000:
    described = JPEG2000(codestream, *_sizes(codestream))
    _check_tiles(codestream)
    return described


def _colors_of(specifications: Iterable[bytes]) -> tuple[int | None, bytes | None]:
    """The color space or the profile of the first color specification (I.5.3.3) that is understood."""
    color_space, icc_profile = None, None
    for content in specifications:
        if content[:1] == bytes([ENUMERATED]) and len(content) >= 7:
            (color_space,) = struct.unpack_from('>I', content, 3)
            break
        if content and content[0] in PROFILES:
            icc_profile = content[3:]
            break
    profile_space = icc_profile and shown(icc_profile[16:20].decode('latin-1').strip())
    if color_space not in (None, *COLOR_SPACES) or profile_space not in (None, '', 'RGB', 'GRAY'):
        kind = profile_space or f'the color space {color_space}'
        raise UnreadableImage(f'must be {", ".join(COLOR_SPACES.values())}, or have a profile of RGB, got {kind}')
    return color_space, icc_profile


def _palette(colors: bytes, mapping: bytes | None, components: int) -> Palette:
    """A palette (I.5.3.4) and what is mapped to it (I.5.3.5)."""
    try:
        count, columns = struct.unpack_from('>HB', colors)
        depths = set(colors[3 : 3 + columns])
        table = np.frombuffer(colors, np.uint8, count * columns, 3 + columns).reshape(count, columns)
        # Where nothing is told, each column is a channel, as for Pillow.
        entries = tuple(struct.iter_unpack('>HBB', mapping)) if mapping else tuple((0, 1, i) for i in range(columns))
    except (struct.error, ValueError):
        raise UnreadableImage('is damaged: its palette is cut short') from None
    if depths != {BITS_OF_PALETTE - 1}:  # of one less than its bits
        raise UnreadableImage(f'must have a palette of {BITS_OF_PALETTE} bits, got another')
    if (
        not 1 <= len(entries) <= 4
        or not count
        or any(component >= components or way > 1 or way * column >= columns for component, way, column in entries)
    ):
        raise UnreadableImage('is damaged: its palette makes no sense')
    return Palette(table, tuple((component, bool(way), column) for component, way, column in entries))


def _channel_definitions(content: bytes, channels: int) -> tuple[tuple[int, ...], int | None]:
    """The order of channels (I.5.3.6) and the type of the one beside the colors, if there is one."""
    try:
        entries = list(struct.iter_unpack('>3H', content[2:]))
    except struct.error:
        raise UnreadableImage('is damaged: its channel definitions are cut short') from None
    colors = {association: channel for channel, kind, association in entries if kind == COLOR}
    others = [(channel, kind) for channel, kind, _ in entries if kind != COLOR]
    order = tuple([colors[association] for association in sorted(colors)] + [channel for channel, _ in others])
    expected = range(1, 4 if channels > 2 else 2)
    if sorted(order) != list(range(channels)) or sorted(colors) != list(expected):
        got = shown(', '.join(map(str, entries[: channels + 1])))
        raise UnreadableImage(f'must define its channels as gray or RGB and one more at most, got {got or "none"}')
    return order, others[0][1] if others else None


def _read_uuids(data: bytes, boxes: Iterable[Box]) -> tuple[bytes, Metadata]:
    """EXIF, without ``Exif``, and what else stands beside the header and the pixels."""
    exif, xmp, iptc, lost = b'', None, None, set()
    for box in boxes:
        content = data[box.start : box.stop] if box.kind == b'uuid' else b''
        if content.startswith(EXIF_UUID):
            exif = content[16:].removeprefix(EXIF_HEADER)
        elif content.startswith(XMP_UUID):
            xmp = content[16:]
        elif content.startswith(IPTC_UUID):
            iptc = content[16:]
        elif box.kind in (b'uuid', b'xml '):
            lost.add(f'JPEG 2000 {box.kind.decode().strip()}')
    return exif, Metadata(None, xmp, iptc, lost=frozenset(lost))


def _sizes(codestream: bytes) -> tuple[int, int]:
    """Components and their bits, from the first marker segment (A.5.1)."""
    try:
        if not codestream.startswith(CODESTREAM_SIGNATURE):
            raise UnreadableImage('is damaged: its codestream does not begin with its sizes')
        x, y, left, top, *_, channels = struct.unpack_from('>8IH', codestream, 8)
        components = list(struct.iter_unpack('3B', codestream[42 : 42 + 3 * channels]))
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


def _check_tiles(codestream: bytes) -> None:
    """See that each tile of a codestream has a part, as its size tells where the next part begins (A.4.2).

    OpenJPEG leaves those that are missing black.

    Raises:
        UnreadableImage: One has none.
    """
    x, y, _, _, width, height, left, top = struct.unpack_from('>8I', codestream, 8)
    tiles = -(-(x - left) // width) * -(-(y - top) // height) if width and height else 0
    found, place = set(), 2
    try:
        while place < len(codestream):
            marker, length = struct.unpack_from('>2H', codestream, place)
            if marker == START_OF_TILE_PART:
                number, size = struct.unpack_from('>HI', codestream, place + 4)
                found.add(number)
                place += size or len(codestream)  # the last one may reach to the end
            elif found:  # the end of the codestream
                break
            else:
                place += 2 + length
    except struct.error:
        pass
    if len(found) < tiles or not tiles:
        raise UnreadableImage(f'is damaged: it has {len(found)} of {tiles} tiles')


def _resolution(content: bytes) -> Resolution | None:
    """That of a resolution superbox (I.5.3.7), of capture before that of display."""
    found = {box.kind: _read_resolution(content[box.start : box.stop]) for box in boxes_in(content)}
    return found.get(b'resc') or found.get(b'resd')


def _read_resolution(content: bytes) -> Resolution | None:
    try:
        y, y_over, x, x_over, y_power, x_power = struct.unpack('>4H2b', content)
        return resolution_of(x / x_over * 10.0**x_power, y / y_over * 10.0**y_power, 'm')
    except (struct.error, ZeroDivisionError):
        return None


def plain_jp2(codestream: bytes) -> bytes:
    """A JP2 file of a codestream, whose components are gray, or R, G and B first."""
    x, y, left, top, *_, components = struct.unpack_from('>8IH', codestream, 8)
    size = struct.pack('>2IH4B', y - top, x - left, components, codestream[42], 7, 0, 0)  # 7: the compression
    color = struct.pack('>3BI', ENUMERATED, 0, 0, SRGB if components > 2 else GRAY)
    return b''.join(
        (
            JP2_SIGNATURE,
            make_box(b'ftyp', b'jp2 ' + bytes(4) + b'jp2 '),
            make_box(b'jp2h', make_box(b'ihdr', size) + make_box(b'colr', color)),
            make_box(b'jp2c', codestream),
        )
    )


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
