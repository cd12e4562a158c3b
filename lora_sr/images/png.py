"""PNG as bytes: what frames a file, its chunks, and how the databases encode an image."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import cv2
import numpy as np

from lora_sr.errors import InputError
from lora_sr.images.unreadable import UnreadableImage

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
PNG_END = b'\x00\x00\x00\x00IEND\xaeB`\x82'
# Bytes of all compressed texts and the profile of a file, as many as Pillow takes. Of a single one it takes only 1 MiB,
# which the history of an editor exceeds.
MOST_INFLATED = 1 << 26


def encode_png(image: np.ndarray) -> np.ndarray:
    """A uint8 or uint16 image of shape (height, width, 3), BGR, as PNG bytes at compression level 1.

    OpenCV's own setting is that level with the "sub" filter and run lengths. Asked for the level by name, as in
    BasicSR's scripts, it tries every filter on every row: twice the time, for files a tenth smaller.
    """
    return cv2.imencode('.png', image)[1]


def read_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG, (name, content), up to IEND.

    Raises:
        UnreadableImage: A checksum is wrong, or the file is cut short.
    """
    chunks: list[tuple[bytes, bytes]] = []
    view, start = memoryview(data), len(PNG_SIGNATURE)
    while not chunks or chunks[-1][0] != b'IEND':
        if start + 12 > len(data):
            raise UnreadableImage('is damaged: it is cut short')
        length, name = struct.unpack_from('>I4s', data, start)
        end = start + 12 + length
        if end > len(data):
            raise UnreadableImage('is damaged: it is cut short')
        if zlib.crc32(view[start + 4 : end - 4]) != struct.unpack_from('>I', data, end - 4)[0]:
            raise UnreadableImage(f'is damaged: the checksum of its chunk {name!r} is wrong')
        chunks.append((name, bytes(view[start + 8 : end - 4])))
        start = end
    if chunks[0][0] != b'IHDR' or len(chunks[0][1]) != 13:
        raise UnreadableImage('is damaged: it does not begin with its sizes')
    return chunks


def write_chunks(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A PNG of chunks, (name, content)."""
    return b''.join([PNG_SIGNATURE, *(write_chunk(name, content) for name, content in chunks)])


def write_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length and its checksum.

    Raises:
        InputError: It has 2 GiB or more.
    """
    if len(content) >= 1 << 31:
        raise InputError('PNG cannot hold it in one piece: it has 2 GiB or more.')
    checksum = zlib.crc32(content, zlib.crc32(name))
    return struct.pack('>I', len(content)) + name + content + struct.pack('>I', checksum)


def inflate(content: bytes, most: int) -> bytes:
    """What zlib made small, of which no more than that many bytes are ever in memory.

    Raises:
        UnreadableImage: It is larger.
        zlib.error: It is damaged.
    """
    most = max(most, 0)  # an earlier text may have taken more than there was, and zlib knows no limit of 0
    inflater = zlib.decompressobj()
    inflated = inflater.decompress(content, most + 1)
    if len(inflated) > most:
        raise UnreadableImage(f'must have texts and a profile of {MOST_INFLATED >> 20} MiB or less in all, got more')
    if not inflater.eof:
        raise zlib.error('it is cut short')
    return inflated
