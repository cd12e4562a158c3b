"""Damaged and huge files: a sentence for each, and no memory without a bound."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from pictures import pixels
from PIL import Image

from lora_sr.errors import InputError
from lora_sr.images.encoding import encode_picture
from lora_sr.images.formats import FORMATS, Picture, read_picture


def damaged_files() -> dict:
    files = {'text.png': b'These are no pixels.\n', 'empty.png': b''}
    for name, (dtype, file_format) in {
        'cut.png': (np.uint8, 'png'),
        'cut16.png': (np.uint16, 'png'),
        'cut.tif': (np.uint8, 'tiff'),
        'cut16.tif': (np.uint16, 'tiff'),
        'cut.jpg': (np.uint8, 'jpeg'),
        'cut.webp': (np.uint8, 'webp'),
        'cut.bmp': (np.uint8, 'bmp'),
        'cut.tga': (np.uint8, 'tga'),
        'cut.jp2': (np.uint8, 'jp2'),
        'cut.j2k': (np.uint8, 'j2k'),
        'cut.avif': (np.uint8, 'avif'),
        'cut_float.tif': (np.float32, 'tiff'),
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


def changed(data: bytes, place: int, content: bytes) -> bytes:
    return data[:place] + content + data[place + len(content) :]


def huge_files() -> dict:
    """Small files that say they are large, with the bytes that a program would need to believe them."""
    wide = struct.pack('<2l', 13000, 13000)
    bmp = changed(encode_picture(Picture(pixels()), 'bmp', 95), 18, wide)
    runs = changed(encode_picture(Picture(pixels(channels=1)), 'bmp', 95), 18, wide)
    tga = changed(encode_picture(Picture(pixels()), 'tga', 95), 12, struct.pack('<2H', 13000, 13000))
    j2k = encode_picture(Picture(pixels()), 'j2k', 95)
    tiled = changed(j2k, 8, struct.pack('>2I', 8000, 8000))
    avif = encode_picture(Picture(pixels()), 'avif', 95)
    place = avif.index(b'ispe') + 8
    strip = zlib.compress(bytes(1 << 22))
    tiff = encode_picture(Picture(pixels().astype(np.float32)), 'tiff', 95)
    return {
        'rows.bmp': bmp,
        'runs.bmp': changed(runs, 30, b'\1')[:1078] + b'\0\0' * 100_000,
        'negative.bmp': changed(bmp, 18, struct.pack('<2l', -13000, 13000)),
        'rows.tga': tga,
        'runs.tga': changed(tga, 2, b'\x0a')[:18] + b'\xff\0\0\0' * 100_000,
        'tiles.j2k': tiled,
        'small_tiles.j2k': changed(tiled, 24, struct.pack('>2I', 1, 1)),
        'many_tiles.j2k': changed(changed(j2k, 8, struct.pack('>2I', 255, 257)), 24, struct.pack('>2I', 1, 1)),
        'samples.j2k': changed(j2k, 8, struct.pack('>2I', 13000, 13000)),
        'channels.j2k': changed(j2k, 40, b'\x40\0'),
        'sizes.avif': changed(avif, place, struct.pack('>2I', 13000, 13000)),
        'boxes.avif': avif[:12] + struct.pack('>I4sQ', 1, b'meta', 1 << 62) + avif[12:],
        'strip.tif': changed(tiff, 8, strip),
    }


@pytest.mark.parametrize('name', huge_files())
def test_sizes_that_are_not_there(tmp_path, name):
    """A sentence, soon, and without the memory that the sizes would take: in a process with little of it."""
    path = tmp_path / name
    path.write_bytes(huge_files()[name])
    done = subprocess.run([sys.executable, '-c', READ, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    message, peak = done.stdout.splitlines()
    assert message.startswith(str(path))
    assert any(words in message for words in (' is damaged', ' must have ', ' has more than 178956970 pixels'))
    assert float(peak) < 2e9


READ = """
import resource, sys
from lora_sr.errors import InputError
from lora_sr.images.formats import read_picture
try:
    read_picture(sys.argv[1])
except InputError as error:
    print(error)
print([int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0])
"""


@pytest.mark.parametrize('file_format', FORMATS)
def test_any_flipped_byte(tmp_path, file_format):
    """What comes is pixels or a sentence."""
    data = encode_picture(Picture(pixels(height=33, width=40), b'profile', {271: 'Camera'}), file_format, 90)
    generator = np.random.default_rng(0)
    for number in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, min(len(data), 200) if number % 2 else len(data), 3):
            damaged[place] ^= generator.integers(1, 256)
        (tmp_path / 'image').write_bytes(damaged[: None if number % 3 else generator.integers(1, len(data))])
        try:
            read_picture(tmp_path / 'image')
        except InputError as error:
            assert str(error).startswith(f'{tmp_path / "image"} ') and str(error).isprintable()


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
