"""Images that are written in blocks of rows, as read by programs that know nothing of blocks."""

import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from lora_sr.errors import InputError
from lora_sr.images import blocks, encoding
from lora_sr.images.encoding import encode_picture, write_picture
from lora_sr.images.formats import FORMATS, Picture
from lora_sr.images.metadata import Metadata


def photograph(height, width, channels=3, dtype=np.uint8):
    """Smooth, as JPEG likes it, with some noise."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 4)).astype(np.float32)
    smooth = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255)[:, :, :channels]
    return (smooth * {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]).astype(dtype)


def bands_of(image, *lengths):
    return np.split(image, np.cumsum(lengths))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that there are more of them than there are restart markers."""
    monkeypatch.setattr(blocks, 'BLOCK_BYTES', 1000)
    monkeypatch.setattr(encoding, 'LONGEST_RESTART_INTERVAL', 25)


def read(data, file_format):
    """By a decoder that is not the encoder's own library, where there is one."""
    if file_format == 'tiff':
        return tifffile.imread(io.BytesIO(data))
    if file_format in ('webp', 'tga', 'avif'):
        return np.asarray(Image.open(io.BytesIO(data)))
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else image[:, :, [2, 1, 0, 3][: image.shape[2]]]


@pytest.mark.parametrize(
    ('file_format', 'dtype', 'channels'),
    [(name, np.uint8, channels) for name in FORMATS for channels in (1, 3)]
    + [(name, np.uint16, channels) for name in ('png', 'tiff', 'jp2') for channels in (1, 3, 4)]
    + [('tiff', np.float32, channels) for channels in (1, 3, 4)],
)
def test_blocks_are_one_image_to_others(small_blocks, file_format, dtype, channels):
    image = photograph(157, 61, channels, dtype)
    picture = Picture(image[:1], metadata=Metadata(comment=b'Said'))
    file = io.BytesIO()
    quality = 100 if file_format in ('jp2', 'j2k') else 95
    write_picture(file, picture, bands_of(image, 1, 70, 3, 40), image.shape[:2], file_format, quality)
    shown = read(file.getvalue(), file_format)
    if file_format in ('webp', 'avif'):
        whole = encode_picture(Picture(image), file_format, 95)
        assert np.array_equal(shown, read(whole, file_format)) and shown.shape[:2] == (157, 61)
    elif file_format == 'jpeg':  # as Pillow writes it by itself
        whole = io.BytesIO()
        Image.fromarray(image.squeeze()).save(whole, 'jpeg', quality=95, subsampling=0)
        assert np.array_equal(shown, read(whole.getvalue(), 'jpeg'))
        assert np.array_equal(Image.open(file), Image.open(whole)) and Image.open(file).info['comment'] == b'Said'
        markers = [file.getvalue().count(bytes([0xFF, 0xD0 + index])) for index in range(8)]
        assert sum(markers) == 6 and markers[6:] == [0, 0]  # 24 rows a block
    else:
        assert np.array_equal(shown, image.squeeze())


def test_more_blocks_than_restart_markers(small_blocks):
    image = photograph(24 * 20, 61)
    data = encode_picture(Picture(image), 'jpeg', 95)
    whole = io.BytesIO()
    Image.fromarray(image).save(whole, 'jpeg', quality=95, subsampling=0)
    assert np.array_equal(read(data, 'jpeg'), read(whole.getvalue(), 'jpeg'))
    assert [data.count(bytes([0xFF, 0xD0 + index])) for index in range(8)] == [3, 3, 3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize('file_format', FORMATS)
def test_neither_bands_nor_threads_show(small_blocks, file_format):
    image = photograph(157, 61)
    picture = Picture(image, icc_profile=b'\0' * 16 + b'RGB ' + b'\0' * 108)
    expected = encode_picture(picture, file_format, 95)
    with ThreadPoolExecutor(3) as pool:
        for lengths in ((), (156,), (8, 8, 8, 100), tuple(range(1, 17))):
            file = io.BytesIO()
            write_picture(file, picture, bands_of(image, *lengths), (157, 61), file_format, 95, pool.map)
            assert file.getvalue() == expected


@pytest.mark.parametrize('file_format', ['png', 'tiff', 'jpeg'])
def test_rows_are_written_as_they_come(small_blocks, file_format):
    """Before a band is made, those above it are in the file, but for what does not fill a block."""
    image = photograph(240, 61)
    file, sizes = io.BytesIO(), []

    def bands():
        for start in range(0, 240, 48):
            sizes.append(file.tell())
            yield image[start : start + 48]

    write_picture(file, Picture(image[:1]), bands(), (240, 61), file_format, 95)
    grown = np.diff([*sizes, len(file.getvalue())])
    assert grown.min() > 0.5 * grown.max()


@pytest.mark.parametrize('before', [0, 700])
def test_tiff_of_four_gigabytes_and_more(before):
    """Neither a strip nor the directory may end there."""

    class Far(io.BytesIO):
        """Is as far from its beginning as no test can write."""

        def tell(self):
            return super().tell() + (1 << 32) - before

    image = photograph(16, 16)
    with pytest.raises(InputError, match='TIFF cannot hold it: it has 4 GiB or more'):
        write_picture(Far(), Picture(image), [image], (16, 16), 'tiff', 95)


@pytest.mark.parametrize(('bytes_of_a_block', 'strips'), [(1000, 32), (1 << 23, 1)])
def test_strips_of_tiff(monkeypatch, bytes_of_a_block, strips):
    monkeypatch.setattr(blocks, 'BLOCK_BYTES', bytes_of_a_block)
    image = photograph(157, 61)
    exif = {270: 'A photograph', 34665: {36867: '2026:01:01'}}
    data = encode_picture(Picture(image, exif=exif), 'tiff', 95)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert len(file.pages) == 1 and len(page.dataoffsets) == len(page.databytecounts) == strips
        assert page.description == 'A photograph' and page.tags['ExifTag'].value['DateTimeOriginal'] == '2026:01:01'
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB), image)
    assert np.array_equal(Image.open(io.BytesIO(data)), image)
    assert np.array_equal(tifffile.imread(io.BytesIO(data)), image)


@pytest.mark.parametrize(('description', 'kept'), [('{"shape": [4, 5, 3]}', ''), ('A shape', 'A shape')])
def test_the_shape_that_tifffile_notes(description, kept):
    """It is that of the image before: tifffile warns of each that is another."""
    data = encode_picture(Picture(photograph(8, 10), exif={270: description}), 'tiff', 95)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert file.pages[0].description == kept
