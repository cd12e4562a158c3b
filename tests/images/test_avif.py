"""AVIF, as Pillow and OpenCV read and write it."""

import io
import struct

import cv2
import numpy as np
import pytest
from pictures import pixels
from PIL import Image, ImageCms, features

from lora_sr.errors import InputError
from lora_sr.images import formats
from lora_sr.images.encoding import encode_picture, kinds_left_out
from lora_sr.images.formats import Picture
from lora_sr.images.metadata import Metadata, Resolution

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
needs_avif = pytest.mark.skipif(not features.check('avif'), reason='this Pillow has no AVIF')


def smooth(channels=3, height=40, width=48):
    image = cv2.GaussianBlur(pixels(channels=4, height=height, width=width), (0, 0), 3)[:, :, [0, 3, 1, 2]]
    return image[:, :, :channels] if channels != 2 else image[:, :, [0, 3]]


def by_pillow(image, **options):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, 'AVIF', **{'quality': 100, 'subsampling': '4:4:4', **options})
    return file.getvalue()


def by_opencv(data):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return image[:, :, None] if image.ndim == 2 else image[:, :, [2, 1, 0, 3][: image.shape[2]]]


@needs_avif
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_what_is_written_is_read_by_others(read, channels):
    image = smooth(channels)
    expected = image[:, :, [0, 0, 0, 1]] if channels == 2 else image
    sizes = []
    for quality, levels in ((60, 40), (95, 9), (100, 4)):
        data = encode_picture(Picture(image, ICC, {271: 'Camera'}), 'avif', quality)
        sizes.append(len(data))
        shown = by_opencv(data)
        assert shown.shape == expected.shape and np.abs(shown.astype(int) - expected).max() <= levels, quality
        picture = read(data)
        assert np.array_equal(picture.pixels, shown) and picture.icc_profile == ICC
        assert picture.exif[271] == 'Camera'
    assert sizes == sorted(set(sizes))


@needs_avif
def test_metadata_goes_and_comes(read):
    picture = Picture(
        pixels(), ICC, {271: 'Camera', 34665: {40962: 5}}, Metadata(Resolution(300, 200, 'inch'), b'<x/>', b'I')
    )
    data = encode_picture(picture, 'avif', 95)
    with Image.open(io.BytesIO(data)) as other:
        exif = other.getexif()
        assert other.info['icc_profile'] == ICC and other.info['xmp'] == b'<x/>'
        assert (exif[271], exif[282], exif[283], exif.get_ifd(34665)[40962]) == ('Camera', 300, 200, 17)
    assert kinds_left_out(picture, 'avif') == ['IPTC'] and kinds_left_out(read(data), 'avif') == []


@needs_avif
@pytest.mark.parametrize('orientation', range(1, 9))
def test_an_orientation_is_applied(read, orientation):
    """AVIF has it as properties of the item (irot, imir), of which Pillow makes EXIF and back."""
    exif = Image.Exif()
    exif[274] = orientation
    image = smooth()
    reference = Image.fromarray(image)
    reference.getexif()[274] = orientation
    picture = read(by_pillow(image, exif=exif))
    expected = cv2.imdecode(np.frombuffer(by_pillow(image), np.uint8), cv2.IMREAD_COLOR_RGB)
    turned = {
        1: expected,
        2: expected[:, ::-1],
        3: expected[::-1, ::-1],
        4: expected[::-1],
        5: expected.swapaxes(0, 1),
        6: np.rot90(expected, -1),
        7: expected[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(expected),
    }[orientation]
    assert np.array_equal(picture.pixels, turned) and picture.exif.get(274, 1) == 1
    with Image.open(io.BytesIO(encode_picture(picture, 'avif', 95))) as other:
        assert other.getexif().get(274, 1) == 1 and other.size == turned.shape[1::-1]


@needs_avif
@pytest.mark.parametrize('depth', [8, 10, 12])
def test_of_more_bits_eight_are_read(read, depth):
    image = smooth()
    deep = image if depth == 8 else image.astype(np.uint16) << depth - 8
    options = (cv2.IMWRITE_AVIF_DEPTH, depth, cv2.IMWRITE_AVIF_QUALITY, 100)
    written, data = cv2.imencode('.avif', deep[:, :, ::-1], options)
    if not written:
        pytest.skip('this OpenCV has no AVIF')
    picture = read(data.tobytes())
    assert picture.pixels.dtype == np.uint8 and np.abs(picture.pixels.astype(int) - image).max() <= 1
    assert kinds_left_out(picture, 'png') == ([] if depth == 8 else ['more than 8 bits'])


@needs_avif
@pytest.mark.parametrize(
    'points, told', [((1, 13), False), ((2, 2), False), ((9, 16), True), ((12, 13), True), ((1, 18), True)]
)
def test_colors_that_are_not_srgb_are_told(read, points, told):
    """Code points of BT.2020 with PQ, of Display P3, and of HLG (ITU-T H.273), where no profile tells them."""
    data = by_pillow(smooth())
    place = data.index(b'colrnclx') + 8
    data = data[:place] + struct.pack('>HH', *points) + data[place + 4 :]
    assert kinds_left_out(read(data), 'png') == (['AVIF color code points'] if told else [])


def test_without_avif_in_pillow(read, monkeypatch):
    data = b'\0\0\0\x20ftypavif' + bytes(99)
    monkeypatch.setattr(formats, 'has_avif', lambda: False)
    monkeypatch.setattr('lora_sr.images.encoding.has_avif', lambda: False)
    with pytest.raises(InputError, match='image must be read by Pillow 11.3 or later, with AVIF, got '):
        read(data)
    with pytest.raises(InputError, match='AVIF must be written by Pillow 11.3 or later, with AVIF, got '):
        encode_picture(Picture(pixels()), 'avif', 95)


@pytest.mark.parametrize('brand', [b'heic', b'isom'])
def test_other_files_of_boxes(read, brand):
    with pytest.raises(InputError, match='is not a PNG, .* or AVIF image'):
        read(b'\0\0\0\x20ftyp' + brand + bytes(999))


@needs_avif
def test_more_pixels_than_are_read(read, monkeypatch):
    monkeypatch.setattr(formats, 'MOST_AVIF_PIXELS', 13 * 17 - 1)
    with pytest.raises(InputError, match='image must have 220 pixels or fewer, as AVIF'):
        read(by_pillow(pixels()))
