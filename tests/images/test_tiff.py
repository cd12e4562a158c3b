"""TIFF beyond 8 bits, of any layout, as tifffile and OpenCV write it."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from lora_sr.errors import InputError
from lora_sr.images import tiff
from lora_sr.images.encoding import encode_picture, kinds_left_out
from lora_sr.images.formats import Picture, read_picture

HEIGHT, WIDTH = 21, 37
LAYOUTS = {
    'plain': {},
    'strips': {'rowsperstrip': 4},
    'tiles': {'tile': (16, 16)},
    'deflate': {'compression': 'zlib'},
    'deflate-strips': {'compression': 'zlib', 'rowsperstrip': 4},
    'deflate-tiles': {'compression': 'zlib', 'tile': (32, 16)},
}


def values(dtype, channels):
    generator = np.random.default_rng(channels)
    if np.dtype(dtype).kind == 'f':
        return generator.normal(0.5, 2, (HEIGHT, WIDTH, channels)).astype(dtype)
    return generator.integers(1, np.iinfo(dtype).max, (HEIGHT, WIDTH, channels), endpoint=True).astype(dtype)


def write(path, image, planar='contig', alpha='unassalpha', **options):
    channels = image.shape[2]
    stored = image if planar == 'contig' else np.moveaxis(image, 2, 0)
    if channels in (2, 4):
        options['extrasamples'] = [alpha]
    if channels == 1:
        stored, planar = image[:, :, 0], None
    photometric = options.pop('photometric', 'rgb' if channels > 2 else 'minisblack')
    tifffile.imwrite(path, stored, photometric=photometric, planarconfig=planar, **options)


def as_read(image):
    return image.astype(np.float32) if image.dtype.kind == 'f' else image


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint16, np.float16, np.float32, np.float64])
def test_however_it_is_stored(tmp_path, dtype, channels, planar, layout):
    image = values(dtype, channels)
    for order in '<>':
        for big in (False, True)[: 1 + (order == '<')]:
            write(tmp_path / 'image', image, planar, byteorder=order, bigtiff=big, **LAYOUTS[layout])
            picture = read_picture(tmp_path / 'image')
            assert picture.pixels.dtype == (np.uint16 if dtype == np.uint16 else np.float32), (order, big)
            assert np.array_equal(picture.pixels, as_read(image)) and picture.has_alpha, (order, big)


def test_numbers_that_pillow_does_not_read(tmp_path):
    write(tmp_path / 'image', values(np.uint8, 3), byteorder='>', bigtiff=True)
    with pytest.raises(InputError, match='image must be a TIFF or a BigTIFF of little-endian numbers'):
        read_picture(tmp_path / 'image')


@pytest.mark.parametrize('channels', [2, 4])
@pytest.mark.parametrize('layout', ['plain', 'strips', 'deflate-tiles'])
def test_planes_of_eight_bits_beside_alpha(tmp_path, layout, channels):
    image = values(np.uint8, channels)
    write(tmp_path / 'image', image, 'separate', **LAYOUTS[layout])
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, image)


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('layout', ['deflate', 'deflate-strips', 'deflate-tiles'])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_differences_of_whole_numbers(tmp_path, channels, planar, layout, order):
    image = values(np.uint16, channels)
    write(tmp_path / 'image', image, planar, byteorder=order, predictor=True, **LAYOUTS[layout])
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, image)


COMPRESSIONS = {'none': 1, 'LZW': 5, 'Deflate': 8, 'PackBits': 32773}


@pytest.mark.parametrize('compression', COMPRESSIONS)
@pytest.mark.parametrize('predictor', [1, 2, 3])
@pytest.mark.parametrize('dtype', [np.uint16, np.float32, np.float64])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_what_opencv_writes(tmp_path, channels, dtype, predictor, compression):
    """By libtiff, which knows all compressions and both predictors."""
    if predictor > 1 and compression in ('none', 'PackBits') or (predictor == 3 and dtype == np.uint16):
        pytest.skip('libtiff writes no such file')
    image = values(dtype, channels)
    options = (cv2.IMWRITE_TIFF_COMPRESSION, COMPRESSIONS[compression], cv2.IMWRITE_TIFF_PREDICTOR, predictor)
    written, data = cv2.imencode('.tif', image[:, :, [2, 1, 0, 3][:channels]] if channels > 1 else image, options)
    if not written:
        pytest.skip('OpenCV writes no such file')
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        stored = file.pages[0].compression, file.pages[0].predictor
    if stored != (COMPRESSIONS[compression], predictor):
        assert dtype == np.float64
        pytest.skip('OpenCV writes no such file')
    (tmp_path / 'image').write_bytes(data)
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, as_read(image))


@pytest.mark.parametrize('compression', ['tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'lzma', 'zstd'])
@pytest.mark.parametrize('predictor', [1, 2, 3])
def test_what_pillow_writes(tmp_path, predictor, compression):
    image = values(np.float32, 1)[:, :, 0]
    tags = {} if predictor == 1 else {317: predictor}
    Image.fromarray(image).save(tmp_path / 'image.tif', compression=compression, tiffinfo=tags)
    with tifffile.TiffFile(tmp_path / 'image.tif') as file:
        stored = file.pages[0].predictor
    if stored != predictor:
        pytest.skip('Pillow writes no such file')
    assert np.array_equal(read_picture(tmp_path / 'image.tif').pixels[:, :, 0], image)


def test_what_it_means(tmp_path):
    """White is zero, an orientation, and a description beside it; what is no alpha is not said to be."""
    for dtype, top in ((np.uint16, 65535), (np.float32, 1)):
        image = values(dtype, 2)
        write(
            tmp_path / 'image',
            image,
            alpha='unspecified',
            photometric='miniswhite',
            software='Scanner',
            extratags=[(274, 3, 1, 6, True)],
        )
        picture = read_picture(tmp_path / 'image')
        expected = np.rot90(np.dstack([top - image[..., 0], image[..., 1]]), -1)
        assert np.array_equal(picture.pixels, expected) and picture.exif[305] == 'Scanner' and not picture.has_alpha
        assert picture.exif[274] == 1


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('planar', ['contig', 'separate'])
def test_orientation_of_planes_and_of_floating_point(tmp_path, planar, orientation):
    image = values(np.float32, 3)
    write(tmp_path / 'image', image, planar, extratags=[(274, 3, 1, orientation, True)])
    read = read_picture(tmp_path / 'image').pixels
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel])
        turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose, as Pillow has them for orientations
        expected = plane.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else plane
        assert np.array_equal(read[:, :, channel], expected)


@pytest.mark.parametrize('channels', [2, 4])
def test_associated_alpha_of_floating_point(tmp_path, channels):
    image = values(np.float32, channels)
    image[..., -1] = np.clip(image[..., -1], 0, 1)
    write(tmp_path / 'image', image, alpha='assocalpha')
    read = read_picture(tmp_path / 'image').pixels
    alpha = image[..., -1:].astype(np.float64)
    colors = np.where(alpha > 0, image[..., :-1] / np.where(alpha > 0, alpha, 1), 0)
    assert np.allclose(read[..., :-1], colors, 1e-6, 0) and np.array_equal(read[..., -1], image[..., -1])


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_floating_point_is_written(channels):
    """As it is, also beyond 0 to 1; gray with alpha as colors."""
    image = values(np.float32, channels)
    data = encode_picture(Picture(image, b'profile'), 'tiff', 95)
    expected = image[:, :, [0, 0, 0, 1]] if channels == 2 else image
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        assert page.dtype == np.float32 and page.predictor == 1 and page.tags['InterColorProfile'].value == b'profile'
        assert np.array_equal(page.asarray().reshape(expected.shape), expected)
        assert [kind.name for kind in page.extrasamples] == ['UNASSALPHA'] * (channels in (2, 4))
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED).reshape(*expected.shape)
    order = [2, 1, 0, 3][: expected.shape[2]] if channels > 1 else [0]
    assert np.array_equal(read[:, :, order], expected)


@pytest.mark.parametrize('file_format', ['png', 'jp2', 'jpeg', 'bmp', 'tga'])
def test_floating_point_in_other_formats_is_clipped_and_rounded(tmp_path, file_format):
    image = cv2.GaussianBlur(values(np.float32, 3).repeat(4, 0).repeat(4, 1), (0, 0), 4)
    assert image.min() < 0 and image.max() > 1
    (tmp_path / 'image').write_bytes(encode_picture(Picture(image), file_format, 100))
    read = read_picture(tmp_path / 'image').pixels
    peak = 65535 if file_format in ('png', 'jp2') else 255
    assert read.dtype == (np.uint16 if peak == 65535 else np.uint8)
    error = np.abs(read - image.clip(0, 1).astype(np.float64) * peak).max()
    assert error <= (8 if file_format == 'jpeg' else 0.5 + 1e-2)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite(tmp_path, bad):
    image = values(np.float64, 3)
    image[5, 7, 1] = bad  # the last one is beyond float32
    write(tmp_path / 'image', image)
    with pytest.raises(InputError, match='image must have finite values, got NaN or infinity in row 5, counted from 0'):
        read_picture(tmp_path / 'image')


def test_more_channels_than_are_kept(tmp_path):
    image = values(np.float32, 6)
    tifffile.imwrite(
        tmp_path / 'image',
        image,
        photometric='rgb',
        planarconfig='contig',
        extrasamples=['unassalpha'] + 2 * ['unspecified'],
    )
    picture = read_picture(tmp_path / 'image')
    assert np.array_equal(picture.pixels, image[:, :, :4]) and kinds_left_out(picture, 'tiff') == [
        'channels that are not alpha'
    ]


def entries_of(image: np.ndarray, content: bytes, **changed) -> bytes:
    """A TIFF of one strip, with some of its numbers changed, by tag."""
    height, width, channels = image.shape
    bits = image.itemsize * 8
    fields = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 2 if channels > 2 else 1,
        273: 8,
        277: channels,
        278: height,
        279: len(content),
        339: 3 if image.dtype.kind == 'f' else 1,
    }
    fields.update({int(tag[1:]): value for tag, value in changed.items()})
    fields = {tag: value for tag, value in fields.items() if value is not None}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in sorted(fields.items()))
    return (
        struct.pack('<2sHI', b'II', 42, 8 + len(content))
        + content
        + struct.pack('<H', len(fields))
        + entries
        + bytes(4)
    )


@pytest.mark.parametrize(
    'changed, words',
    [
        ({}, None),
        ({'_256': 0}, 'its sizes are impossible'),
        ({'_256': 1 << 31, '_257': 1 << 31}, 'more than 178956970 pixels'),
        ({'_256': 12000, '_257': 12000, '_278': 12000}, 'must have 1 GiB of values or less'),
        ({'_277': 65535}, 'is damaged: it is cut short'),
        ({'_277': 2}, 'must be gray or RGB of 8 or 16 bits or floating point, got 2 channels'),
        ({'_258': 24}, 'got 3 channels of 24 bits, floating point'),
        ({'_262': 5}, 'got 3 channels of 32 bits, floating point'),
        ({'_339': 2}, 'got 3 channels of 32 bits, whole numbers with signs'),
        ({'_259': 7}, 'must be compressed by LZW, .* got compression 7 and predictor 1'),
        ({'_259': 8, '_317': 4}, 'got compression 8 and predictor 4'),
        ({'_273': 1 << 30}, 'is damaged: it is cut short'),
        ({'_279': 1 << 30}, 'is damaged: it is cut short'),
        ({'_279': 10}, 'is damaged: it is cut short'),
        ({'_278': 4}, 'it does not say where all of its pixels are'),
        ({'_273': None}, 'it does not say where all of its pixels are'),
        ({'_284': 2}, 'it does not say where all of its pixels are'),
        (
            {'_322': 1 << 30, '_323': 1 << 30},
            'must be stored in smaller tiles, got 1073741824 x 1073741824 for 37',
        ),
        ({'_322': 16, '_323': 0}, 'its sizes are impossible'),
        ({'_259': 8}, 'is damaged: Error -3'),
        ({'_259': 5}, 'is damaged'),
    ],
)
def test_directories_that_make_no_sense(tmp_path, changed, words):
    image = values(np.float32, 3)
    (tmp_path / 'image').write_bytes(entries_of(image, image.tobytes(), **changed))
    if words is None:
        assert np.array_equal(read_picture(tmp_path / 'image').pixels, image)
        return
    with pytest.raises(InputError, match=words) as caught:
        read_picture(tmp_path / 'image')
    assert str(caught.value).startswith(str(tmp_path / 'image')) and '\n' not in str(caught.value)


@pytest.mark.parametrize('left', [0, 4])
def test_a_flipped_bit_in_what_is_deflated(tmp_path, monkeypatch, left):
    """Also where nothing but the checksum is left to read."""
    image = values(np.float32, 3)
    content = bytearray(zlib.compress(image.tobytes(), 0))  # stored: nothing but the checksum tells
    content[len(content) // 2] ^= 1
    monkeypatch.setattr(tiff, 'INPUT_BYTES', len(content) - left)
    (tmp_path / 'image').write_bytes(entries_of(image, bytes(content), _259=8))
    with pytest.raises(InputError, match='is damaged: .*incorrect data check'):
        read_picture(tmp_path / 'image')


def test_strips_larger_than_pillow_reads(tmp_path, monkeypatch):
    """Of 8 bytes a pixel and more; those that are deflated or not compressed may be of any size."""
    image = values(np.float32, 3)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', HEIGHT * WIDTH)
    for compression in (1, 8):
        data = cv2.imencode('.tif', image, (cv2.IMWRITE_TIFF_COMPRESSION, compression))[1].tobytes()
        (tmp_path / 'image').write_bytes(data)
        assert np.array_equal(read_picture(tmp_path / 'image').pixels, image[:, :, ::-1])
    (tmp_path / 'image').write_bytes(cv2.imencode('.tif', image, (cv2.IMWRITE_TIFF_COMPRESSION, 5))[1].tobytes())
    with pytest.raises(InputError, match='image must be stored in smaller strips or tiles, got some of 0 MiB'):
        read_picture(tmp_path / 'image')


def test_more_strips_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, 'MOST_PIECES', 5)
    write(tmp_path / 'image', values(np.float32, 3), rowsperstrip=4)
    with pytest.raises(InputError, match='image must be stored in 5 strips or tiles or fewer, got 6'):
        read_picture(tmp_path / 'image')


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float64])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('compression', [None, 'zlib'])
def test_tiles_far_larger_than_the_image(tmp_path, compression, planar, dtype):
    """What is beside the image is decompressed as well: of one pixel across, thousands of times as much."""
    image = np.zeros((64, 64, 4), dtype)
    options = {'tile': (64, 64), 'compression': compression, 'extrasamples': ['unassalpha']}
    stored = np.moveaxis(image, 2, 0) if planar == 'separate' else image
    tifffile.imwrite(tmp_path / 'image', stored, photometric='rgb', planarconfig=planar, **options)
    with tifffile.TiffFile(tmp_path / 'image', mode='r+b') as file:
        tags = file.pages[0].tags
        pieces = 1 if planar == 'contig' else 4
        offsets, lengths = tags['TileOffsets'].value, tags['TileByteCounts'].value
        assert len(offsets) == pieces
        tags['ImageWidth'].overwrite(1)
        tags['ImageLength'].overwrite(16 * 4000)
        tags['TileWidth'].overwrite(16384)
        tags['TileLength'].overwrite(16)
        tags['TileOffsets'].overwrite(offsets * 4000)
        tags['TileByteCounts'].overwrite(lengths * 4000)
    with pytest.raises(InputError, match='must be stored in smaller tiles, got 16384 x 16 for 1 x 64000 pixels'):
        read_picture(tmp_path / 'image')


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float64])
def test_tiles_larger_than_the_image(tmp_path, dtype):
    image = np.resize(values(dtype, 3), (300, 1, 3))
    tifffile.imwrite(tmp_path / 'image', image, photometric='rgb', tile=(512, 1024), compression='zlib')
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, as_read(image))


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_strips_that_are_one_and_the_same_place(tmp_path, monkeypatch, dtype):
    """Each is as long as the file, and takes as long to read."""
    monkeypatch.setattr(tiff, 'MOST_SAMPLE_BYTES', 1 << 20)
    image = values(dtype, 3)
    write(tmp_path / 'image', image, rowsperstrip=1, compression='zlib')
    with tifffile.TiffFile(tmp_path / 'image', mode='r+b') as file:
        tags = file.pages[0].tags
        tags['StripByteCounts'].overwrite([1 << 20] * HEIGHT, dtype='I')
    with pytest.raises(InputError, match='is damaged: its strips or tiles are larger than the file'):
        read_picture(tmp_path / 'image')


@pytest.mark.parametrize('tag', [256, 257, 258, 277, 278])
def test_two_sizes(tmp_path, tag):
    """Of which every program takes another."""
    image = values(np.uint16, 3)
    data = bytearray(entries_of(image, image.tobytes()))
    start, entry = struct.unpack_from('<I', data, 4)[0], struct.pack('<HHII', tag, 4, 1, 5)
    (count,) = struct.unpack_from('<H', data, start)
    struct.pack_into('<H', data, start, count + 1)
    (tmp_path / 'image').write_bytes(bytes(data[:-4]) + entry + bytes(4))
    with pytest.raises(InputError, match='is damaged: its directory has several sizes'):
        read_picture(tmp_path / 'image')


def test_a_directory_of_too_many_entries(tmp_path):
    data = struct.pack('<2sHHHQQ', b'II', 43, 8, 0, 16, 70000) + 70000 * struct.pack('<HHQQ', 305, 4, 1, 0)
    (tmp_path / 'image').write_bytes(data + bytes(8))
    with pytest.raises(InputError, match='must have 65535 entries or fewer in its directory, got 70000'):
        read_picture(tmp_path / 'image')


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('planar', ['contig', 'separate'])
def test_long_rows_one_by_one(tmp_path, monkeypatch, planar, layout):
    monkeypatch.setattr(tiff, 'BAND_BYTES', 1)
    image = values(np.float64, 4)
    write(tmp_path / 'image', image, planar, **LAYOUTS[layout])
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, as_read(image))


@pytest.mark.parametrize('compression', [1, 8])
def test_strips_with_more_rows_than_there_are(tmp_path, compression):
    image = values(np.float32, 3)
    content = image.tobytes() + bytes(999)
    content = content if compression == 1 else zlib.compress(content)
    (tmp_path / 'image').write_bytes(entries_of(image, content, _259=compression))
    assert np.array_equal(read_picture(tmp_path / 'image').pixels, image)


def test_rows_at_once_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, 'ROWS_AT_ONCE', 5)
    monkeypatch.setattr(tiff, 'INPUT_BYTES', 100)
    for layout in LAYOUTS.values():
        image = values(np.float32, 3)
        write(tmp_path / 'image', image, **layout)
        assert np.array_equal(read_picture(tmp_path / 'image').pixels, image)
