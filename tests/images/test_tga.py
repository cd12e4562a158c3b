"""TGA, as Pillow and FFmpeg (which OpenCV has for videos) read and write it."""

import io
import struct

import cv2
import numpy as np
import pytest
from pictures import pixels
from PIL import Image

from lora_sr.errors import InputError
from lora_sr.images.encoding import encode_picture, kinds_left_out
from lora_sr.images.formats import Picture, read_picture
from lora_sr.images.metadata import Metadata, Resolution
from lora_sr.images.tga import is_tga

FOOTER = b'TRUEVISION-XFILE.\0'


def header(kind, bits, descriptor=0, width=17, height=13, text=0, palette=(0, 0, 0, 0)) -> bytes:
    return struct.pack('<BBBHHBHHHHBB', text, palette[0], kind, *palette[1:], 0, 0, width, height, bits, descriptor)


def with_extension(data: bytes, alpha_kind: int, author=b'', gamma=(0, 0)) -> bytes:
    """Version 2, with an extension area (specification, field 11 on)."""
    area = bytearray(495)
    area[:2], area[2 : 2 + len(author)], area[494] = struct.pack('<H', 495), author, alpha_kind
    struct.pack_into('<HH', area, 478, *gamma)
    return data + bytes(area) + struct.pack('<LL', len(data), 0) + FOOTER


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_what_is_written_is_read_by_others(tmp_path, channels):
    image = pixels(channels=channels)
    data = encode_picture(Picture(image), 'tga', 95)
    expected = image[:, :, [0, 0, 0, 1]] if channels == 2 else image
    with Image.open(io.BytesIO(data)) as other:
        assert other.format == 'TGA' and np.array_equal(np.asarray(other), expected.squeeze())
    (tmp_path / 'image.tga').write_bytes(data)
    read, frame = cv2.VideoCapture(str(tmp_path / 'image.tga'), cv2.CAP_FFMPEG).read()
    assert read and np.array_equal(frame[:, :, ::-1], (expected if channels > 1 else expected.repeat(3, 2))[:, :, :3])
    picture = read_picture(tmp_path / 'image.tga')
    assert np.array_equal(picture.pixels, expected) and not picture.metadata.lost


@pytest.mark.parametrize('options', [{}, {'rle': True}, {'orientation': 1}, {'orientation': 1, 'rle': True}])
@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA'])
def test_what_pillow_writes(read, mode, options):
    if mode == '1' and 'rle' in options:
        pytest.skip('Pillow writes no such file')
    image = Image.fromarray(pixels(channels=4) // 9 * 9)
    image = image.convert('RGB').quantize(11) if mode == 'P' else image.convert(mode)
    file = io.BytesIO()
    image.save(file, 'TGA', **options)
    expected = image.convert({'1': 'L', 'P': 'RGB'}.get(mode, mode))
    assert np.array_equal(read(file.getvalue()).pixels.squeeze(), expected)


@pytest.mark.parametrize('corner', [0x00, 0x10, 0x20, 0x30])
def test_the_four_corners(read, corner):
    """The first pixel is at the bottom left, bottom right, top left or top right (field 5.6)."""
    image = pixels()
    stored = image[:: 1 if corner & 0x20 else -1, :: -1 if corner & 0x10 else 1, ::-1]
    assert np.array_equal(read(header(2, 24, corner) + stored.tobytes()).pixels, image)


def test_runs_that_go_on_in_the_next_row(read):
    values = bytes([0x80 | 99, 7, 0x80 | 99, 8, 20]) + bytes(range(21))
    expected = np.repeat([7, 8], 100).tolist() + list(range(21))
    image = read(header(11, 8, 0x20) + values).pixels
    assert image.ravel().tolist() == expected


def test_colors_of_five_bits(read):
    """The bit left over is no alpha, whatever the descriptor says."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (13, 17)).astype('<u2')
    for descriptor in (0x20, 0x21):
        picture = read(header(2, 16, descriptor) + values.tobytes())
        exact = np.dstack([values >> 10 & 31, values >> 5 & 31, values & 31]) * (255 / 31)
        assert picture.pixels.shape == (13, 17, 3) and np.abs(picture.pixels - exact).max() < 1


@pytest.mark.parametrize('entries', ['colors', 'alpha', 'no alpha'])
def test_a_palette_with_alpha(read, entries):
    palette = np.random.default_rng(0).integers(0, 256, (5, 4), np.uint8)
    if entries == 'no alpha':
        palette[:, 3] = 0  # all of them: it is not meant
    stored = palette if entries != 'colors' else palette[:, :3]
    values = np.random.default_rng(1).integers(2, 7, (13, 17), np.uint8)  # the first entry is number 2
    head = header(1, 8, 0x20, palette=(1, 2, 5, 8 * stored.shape[1]))
    expected = palette[:, [2, 1, 0, 3]][values - 2]
    read_pixels = read(head + stored.tobytes() + values.tobytes()).pixels
    assert np.array_equal(read_pixels, expected if entries == 'alpha' else expected[:, :, :3])


def test_whether_the_fourth_channel_is_alpha(read):
    image = pixels(channels=4)
    rows = image[:, :, [2, 1, 0, 3]].tobytes()
    told, not_told = header(2, 32, 0x28) + rows, header(2, 32, 0x20) + rows
    for data, channels, has_alpha, kinds in (
        (told, 4, True, []),
        (not_told, 3, False, ['channels that are not alpha']),
        (with_extension(told, 0), 3, False, ['channels that are not alpha']),
        (with_extension(told, 1), 3, False, ['channels that are not alpha']),
        (with_extension(told, 2), 4, False, []),
        (with_extension(told, 3), 4, True, []),
        (
            header(2, 32, 0x20) + (image & [255, 255, 255, 0])[:, :, [2, 1, 0, 3]].astype(np.uint8).tobytes(),
            3,
            False,
            [],
        ),
    ):
        picture = read(data)
        assert np.array_equal(picture.pixels, image[:, :, :channels]), channels
        assert kinds_left_out(picture, 'png') == kinds and (channels == 3 or picture.has_alpha == has_alpha)


def test_premultiplied_colors_are_divided_by_alpha(read):
    image = pixels(channels=4)
    image[..., :3] = np.minimum(image[..., :3], image[..., 3:])
    picture = read(with_extension(header(2, 32, 0x28) + image[:, :, [2, 1, 0, 3]].tobytes(), 4))
    colors = image[..., :3] * 255.0 / np.maximum(image[..., 3:], 1)
    assert np.abs(picture.pixels[..., :3] - colors).max() <= 0.5 and np.array_equal(
        picture.pixels[..., 3], image[..., 3]
    )


def test_texts_and_gamma_are_told(read):
    rows = pixels()[:, :, ::-1].tobytes()
    assert kinds_left_out(read(header(2, 24, 0x20, text=4) + b'Text' + rows), 'png') == ['TGA texts']
    data = with_extension(header(2, 24, 0x20) + rows, 0, b'Author', (22, 10))
    assert kinds_left_out(read(data), 'tga') == ['TGA gamma', 'TGA texts']
    assert kinds_left_out(read(with_extension(header(2, 24, 0x20) + rows, 0, b' ', (1, 1))), 'tga') == []


def test_what_it_cannot_hold():
    metadata = Metadata(Resolution(11811, 5906, 'm'), b'<x/>', b'IPTC', b'Said')
    kinds = ['a color profile', 'EXIF', 'IPTC', 'JPEG comment', 'resolution', 'XMP']
    assert kinds_left_out(Picture(pixels(), b'profile', {271: 'Camera'}, metadata), 'tga') == kinds
    assert kinds_left_out(Picture(pixels(), None, {274: 1, 282: 72.0, 283: 72.0, 296: 2}), 'tga') == []


@pytest.mark.parametrize(
    'wrong',
    [
        header(0, 24),  # no image
        header(4, 24),
        header(2, 15),
        header(1, 8),  # no palette
        header(1, 8, palette=(1, 0, 0, 24)),  # an empty one
        header(2, 24, palette=(0, 0, 3, 0)),  # sizes of one that is not there
        header(2, 24, width=0),
        header(2, 24, 0x40),  # reserved
        b'\0\0\2\0\1\0\x20\x20' + bytes(40),  # a mouse pointer (CUR)
        b'\0\0\1\0\1\0\x20\x20' + bytes(40),  # an icon
        b'These are no pixels, and many of them.',
    ],
)
def test_what_is_no_tga(read, wrong):
    assert not is_tga(wrong)
    with pytest.raises(InputError, match='is not a PNG, .* TGA, JPEG 2000 or AVIF image'):
        read(wrong + bytes(2000))
