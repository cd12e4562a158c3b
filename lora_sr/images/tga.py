"""TGA as bytes (Truevision TGA, version 2.0): how it is known without a signature, and what Pillow does not read."""

from __future__ import annotations

import struct
from typing import NamedTuple

from lora_sr.images.unreadable import UnreadableImage

# Length of the text after it, kind of palette, type, the palette's first entry, entries and bits, X and Y of the
# origin, width, height, bits of a pixel, and a descriptor.
HEADER = struct.Struct('<BBBHHBHHHHBB')
FOOTER = struct.Struct('<LL18s')  # where the extension and the developer's area begin, and a signature
FOOTER_SIGNATURE = b'TRUEVISION-XFILE.\0'
PALETTE, COLORS, GRAY, RUN_LENGTHS = 1, 2, 3, 8  # types; the last is added to one of the others
DEPTHS = {PALETTE: (8,), COLORS: (16, 24, 32), GRAY: (1, 8, 16)}  # type -> bits of a pixel
PALETTE_DEPTHS = (16, 24, 32)
ALPHA_BITS, RESERVED_BITS = 0x0F, 0xC0  # of the descriptor
# In the extension area: texts (author, comments, date, job), gamma, and which kind of alpha there is.
EXTENSION_BYTES, TEXTS, GAMMA, ALPHA_KIND = 495, slice(2, 426), 478, 494
NO_ALPHA, MEANINGLESS, KEPT, ALPHA, PREMULTIPLIED = range(5)


class TGA(NamedTuple):
    """What a file says of its pixels and besides.

    Args:
        data: The file without its footer, by which Pillow would change alpha.
        alpha_kind: ``NO_ALPHA`` to ``PREMULTIPLIED``.
        lost: What is not kept, by names for the user.
    """

    data: bytes
    alpha_kind: int
    lost: frozenset[str]


def is_tga(beginning: bytes) -> bool:
    """Whether the first 18 bytes or more are a header all fields of which agree."""
    if len(beginning) < HEADER.size:
        return False
    _, palette_kind, kind, first, entries, palette_bits, _, _, width, height, bits, descriptor = HEADER.unpack_from(
        beginning
    )
    if bits not in DEPTHS.get(kind & ~RUN_LENGTHS, ()) or not width or not height or descriptor & RESERVED_BITS:
        return False
    if palette_kind == 1:
        return palette_bits in PALETTE_DEPTHS and entries > 0
    return palette_kind == 0 and kind & ~RUN_LENGTHS != PALETTE and not (first or entries or palette_bits)


def read_tga(data: bytes) -> TGA:
    """Read all but the pixels of a file that :func:`is_tga`."""
    text_length, _, kind, _, _, palette_bits, *_, bits, descriptor = HEADER.unpack_from(data)
    if kind & ~RUN_LENGTHS == PALETTE:
        has_alpha = palette_bits == 32
    else:  # the bit left over by colors of 5 bits has no fixed meaning
        has_alpha = bool(descriptor & ALPHA_BITS) and (kind & ~RUN_LENGTHS, bits) != (COLORS, 16)
    alpha_kind = ALPHA if has_alpha else NO_ALPHA
    texts, lost = data[HEADER.size : HEADER.size + text_length], set()
    if data.endswith(FOOTER_SIGNATURE) and len(data) >= HEADER.size + FOOTER.size:
        start = FOOTER.unpack(data[-FOOTER.size :])[0]
        extension = data[start : start + EXTENSION_BYTES] if start else b''
        if len(extension) == EXTENSION_BYTES:
            if has_alpha and extension[ALPHA_KIND] <= PREMULTIPLIED:
                alpha_kind = extension[ALPHA_KIND]
            texts += extension[TEXTS]
            over, under = struct.unpack_from('<HH', extension, GAMMA)
            if over != under and under:
                lost.add('TGA gamma')
        data = data[: -FOOTER.size]
    if texts.strip(b'\0 '):
        lost.add('TGA texts')
    return TGA(data, alpha_kind, frozenset(lost))


def without_run_lengths(data: bytes) -> bytes:
    """The file as one that is not compressed; version 1 let runs go on in the next row, where Pillow ends them.

    Raises:
        UnreadableImage: It is cut short, as one may be that is not compressed.
    """
    fields = list(HEADER.unpack_from(data))
    text_length, _, kind, _, entries, palette_bits, _, _, width, height, bits, _ = fields
    if not kind & RUN_LENGTHS:
        raise UnreadableImage('is damaged: it is cut short')
    size, place = bits // 8, HEADER.size + text_length + entries * (palette_bits // 8)
    fields[2] = kind & ~RUN_LENGTHS
    unpacked, wanted = bytearray(HEADER.pack(*fields) + data[HEADER.size : place]), place + width * height * size
    while len(unpacked) < wanted:
        if place >= len(data):
            raise UnreadableImage('is damaged: it is cut short')
        length, is_run = (data[place] & 0x7F) + 1, data[place] & 0x80
        stored = size if is_run else length * size
        unpacked += data[place + 1 : place + 1 + stored] * (length if is_run else 1)
        place += 1 + stored
    return bytes(unpacked[:wanted])


def tga_header(height: int, width: int, channels: int) -> bytes:
    """What stands before the pixels, which come from the lowest row up, without a palette and not compressed."""
    kind, alpha_bits = (GRAY, COLORS)[channels > 2], (0, 8)[channels in (2, 4)]
    return HEADER.pack(0, 0, kind, 0, 0, 0, 0, 0, width, height, 8 * channels, alpha_bits)


def tga_footer() -> bytes:
    """The end of a file of version 2 without an extension area."""
    return FOOTER.pack(0, 0, FOOTER_SIGNATURE)
