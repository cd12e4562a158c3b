"""Damaged and huge files: a sentence for each, and no memory without a bound."""

import io
import struct

import cv2
import numpy as np
import pytest
from pictures import pixels
from PIL import Image

from lora_sr.errors import InputError
from lora_sr.images.encoding import encode_picture
from lora_sr.images.formats import Picture, read_picture


def damaged_files() -> dict:
    files = {'text.png': b'These are no pixels.\n', 'empty.png': b''}
    for name, (dtype, file_format) in {
        'cut.png': (np.uint8, 'png'),
        'cut16.png': (np.uint16, 'png'),
        'cut.tif': (np.uint8, 'tiff'),
        'cut16.tif': (np.uint16, 'tiff'),
        'cut.jpg': (np.uint8, 'jpeg'),
        'cut.webp': (np.uint8, 'webp'),
    }.items():
        files[name] = encode_picture(Picture(pixels(dtype)), file_format, 95)[:-100]
    for name, dtype in (('flipped.png', np.uint8), ('flipped16.png', np.uint16)):
        data = bytearray(encode_picture(Picture(pixels(dtype)), 'png', 95))
        data[len(data) // 2] ^= 1
        files[name] = bytes(data)
    return files


@pytest.mark.parametrize('name', damaged_files())
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged_files()[name])
    with pytest.raises(InputError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.count('\n') == 0 and 'BytesIO' not in message
    assert 'damaged' in message


@pytest.mark.parametrize('beginning', [b'', b'x', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'II*\0'])
def test_huge_files_are_not_read(tmp_path, beginning):
    with open(tmp_path / 'huge.png', 'wb') as file:
        file.write(beginning)
        file.truncate(100 << 30)  # takes no place on the disk
    is_image = len(beginning) > 2
    words = 'must be an image of less than 2 GiB, got 100.0 GiB' if is_image else 'is not a PNG, JPEG, WebP, TIFF, BMP'
    with pytest.raises(InputError, match=words):
        read_picture(tmp_path / 'huge.png')


def test_more_pixels_than_pillow_reads(tmp_path, monkeypatch):
    (tmp_path / 'large.png').write_bytes(encode_picture(Picture(pixels()), 'png', 95))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 13 * 17 // 2 - 1)
    with pytest.raises(InputError, match='large.png has more than 218 pixels, the most that are read'):
        read_picture(tmp_path / 'large.png')


@pytest.mark.parametrize('raised', [MemoryError, lambda: cv2_error_of_memory()])
def test_short_memory_is_no_damage(tmp_path, monkeypatch, raised):
    def fail(*args):
        raise raised()

    (tmp_path / 'image.png').write_bytes(encode_picture(Picture(pixels(np.uint16)), 'png', 95))
    monkeypatch.setattr(cv2, 'imdecode', fail)
    with pytest.raises(InputError, match='image.png needs more memory than there is') as caught:
        read_picture(tmp_path / 'image.png')
    assert 'damaged' not in str(caught.value)


def cv2_error_of_memory() -> cv2.error:
    error = cv2.error('Insufficient memory')
    error.code = -4  # CV_StsNoMem
    return error


def test_a_jpeg_of_far_too_few_bytes(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, 'jpeg')
    data = bytearray(file.getvalue())
    frame = data.index(b'\xff\xc0')
    data[frame + 5 : frame + 9] = struct.pack('>HH', 13000, 13000)
    (tmp_path / 'bomb.jpg').write_bytes(data)
    with pytest.raises(InputError, match='is damaged: it is far too short for 13000 x 13000 pixels'):
        read_picture(tmp_path / 'bomb.jpg')
    Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(
        tmp_path / 'flat.jpg', quality=1, optimize=True, progressive=True
    )
    assert read_picture(tmp_path / 'flat.jpg').pixels.shape == (4000, 4000, 1)
