"""BMP as bytes: what Pillow does not read of it, and its headers."""

from __future__ import annotations

import struct

from lora_sr.images.metadata import Metadata, Resolution, resolution_of

BMP_SIGNATURE = b'BM'
FILE_HEADER = struct.Struct('<2sLHHL')
# BITMAPINFOHEADER: its size, width, height, planes, bits, compression, bytes of pixels, pixels per meter (X, Y), colors
# of the palette, and how many of them matter.
INFO_HEADER = struct.Struct('<LllHHLLllLL')
# What BITMAPV5HEADER has besides: masks of R, G, B and alpha, color space, end points, gamma, intent, where a profile
# is and its length, and nothing.
V5_REST = struct.Struct('<4LL36x12xLLLL')
V5_SIZE = INFO_HEADER.size + V5_REST.size
BITFIELDS = 3  # a compression: pixels as the masks say
# Color spaces, as they stand in a file: 'sRGB', 'MBED' and 'LINK' with the last letter first.
SRGB, EMBEDDED, LINKED = b'BGRs', b'DEBM', b'KNIL'
FOR_PICTURES = 4  # an intent: perceptual
MASKS = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)  # of R, G, B and alpha, which are stored as B, G, R and alpha


def read_bmp(data: bytes) -> tuple[bytes | None, Metadata]:
    """Color profile and resolution of a BMP file; a linked profile, of another file, is lost."""
    start = FILE_HEADER.size
    icc_profile, lost = None, frozenset[str]()
    try:
        size, *_, x, y, _, _ = INFO_HEADER.unpack_from(data, start)
        if size >= V5_SIZE:
            color_space = data[start + 56 : start + 60]
            offset, length = struct.unpack_from('<LL', data, start + 112)
            if color_space == EMBEDDED:
                icc_profile = data[start + offset : start + offset + length]
            if color_space == LINKED or (icc_profile is not None and len(icc_profile) != length):
                icc_profile, lost = None, frozenset({'a damaged color profile'})
    except struct.error:  # OS/2's header, which is shorter
        return None, Metadata()
    resolution = resolution_of(x, y, 'm') if size >= INFO_HEADER.size else None
    return icc_profile or None, Metadata(resolution, lost=lost)


def bmp_header(
    height: int, width: int, channels: int, resolution: Resolution | None, icc_profile: bytes | None
) -> tuple[bytes, int]:
    """What stands before the pixels, which come from the lowest row up, and before the profile, which is the end.

    Args:
        height: Pixels.
        width: Pixels.
        channels: 1, 3 or 4; gray gets a palette of grays, and alpha makes a header of version 5.
        resolution: Of the image, if any.
        icc_profile: Of the image, if any; it makes a header of version 5 as well.

    Returns:
        The header, and the bytes of a row, with those that fill it up.
    """
    row_bytes = -(-width * channels // 4) * 4
    x, y = resolution.per('m').whole() if resolution is not None and resolution.unit else (0, 0)
    is_new = channels == 4 or icc_profile is not None
    palette = b''.join(struct.pack('<4B', level, level, level, 0) for level in range(256)) if channels == 1 else b''
    size = V5_SIZE if is_new else INFO_HEADER.size
    start = FILE_HEADER.size + size + len(palette)
    length = height * row_bytes
    total = start + length + len(icc_profile or b'')
    header = INFO_HEADER.pack(
        size,
        width,
        height,
        1,
        8 * channels,
        BITFIELDS if channels == 4 else 0,
        length,
        min(x, (1 << 31) - 1),
        min(y, (1 << 31) - 1),
        len(palette) // 4,
        0,
    )
    if is_new:
        (color_space,) = struct.unpack('<L', EMBEDDED if icc_profile else SRGB)
        masks = MASKS if channels == 4 else (0, 0, 0, 0)
        offset = size + len(palette) + length if icc_profile else 0
        header += V5_REST.pack(*masks, color_space, FOR_PICTURES, offset, len(icc_profile or b''), 0)
    return FILE_HEADER.pack(BMP_SIGNATURE, total, 0, 0, start) + header + palette, row_bytes
