"""BMP, as Pillow, OpenCV and FFmpeg (which OpenCV has for videos) read and write it."""

import io
import struct

import cv2
import numpy as np
import pytest
from pictures import pixels
from PIL import Image, ImageCms

from lora_sr.images.encoding import encode_picture, kinds_left_out
from lora_sr.images.formats import Picture, read_picture
from lora_sr.images.metadata import Metadata, Resolution

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def by_opencv(data):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[:, :, [2, 1, 0, 3][: image.shape[2]]]


@pytest.mark.parametrize('width', [16, 17, 18, 19])  # rows end at four bytes
@pytest.mark.parametrize('profile', [None, ICC])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_what_is_written_is_read_by_others(tmp_path, channels, profile, width):
    image = pixels(channels=channels, width=width)
    resolution = Resolution(11811, 5906, 'm')
    data = encode_picture(Picture(image, profile, metadata=Metadata(resolution)), 'bmp', 95)
    expected = image[:, :, [0, 0, 0, 1]] if channels == 2 else image.squeeze()
    with Image.open(io.BytesIO(data)) as other:
        assert np.array_equal(np.asarray(other), expected) and other.info['dpi'] == pytest.approx((300, 150), abs=0.02)
    assert np.array_equal(by_opencv(data), expected)
    (tmp_path / 'image.bmp').write_bytes(data)
    read, frame = cv2.VideoCapture(str(tmp_path / 'image.bmp'), cv2.CAP_FFMPEG).read()
    assert read and np.array_equal(
        frame[:, :, ::-1], (expected if expected.ndim == 3 else np.dstack(3 * [expected]))[..., :3]
    )
    picture = read_picture(tmp_path / 'image.bmp')
    assert np.array_equal(picture.pixels.squeeze(), expected)
    assert picture.icc_profile == profile and picture.metadata.resolution == resolution


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB'])
def test_what_pillow_writes(tmp_path, mode):
    image = Image.fromarray(pixels())
    image = image.quantize(11) if mode == 'P' else image.convert(mode)
    image.save(tmp_path / 'image', 'BMP', dpi=(300, 150))
    picture = read_picture(tmp_path / 'image')
    assert np.array_equal(picture.pixels.squeeze(), image.convert({'1': 'L', 'P': 'RGB'}.get(mode, mode)))
    assert picture.metadata.resolution.per('inch')[:2] == pytest.approx((300, 150), abs=0.02)


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_what_opencv_writes(tmp_path, channels):
    image = pixels(channels=channels)
    cv2.imwrite(str(tmp_path / 'image.bmp'), image[:, :, [2, 1, 0, 3][:channels]] if channels > 1 else image)
    assert np.array_equal(read_picture(tmp_path / 'image.bmp').pixels, image)


def bmp_of(rows: bytes, width, height, bits, compression=0, palette=b'', masks=b'') -> bytes:
    info = struct.pack('<LllHHLLllLL', 40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    start = 14 + len(info) + len(masks) + len(palette)
    return struct.pack('<2sLHHL', b'BM', start + len(rows), 0, 0, start) + info + masks + palette + rows


def test_rows_from_above_and_the_byte_that_is_no_alpha(tmp_path):
    """A negative height; and 32 bits without masks, whose fourth byte means nothing, whatever it is."""
    image = pixels(channels=4)
    rows = np.ascontiguousarray(image[:, :, [2, 1, 0, 3]]).tobytes()
    for data in (bmp_of(rows, 17, -13, 32), bmp_of(rows, 17, 13, 32)):
        (tmp_path / 'image').write_bytes(data)
        read = read_picture(tmp_path / 'image').pixels
        assert np.array_equal(read, image[..., :3] if data[22] > 128 else image[::-1, :, :3])
        assert np.array_equal(read, by_opencv(data)[..., :3])


@pytest.mark.parametrize('masks', [(0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)])
def test_colors_of_five_and_six_bits(tmp_path, masks):
    values = np.random.default_rng(0).integers(0, 1 << 15, (12, 18)).astype('<u2')
    (tmp_path / 'image').write_bytes(bmp_of(values.tobytes(), 18, 12, 16, 3, masks=struct.pack('<3L', *masks)))
    read = read_picture(tmp_path / 'image').pixels
    for channel, mask in enumerate(masks):
        low = (mask & -mask).bit_length() - 1
        exact = ((values & mask) >> low)[::-1] * (255 / (mask >> low))
        assert np.abs(read[..., channel] - exact).max() <= 1


def test_run_lengths(tmp_path):
    """Two runs, then pixels one by one, and the end of a row; FFmpeg reads the same."""
    palette = bytes(
        np.random.default_rng(0).integers(0, 256, 1024, np.uint8).reshape(256, 4) & np.uint8([255, 255, 255, 0])
    )
    row = b'\x05\x07\x03\x09\x00\x03\x01\x02\x03\x00\x00\x00'
    (tmp_path / 'image.bmp').write_bytes(bmp_of(8 * row + b'\0\1', 11, 8, 8, 1, palette))
    colors = np.frombuffer(palette, np.uint8).reshape(256, 4)[:, 2::-1]
    expected = np.tile(colors[[7] * 5 + [9] * 3 + [1, 2, 3]], (8, 1, 1))
    assert np.array_equal(read_picture(tmp_path / 'image.bmp').pixels, expected)
    assert np.array_equal(cv2.VideoCapture(str(tmp_path / 'image.bmp'), cv2.CAP_FFMPEG).read()[1][:, :, ::-1], expected)


def test_a_profile_in_another_file_is_told(tmp_path):
    data = bytearray(encode_picture(Picture(pixels(), ICC), 'bmp', 95))
    data[70:74] = b'KNIL'
    (tmp_path / 'image').write_bytes(data)
    picture = read_picture(tmp_path / 'image')
    assert picture.icc_profile is None and kinds_left_out(picture, 'png') == ['a damaged color profile']


def test_what_it_cannot_hold():
    picture = Picture(
        pixels(), None, {271: 'Camera', 274: 1}, Metadata(Resolution(1, 2, ''), b'<x/>', b'IPTC', b'Said')
    )
    assert kinds_left_out(picture, 'bmp') == ['EXIF', 'IPTC', 'JPEG comment', 'resolution', 'XMP']
    gray = Picture(pixels(channels=1), bytes(16) + b'GRAY' + bytes(108), {274: 1})
    assert kinds_left_out(gray, 'bmp') == ['a gray color profile']
