"""PNG and TIFF of 16 bits, as tifffile and zlib write them: all of the bits, and everything else as it was."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from lora_sr.images.decoding import decode
from lora_sr.images.depth import decode_deep, is_deep

FLAGS = (cv2.IMREAD_COLOR, cv2.IMREAD_GRAYSCALE, cv2.IMREAD_UNCHANGED)
PIXELS = np.random.default_rng(0).integers(0, 65536, (21, 37, 4)).astype(np.uint16)
PIXELS[..., 3] = 65535
RGB, GRAY = PIXELS[..., :3], PIXELS[..., 0]


def png(color_type, pixels, *chunks):
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    header = struct.pack('>IIBBBBB', pixels.shape[1], pixels.shape[0], 16, color_type, 0, 0, 0)
    parts = [(b'IHDR', header), *chunks, (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in parts
    )


def tiff(pixels, **options):
    file = io.BytesIO()
    kind = {'photometric': 'rgb'} if pixels.ndim == 3 and pixels.shape[-1] > 2 else {'photometric': 'minisblack'}
    tifffile.imwrite(file, pixels, **{**kind, **options})
    return file.getvalue()


FILES = {
    'png': png(2, RGB),
    'png of gray': png(0, GRAY),
    'png with alpha': png(6, PIXELS),
    'png of gray and alpha': png(4, PIXELS[..., [0, 3]]),
    'png with a transparent color': png(2, RGB, (b'tRNS', RGB[0, 0].astype('>u2').tobytes())),
    'tiff': tiff(RGB),
    'tiff of gray': tiff(GRAY),
    'tiff, big-endian': tiff(RGB, byteorder='>'),
    'tiff of gray, big-endian': tiff(GRAY, byteorder='>'),
    'tiff, deflate and predictor': tiff(RGB, compression='zlib', predictor=True, rowsperstrip=4),
    'tiff, tiles': tiff(RGB, tile=(16, 16)),
    'big tiff': tiff(RGB, bigtiff=True),
    'tiff, white is zero': tiff(65535 - GRAY, photometric='miniswhite'),
    'tiff, opaque': tiff(PIXELS, extrasamples=['unassalpha']),
}


@pytest.mark.parametrize('name', FILES)
def test_all_bits_of_the_colors(name):
    color, gray, _ = (decode_deep(FILES[name], flag) for flag in FLAGS)
    expected = np.dstack([GRAY] * 3) if 'gray' in name or 'white' in name else RGB[..., ::-1]
    assert is_deep(FILES[name]) and np.array_equal(color, expected) and color.dtype == np.uint16
    luma = expected.astype(np.float64) @ [0.114, 0.587, 0.299]  # BT.601, by whole numbers of 15 bits in libpng
    assert gray.shape == luma.shape and gray.dtype == np.uint16 and np.abs(gray - luma).max() < 4


@pytest.mark.parametrize('orientation', range(1, 9))
def test_it_is_turned_as_with_8_bits(orientation):
    file = tiff(RGB, extratags=[(274, 3, 1, orientation, True)])
    for flag in FLAGS[:2]:
        assert np.abs(decode_deep(file, flag) / 257 - decode(file, flag)).max() <= 1


CLEAR = np.dstack([RGB, GRAY])


@pytest.mark.parametrize(
    'content',
    [
        tiff(RGB.transpose(2, 0, 1).copy(), planarconfig='separate'),
        tiff(CLEAR, extrasamples=['unassalpha']),
        tiff(CLEAR, extrasamples=['assocalpha']),
        tiff(PIXELS[..., [0, 3]], extrasamples=['unassalpha'], planarconfig='contig'),
        tiff((RGB.astype(int) - 32768).astype(np.int16)),
        tiff(RGB.astype(np.float32)),
        tiff(RGB.astype(np.uint32)),
        tiff(RGB)[:300],
        tiff(RGB)[:7],
        b'II*\0\xff\xff\xff\x7f',
        png(2, RGB)[:60],
        png(2, RGB)[:24],
        b'P6\n2 1\n4095\n' + bytes(12),
        b'',
    ],
    ids='planes clear premultiplied gray-alpha signs float uint32 cut header far cut-png png-header ppm empty'.split(),
)
@pytest.mark.filterwarnings('ignore:Truncated File Read', 'ignore:Corrupt EXIF data', 'ignore:Possibly corrupt')
def test_what_opencv_does_not_read_right_stays_as_it_was(content):
    for flag in FLAGS[:2]:
        before, image = decode(content, flag), decode_deep(content, flag)
        assert (before is image is None) or (image.dtype == before.dtype and np.array_equal(image, before))


def test_8_bits_and_fewer_stay_as_they_were():
    photo = Image.fromarray((RGB >> 8).astype(np.uint8))
    for mode in ('RGB', 'L', 'P', '1', 'LA', 'RGBA', 'CMYK'):
        for kind in ('PNG', 'TIFF', 'JPEG', 'WEBP', 'BMP', 'TGA', 'GIF'):
            file = io.BytesIO()
            try:
                photo.convert(mode).save(file, kind)
            except (OSError, ValueError):  # of a mode that the format does not have
                continue
            for flag in FLAGS:
                before, image = decode(file.getvalue(), flag), decode_deep(file.getvalue(), flag)
                assert not is_deep(file.getvalue())
                assert image.dtype == before.dtype == np.uint8 and np.array_equal(image, before)
