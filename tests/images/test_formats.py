"""Image files, against Pillow, OpenCV and tifffile: these read what is written, and write what is read."""

import io
import struct
import sys
import threading
import time
import zlib

import cv2
import numpy as np
import pytest
import tifffile
import torch
from pictures import pixels
from PIL import ExifTags, Image, ImageCms, ImageOps

from lora_sr.errors import InputError
from lora_sr.images.encoding import encode_picture
from lora_sr.images.formats import FORMATS, Picture, read_picture

GRAY_ICC = bytes(16) + b'GRAY' + bytes(108)  # a header (ICC.1, section 7.2) without tags
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
MAKE, ORIENTATION, EXIF_IFD, GPS_IFD = 0x010F, 0x0112, 0x8769, 0x8825
EXPOSURE, WIDTH, HEIGHT, LATITUDE = 0x829A, 0xA002, 0xA003, 2


def exif_of(orientation=1, **sizes) -> Image.Exif:
    exif = Image.Exif()
    exif[MAKE], exif[ORIENTATION] = 'Camera', orientation
    exif[EXIF_IFD] = {EXPOSURE: 0.5, WIDTH: 17, HEIGHT: 13}
    exif[GPS_IFD] = {LATITUDE: (52.0, 30.0, 0.0)}
    return exif


def with_thumbnail(block: bytes, thumbnail: bytes) -> bytes:
    """An EXIF block with a second directory (EXIF 2.3, section 4.5), which Pillow does not write."""
    header, tiff = block[:6], bytearray(block[6:])
    assert tiff[:2] == b'MM'  # big-endian
    (entries,) = struct.unpack_from('>H', tiff, 8)
    struct.pack_into('>I', tiff, 10 + 12 * entries, len(tiff))
    start = len(tiff) + 2 + 3 * 12 + 4
    tiff += struct.pack('>HHHIHH', 3, 259, 3, 1, 6, 0)  # compressed as JPEG
    tiff += struct.pack('>HHII', 513, 4, 1, start) + struct.pack('>HHII', 514, 4, 1, len(thumbnail))
    return header + bytes(tiff) + struct.pack('>I', 0) + thumbnail


def png_of(array: np.ndarray, kind: int, depth: int, *chunks) -> bytes:
    """A PNG without filters, of kinds that no library at hand writes."""

    def chunk(name, content):
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))

    rows = array.astype('>u2' if depth == 16 else 'u1').tobytes()
    stride = len(rows) // len(array)
    lines = b''.join(b'\0' + rows[i : i + stride] for i in range(0, len(rows), stride))
    head = struct.pack('>IIBBBBB', array.shape[1], array.shape[0], depth, kind, 0, 0, 0)
    body = [(b'IHDR', head), *chunks, (b'IDAT', zlib.compress(lines)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(name, content) for name, content in body)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('file_format', ['png', 'tiff'])
def test_what_is_written_is_read_by_others(file_format, dtype, channels):
    image = pixels(dtype, channels)
    exif = {tag: value for tag, value in exif_of().items() if tag not in (EXIF_IFD, GPS_IFD)}
    exif[EXIF_IFD] = {EXPOSURE: 0.5, WIDTH: 5, HEIGHT: 5}
    data = encode_picture(Picture(image, ICC, exif), file_format, 95)
    if file_format == 'tiff':
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            has_colors = channels > 2 or (channels == 2 and dtype == np.uint16)
            expected = image[:, :, [0, 0, 0, 1]] if channels == 2 and has_colors else image
            # tifffile undoes the predictor of 16 bits itself, and that of interleaved channels as well
            assert np.array_equal(page.asarray().reshape(expected.shape), expected)
            assert page.photometric == (tifffile.PHOTOMETRIC.RGB if has_colors else tifffile.PHOTOMETRIC.MINISBLACK)
            assert page.tags['InterColorProfile'].value == ICC
            assert page.tags['Make'].value == 'Camera'
            inner = page.tags['ExifTag'].value
            assert (inner['PixelXDimension'], inner['PixelYDimension'], inner['ExposureTime']) == (17, 13, 0.5)
            assert [kind.name for kind in page.extrasamples] == ['UNASSALPHA'] * (channels in (2, 4))
        return
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    expected = {1: image[:, :, 0], 3: image[:, :, ::-1]}.get(channels)
    if expected is None:  # OpenCV has BGR and alpha for gray and alpha as well
        expected = image[:, :, [0, 0, 0, 1] if channels == 2 else [2, 1, 0, 3]]
    assert read.dtype == dtype and np.array_equal(read, expected)
    with Image.open(io.BytesIO(data)) as other:
        other.load()
        assert other.info['icc_profile'] == ICC
        inner = other.getexif().get_ifd(EXIF_IFD)
        assert (other.getexif()[MAKE], inner[WIDTH], inner[HEIGHT], inner[EXPOSURE]) == ('Camera', 17, 13, 0.5)
        if dtype == np.uint8:
            assert np.array_equal(np.asarray(other).reshape(image.shape), image)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('file_format', ['png', 'tiff'])
def test_what_is_written_is_read_again(tmp_path, file_format, dtype, channels):
    image = pixels(dtype, channels)
    (tmp_path / 'image').write_bytes(encode_picture(Picture(image, ICC), file_format, 95))
    picture = read_picture(tmp_path / 'image')
    if (file_format, dtype, channels) == ('tiff', np.uint16, 2):  # as gray and alpha neither Pillow nor OpenCV read it
        image = image[:, :, [0, 0, 0, 1]]
    assert picture.pixels.dtype == dtype and np.array_equal(picture.pixels, image)
    assert picture.icc_profile == ICC and picture.exif == {}


def test_webp_and_jpeg(tmp_path):
    smooth = cv2.GaussianBlur(pixels(height=40, width=48), (0, 0), 3)
    for channels, file_format, quality, levels in (
        (3, 'jpeg', 95, 4),
        (1, 'jpeg', 95, 4),
        (3, 'webp', 95, 8),
        (3, 'webp', 100, 0),
        (4, 'webp', 100, 0),
        (1, 'webp', 100, 0),
    ):
        image = np.dstack([smooth, smooth[:, :, :1] | 1])[:, :, :channels]
        data = encode_picture(Picture(image, ICC, {MAKE: 'Camera'}), file_format, quality)
        with Image.open(io.BytesIO(data)) as other:
            assert other.format == file_format.upper()
            assert other.info['icc_profile'] == ICC and other.getexif()[MAKE] == 'Camera'
            if file_format == 'jpeg':
                assert other.mode == ('L' if channels == 1 else 'RGB')
                assert {component[1:3] for component in other.layer} == {(1, 1)}  # 4:4:4
            read = np.asarray(other).reshape(*image.shape[:2], -1).astype(int)
        assert np.abs(read - image).max() <= levels, (file_format, channels)
        (tmp_path / 'image').write_bytes(data)
        assert np.array_equal(read_picture(tmp_path / 'image').pixels, read)
    sizes = [len(encode_picture(Picture(smooth), 'jpeg', quality)) for quality in (50, 80, 95)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize('channels', [2, 4])
@pytest.mark.parametrize('file_format, quality, levels', [('webp', 100, 0), ('webp', 95, 8), ('jp2', 100, 0)])
def test_colors_under_alpha_0_are_written(file_format, quality, levels, channels):
    """Encoders like to put others there, that take fewer bytes."""
    image = cv2.GaussianBlur(pixels(channels=4, height=40, width=48), (0, 0), 3)[:, :, [0, 1, 2, 3][-channels:]]
    image[10:, :40, -1] = 0
    with Image.open(io.BytesIO(encode_picture(Picture(image), file_format, quality))) as other:
        read = np.asarray(other)[:, :, [0, 3] if other.mode == 'RGBA' and channels == 2 else slice(None)].astype(int)
    assert np.abs(read - image).max() <= levels and (read[10:, :40, -1] == 0).all()


def test_a_gray_profile_goes_where_gray_goes(tmp_path):
    for file_format, dtype, channels, profile, kept in (
        ('webp', np.uint8, 1, GRAY_ICC, None),
        ('webp', np.uint8, 2, GRAY_ICC, None),
        ('webp', np.uint8, 1, ICC, ICC),
        ('tiff', np.uint16, 2, GRAY_ICC, None),
        ('tiff', np.uint8, 2, GRAY_ICC, GRAY_ICC),
        ('jpeg', np.uint8, 1, GRAY_ICC, GRAY_ICC),
        ('png', np.uint16, 2, GRAY_ICC, GRAY_ICC),
    ):
        image = pixels(dtype, channels)
        (tmp_path / 'image').write_bytes(encode_picture(Picture(image, profile), file_format, 100))
        picture = read_picture(tmp_path / 'image')
        assert picture.icc_profile == kept, (file_format, channels)
        if file_format == 'webp':
            assert np.array_equal(picture.pixels, image[:, :, [0, 0, 0, 1][: channels + 2]])


def palette(has_alpha=False):
    image = Image.fromarray(pixels()).quantize(16)
    if has_alpha:
        image.info['transparency'] = 3
    return image


@pytest.mark.parametrize(
    'write, expected',
    [
        (lambda file: palette().save(file, 'PNG'), lambda: np.asarray(palette().convert('RGB'))),
        (
            lambda file: palette().save(file, 'PNG', transparency=3),
            lambda: np.dstack([np.asarray(palette().convert('RGB')), 255 * (np.asarray(palette()) != 3)]),
        ),
        (
            lambda file: Image.fromarray(pixels()[:, :, 0] > 99).save(file, 'PNG'),
            lambda: 255 * (pixels()[:, :, :1] > 99),
        ),
        (
            lambda file: file.write(png_of(pixels()[:, :, 0], 0, 8, (b'tRNS', struct.pack('>H', pixels()[0, 0, 0])))),
            lambda: np.dstack([pixels()[:, :, 0], 255 * (pixels()[:, :, 0] != pixels()[0, 0, 0])]),
        ),
        (
            lambda file: file.write(
                png_of(pixels(np.uint16)[:, :, 0], 0, 16, (b'tRNS', struct.pack('>H', pixels(np.uint16)[0, 0, 0])))
            ),
            lambda: np.dstack(
                [pixels(np.uint16)[:, :, 0], 65535 * (pixels(np.uint16)[:, :, 0] != pixels(np.uint16)[0, 0, 0])]
            ),
        ),
        (lambda file: tifffile.imwrite(file, pixels(np.uint16), photometric='rgb', byteorder='>'), pixels),
        (lambda file: tifffile.imwrite(file, pixels(np.uint16), photometric='rgb', rowsperstrip=3), pixels),
        (lambda file: file.write(cv2.imencode('.tif', pixels(np.uint16)[:, :, ::-1])[1].tobytes()), pixels),  # LZW
        (lambda file: tifffile.imwrite(file, pixels()[:, :, 0], photometric='miniswhite'), lambda: 255 - pixels()),
        (
            lambda file: tifffile.imwrite(file, pixels(np.uint16)[:, :, 0], photometric='miniswhite'),
            lambda: 65535 - pixels(np.uint16),
        ),
        (
            lambda file: tifffile.imwrite(
                file, np.moveaxis(pixels(), 2, 0), photometric='rgb', planarconfig='separate'
            ),
            pixels,
        ),
    ],
    ids='palette palette-alpha 1-bit gray-trns gray16-trns big-endian strips lzw white0 white0-16 planar'.split(),
)
def test_kinds_of_pixels(tmp_path, write, expected):
    with open(tmp_path / 'image', 'wb') as file:
        write(file)
    read = read_picture(tmp_path / 'image').pixels
    expected = expected(read.dtype) if expected is pixels else expected()
    if expected.ndim == 3 and read.shape[2] == 1:
        expected = expected[:, :, :1]
    assert np.array_equal(read, expected.reshape(*read.shape[:2], -1))
    assert read.dtype in (np.uint8, np.uint16) and read.flags.c_contiguous


def packed(values: np.ndarray, depth: int) -> np.ndarray:
    """Whole bytes of values of 1, 2 or 4 bits."""
    bits = values[..., None] >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)


def interlaced(values: np.ndarray) -> bytes:
    """The rows of Adam7 (PNG, section 8.2), of one byte a value."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    parts = [values[y::high, x::wide] for y, high, x, wide in passes]
    return b''.join(b'\0' + row.tobytes() for part in parts for row in part if row.size)


@pytest.mark.parametrize('depth', [1, 2, 4])
@pytest.mark.parametrize('high_bits', [0, 0xFF00])
def test_a_transparent_gray_of_few_bits(tmp_path, depth, high_bits):
    """Of the two bytes of the transparent value the lowest bits count (PNG, section 11.3.1.1)."""
    values = np.random.default_rng(0).integers(0, 1 << depth, (5, 16))
    transparent = (1 << depth) - 1
    chunk = (b'tRNS', struct.pack('>H', high_bits | transparent))
    data = png_of(packed(values, depth), 0, depth, chunk)
    data = data[:16] + struct.pack('>I', 16) + data[20:]
    (tmp_path / 'image').write_bytes(data[:29] + struct.pack('>I', zlib.crc32(data[12:29])) + data[33:])
    read = read_picture(tmp_path / 'image').pixels
    assert np.array_equal(read, np.dstack([values * 255 // transparent, 255 * (values != transparent)]))


@pytest.mark.parametrize('depth', [8, 16])
def test_a_transparent_color(tmp_path, depth):
    image = pixels(np.uint8 if depth == 8 else np.uint16)
    image[3:5, 4:9] = color = image[0, 0].copy()
    image[6, 6] = color + [0, 0, 1]  # one channel differs
    (tmp_path / 'image').write_bytes(png_of(image, 2, depth, (b'tRNS', color.astype('>u2').tobytes())))
    alpha = np.iinfo(image.dtype).max * (image != color).any(2)
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, np.dstack([image, alpha]))


def test_a_transparent_gray_of_an_interlaced_image(tmp_path):
    image = pixels()[:, :, 0]
    data = png_of(image, 0, 8, (b'tRNS', struct.pack('>H', image[0, 0])))
    head = data[12:28] + b'\1'
    rows = zlib.compress(interlaced(image))
    body = b'IDAT' + rows
    data = data[:12] + head + struct.pack('>I', zlib.crc32(head)) + data[33:47]
    data += struct.pack('>I', len(rows)) + body + struct.pack('>I', zlib.crc32(body)) + b'\0\0\0\0IEND\xaeB`\x82'
    (tmp_path / 'image').write_bytes(data)
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, np.dstack([image, 255 * (image != image[0, 0])]))


def test_a_palette_of_which_some_are_transparent(tmp_path):
    """Colors without an entry in tRNS are opaque (PNG, section 11.3.1.1)."""
    image = palette()
    image.save(tmp_path / 'image', 'PNG', transparency=bytes([0, 90]))
    alpha = np.array([0, 90, *14 * [255]])[np.asarray(image)]
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, np.dstack([np.asarray(image.convert('RGB')), alpha]))


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [2, 4])
def test_associated_alpha_is_divided_by(tmp_path, channels, dtype, order):
    image = pixels(dtype, channels)
    image[..., :-1] = np.minimum(image[..., :-1], image[..., -1:])
    image[0, 0] = 0
    tifffile.imwrite(
        tmp_path / 'image',
        image,
        photometric='rgb' if channels == 4 else 'minisblack',
        planarconfig='contig',
        extrasamples=['assocalpha'],
        byteorder=order,
    )
    read = read_picture(tmp_path / 'image').pixels
    colors = image[..., :-1] * float(np.iinfo(dtype).max) / np.maximum(image[..., -1:], 1)
    assert np.abs(read[..., :-1] - colors).max() <= (0.5 if dtype == np.uint16 else 1)  # Pillow rounds 8 bits down
    assert np.array_equal(read[..., -1], image[..., -1]) and read.dtype == dtype


@pytest.mark.parametrize('file_format', ['png', 'tiff', 'webp'])
def test_divided_colors_are_written_as_such(tmp_path, file_format):
    image = np.full((4, 4, 4), 64, np.uint8)
    tifffile.imwrite(tmp_path / 'image', image, photometric='rgb', extrasamples=['assocalpha'])
    written = Image.open(io.BytesIO(encode_picture(read_picture(tmp_path / 'image'), file_format, 100)))
    assert written.convert('RGBA').getpixel((1, 1)) == (255, 255, 255, 64)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['png8', 'png16', 'tiff8', 'tiff16', 'webp', 'jpeg'])
def test_orientation_is_applied_and_reset(tmp_path, kind, orientation):
    image = pixels()
    block = exif_of(orientation).tobytes()
    path = tmp_path / 'image'
    if kind == 'png16':
        path.write_bytes(png_of(image.astype(np.uint16) * 257, 2, 16, (b'eXIf', block[6:])))
    elif kind.startswith('tiff'):
        stored = image if kind == 'tiff8' else image.astype(np.uint16) * 257
        tifffile.imwrite(path, stored, photometric='rgb', extratags=[(274, 3, 1, orientation, True)])
    else:
        options = {'lossless': True} if kind == 'webp' else {'quality': 100, 'subsampling': 0} if kind == 'jpeg' else {}
        Image.fromarray(image).save(path, kind.rstrip('8'), exif=block, **options)
    reference = Image.fromarray(image)
    reference.getexif()[ORIENTATION] = orientation
    expected = np.asarray(ImageOps.exif_transpose(reference)).astype(int)

    picture = read_picture(path)
    read = picture.pixels if picture.pixels.dtype == np.uint8 else picture.pixels // 257
    assert read.shape == expected.shape
    assert np.abs(read - expected).max() <= (8 if kind == 'jpeg' else 0)
    assert picture.exif[ORIENTATION] == 1
    written = Image.open(io.BytesIO(encode_picture(picture, 'png', 95)))
    assert written.getexif()[ORIENTATION] == 1


@pytest.mark.parametrize('target', ['jpeg', 'webp', 'png', 'tiff'])
def test_exif_tells_the_truth(tmp_path, target):
    block = with_thumbnail(exif_of().tobytes(), b'THUMBNAIL' * 9)
    Image.fromarray(pixels()).save(tmp_path / 'image', 'JPEG', exif=block, icc_profile=ICC)
    assert b'THUMBNAIL' in (tmp_path / 'image').read_bytes()
    with Image.open(tmp_path / 'image') as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)[514] == 81  # it is a thumbnail to others

    picture = read_picture(tmp_path / 'image')
    larger = Picture(pixels(height=26, width=34), picture.icc_profile, picture.exif)
    data = encode_picture(larger, target, 95)
    assert b'THUMBNAIL' not in data
    with Image.open(io.BytesIO(data)) as image:
        exif, inner = image.getexif(), image.getexif().get_ifd(EXIF_IFD)
        assert not exif.get_ifd(ExifTags.IFD.IFD1) and image.info['icc_profile'] == ICC
        assert (exif[MAKE], inner[EXPOSURE], inner[WIDTH], inner[HEIGHT]) == ('Camera', 0.5, 34, 26)
        assert exif.get_ifd(GPS_IFD)[LATITUDE] == (52.0, 30.0, 0.0)


def test_tags_of_a_tiff_do_not_travel(tmp_path):
    """What says how a TIFF's pixels are stored would be a lie in another file."""
    tifffile.imwrite(tmp_path / 'image', pixels(), photometric='rgb', compression='zlib', software='Scanner')
    picture = read_picture(tmp_path / 'image')
    assert picture.exif[305] == 'Scanner'
    assert not {256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 339} & picture.exif.keys()


def test_damaged_exif_does_not_matter(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / 'image', 'PNG', exif=b'Exif\0\0II*\0\xff\xff\xff\x7f')
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, pixels())


def test_images_of_other_kinds(tmp_path):
    frames = [Image.fromarray(pixels()[:, :, i]) for i in range(3)]
    frames[0].save(tmp_path / 'animation.webp', save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / 'pages.tif', save_all=True, append_images=frames[1:])
    Image.fromarray(pixels(channels=4), 'CMYK').save(tmp_path / 'cmyk.jpg')
    tifffile.imwrite(tmp_path / 'signed.tif', pixels()[:, :, 0].astype(np.int8))
    tifffile.imwrite(tmp_path / 'deep.tif', pixels().astype(np.uint32), photometric='rgb', bigtiff=True)
    tifffile.imwrite(tmp_path / 'cmyk.tif', pixels(np.uint16, 4), photometric='separated')
    tifffile.imwrite(tmp_path / 'complex.tif', pixels()[:, :, 0].astype(np.complex64))
    frames[0].save(tmp_path / 'sequence.avif', save_all=True, append_images=frames[1:])
    Image.fromarray(pixels(channels=4), 'CMYK').save(tmp_path / 'cmyk.jp2')
    Image.fromarray(pixels()).save(tmp_path / 'other.gif')
    for name, words in {
        'animation.webp': 'must hold one picture, got 3',
        'pages.tif': 'must hold one picture, got 3',
        'cmyk.jpg': 'must be gray or RGB of 8 or 16 bits, got pixels of the kind CMYK',
        'signed.tif': 'must be gray or RGB of 8 or 16 bits, got 1 channel of 8 bits, whole numbers with signs',
        'deep.tif': 'must be gray or RGB of 8 or 16 bits or floating point, got 3 channels of 32 bits, whole numbers',
        'cmyk.tif': 'must be gray or RGB of 8 or 16 bits or floating point, got 4 channels of 16 bits, whole numbers',
        'complex.tif': 'got 1 channel of 64 bits, of a special format',
        'sequence.avif': 'must hold one picture, got 3',
        'cmyk.jp2': 'must be sRGB, gray, sYCC, or have a profile of RGB, got the color space 12',
        'other.gif': 'not a PNG, JPEG, WebP, TIFF, BMP, TGA, JPEG 2000 or AVIF image',
        'missing.png': 'cannot be read: No such file',
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            read_picture(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    'image, file_format, words',
    [
        (pixels(np.uint16), 'jpeg', 'JPEG cannot hold 16 bits'),
        (pixels(np.uint16), 'bmp', 'BMP cannot hold 16 bits'),
        (pixels(np.uint16), 'avif', 'AVIF cannot hold 16 bits: PNG, TIFF and JPEG 2000 can'),
        (
            pixels(np.uint16),
            'jp2',
            'JPEG 2000 of 16 bits with colors .* 32 pixels or more a side, got 17 x 13: PNG and',
        ),
        (np.zeros((1, 65536, 1), np.uint8), 'tga', 'TGA cannot hold 65536 x 1 pixels, .* 65535 a side'),
        (pixels(np.uint16), 'webp', 'WebP cannot hold 16 bits'),
        (pixels(channels=4), 'jpeg', 'JPEG cannot hold an alpha channel'),
        (np.zeros((1, 16384, 3), np.uint8), 'webp', 'WebP cannot hold 16384 x 1 pixels, .* 16383 a side.*--format png'),
        (np.zeros((65501, 1, 3), np.uint8), 'jpeg', 'JPEG cannot hold 1 x 65501 pixels, .* 65500 a side.*--format png'),
    ],
)
def test_what_a_format_cannot_hold(image, file_format, words):
    with pytest.raises(InputError, match=words):
        encode_picture(Picture(image), file_format, 95)


@pytest.mark.parametrize('size', [(1, 1), (1, 3), (5, 1), (2, 2)])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('file_format', FORMATS)
def test_tiny_images(tmp_path, file_format, channels, size):
    image = np.full((*size, channels), 200, np.uint8)
    (tmp_path / 'image').write_bytes(encode_picture(Picture(image), file_format, 100))
    read = read_picture(tmp_path / 'image').pixels
    assert read.shape[:2] == size and np.abs(read.astype(int) - 200).max() <= 3


@pytest.mark.parametrize('file_format, side', [('jpeg', 65500), ('webp', 16383), ('tga', 65535), ('avif', 32768)])
def test_the_longest_side_that_a_format_holds(file_format, side):
    data = encode_picture(Picture(np.zeros((1, side, 3), np.uint8)), file_format, 95)
    assert Image.open(io.BytesIO(data)).size == (side, 1)


# Pillow's encoder of JPEG 2000 does not let go of the lock.
@pytest.mark.parametrize('file_format', [name for name in FORMATS if name not in ('jp2', 'j2k')])
def test_other_threads_run_while_it_encodes(file_format):
    """Writing beside a network gains nothing where encoding holds the interpreter's lock."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the lock is not taken from its holder, who has to give it up
    shares = []
    try:
        for _ in range(3):  # a busy machine may hold up one of them
            encoding = threading.Thread(target=encode_picture, args=(Picture(pixels), file_format, 95))
            encoding.start()
            times = [time.perf_counter()]
            while encoding.is_alive():
                time.sleep(0)
                times.append(time.perf_counter())
            shares.append(np.diff(times).max() / (times[-1] - times[0]))
    finally:
        sys.setswitchinterval(interval)
    assert min(shares) < 0.4


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('size', [(48, 1), (1, 48), (1, 1), (2, 3)])
def test_thin_images_are_turned(tmp_path, size, orientation):
    """To numpy an axis of one is contiguous in any direction; not so to torch."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.arange(3 * size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0], 3))
    image.save(tmp_path / 'thin.png', exif=exif)
    read = read_picture(tmp_path / 'thin.png').pixels
    assert np.array_equal(read, ImageOps.exif_transpose(Image.open(tmp_path / 'thin.png')))
    torch.from_numpy(read)
