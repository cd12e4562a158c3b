"""AVIF as bytes: what Pillow does not tell of it."""

from __future__ import annotations

import struct

from lora_sr.images.boxes import boxes_in

# Code points (ITU-T H.273) of primaries and transfer in which colors are shown as without any: those of sRGB, and what
# stands for it in practice, or is not known.
SRGB_PRIMARIES, SRGB_TRANSFERS = (1, 2), (1, 2, 6, 13)
DEEP_BITS = 0x40  # of what says how AV1 is coded: there are 10 or 12 of them


def is_box_file(beginning: bytes) -> bool:
    """Whether a file is of boxes that are named at once, as AVIF is, and HEIC and videos are as well."""
    return beginning[4:8] == b'ftyp'


def read_avif(data: bytes, has_profile: bool) -> frozenset[str]:
    """What is lost of an AVIF when Pillow reads it, by names for the user."""
    lost = set()
    for meta in boxes_in(data):
        if meta.kind != b'meta':
            continue
        # A version and flags stand before the boxes within.
        for properties in (box for box in boxes_in(data, meta.start + 4, meta.stop) if box.kind == b'iprp'):
            for container in (box for box in boxes_in(data, properties.start, properties.stop) if box.kind == b'ipco'):
                for box in boxes_in(data, container.start, container.stop):
                    content = data[box.start : box.stop]
                    if box.kind == b'av1C' and len(content) > 2 and content[2] & DEEP_BITS:
                        lost.add('more than 8 bits')
                    if box.kind == b'colr' and content.startswith(b'nclx') and len(content) >= 8 and not has_profile:
                        primaries, transfer = struct.unpack_from('>HH', content, 4)
                        if primaries not in SRGB_PRIMARIES or transfer not in SRGB_TRANSFERS:
                            lost.add('AVIF color code points')
    return frozenset(lost)
