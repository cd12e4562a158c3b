"""Metadata besides color profile and EXIF, as Pillow and tifffile write and read it."""

import functools
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from pictures import pixels
from PIL import Image, ImageCms, IptcImagePlugin, PngImagePlugin, TiffImagePlugin

from lora_sr.errors import InputError
from lora_sr.images.encoding import encode_picture, kinds_left_out
from lora_sr.images.formats import FORMATS, Picture, read_picture
from lora_sr.images.png import MOST_INFLATED, read_chunks

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d" tiff:ImageWidth="%d">'
    b'<exif:PixelYDimension>%d</exif:PixelYDimension></rdf:Description></x:xmpmeta>'
)
CITY = bytes.fromhex('1c025a') + struct.pack('>H', 6) + b'Berlin'  # IPTC-IIM, record 2, data set 90
CICP_OF_PQ, GAMMA_1 = bytes([9, 16, 0, 1]), struct.pack('>I', 100000)


def png_with(*chunks, **options) -> bytes:
    """A PNG with chunks behind its head."""
    file = io.BytesIO()
    IMAGE.save(file, 'PNG', **options)
    data = file.getvalue()
    parts = [
        struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
        for name, content in chunks
    ]
    return data[:33] + b''.join(parts) + data[33:]


def jpeg_with(iptc: bytes = b'', **options) -> bytes:
    file = io.BytesIO()
    IMAGE.save(file, 'JPEG', **options)
    if not iptc:
        return file.getvalue()
    content = b'Photoshop 3.0\x008BIM' + struct.pack('>HHI', 0x0404, 0, len(iptc)) + iptc + b'\0' * (len(iptc) % 2)
    return file.getvalue()[:20] + b'\xff\xed' + struct.pack('>H', len(content) + 2) + content + file.getvalue()[20:]


def read(tmp_path, data: bytes) -> Picture:
    (tmp_path / 'image').write_bytes(data)
    return read_picture(tmp_path / 'image')


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize('place', ['before', 'after'])
def test_chunks_of_a_png_stay_in_a_png(tmp_path, place):
    chunks = [
        (b'cICP', CICP_OF_PQ),
        (b'mDCV', bytes(24)),
        (b'cLLI', bytes(8)),
        (b'gAMA', GAMMA_1),
        (b'cHRM', struct.pack('>8I', *range(1, 9))),
        (b'sRGB', b'\0'),
        (b'pHYs', struct.pack('>IIB', 3000, 2000, 1)),
        (b'tEXt', b'Title\0One'),
        (b'zTXt', b'Long\0\0' + zlib.compress(b'Two' * 99)),
        (b'iTXt', b'Language\0\1\0de\0Sprache\0' + zlib.compress('Drei ä'.encode())),
    ]
    data = png_with(*chunks)
    if place == 'after':  # texts may stand anywhere
        text = data[33 : data.index(b'IDAT') - 4]
        data = data[:33] + data[33 + len(text) : -12] + text[text.index(b'tEXt') - 4 :] + data[-12:]
        chunks = chunks[-3:]
    picture = read(tmp_path, data)
    written = encode_picture(picture, 'png', 95)
    assert set(chunks) <= set(read_chunks(written)) and kinds_left_out(picture, 'png') == []
    names = [name for name, _ in read_chunks(written)]
    assert len(names) == len(set(names)) and names.index(b'IDAT') == len(names) - 2
    image = opened(written)
    assert image.text == {'Title': 'One', 'Long': 'Two' * 99, 'Language': 'Drei ä'}
    assert np.array_equal(np.asarray(image), np.asarray(IMAGE))


@pytest.mark.parametrize(
    'chunks, kinds',
    [
        ([(b'cICP', CICP_OF_PQ), (b'cLLI', bytes(8))], ['PNG cICP', 'PNG cLLI']),
        ([(b'gAMA', GAMMA_1)], ['PNG gAMA']),
        ([(b'gAMA', GAMMA_1), (b'sRGB', b'\0')], []),  # which counts more
        ([(b'gAMA', GAMMA_1), (b'iCCP', b'x\0\0' + zlib.compress(ICC))], []),
        ([(b'gAMA', struct.pack('>I', 45455))], []),  # that of sRGB
        ([(b'cICP', bytes([1, 13, 0, 1]))], []),  # sRGB
        ([(b'tEXt', b'Title\0One'), (b'vpAg', bytes(9))], ['PNG text', 'PNG vpAg']),
        ([(b'iCCP', b'x\0\0damaged')], ['a damaged color profile']),
        ([(b'tIME', bytes(7)), (b'sBIT', bytes([5, 6, 5]))], []),  # not true of the new pixels
    ],
)
@pytest.mark.parametrize('file_format', ['jpeg', 'webp', 'tiff'])
def test_what_other_formats_lose_of_a_png(tmp_path, file_format, chunks, kinds):
    assert kinds_left_out(read(tmp_path, png_with(*chunks)), file_format) == kinds


@pytest.mark.parametrize(
    'unit, expected',
    [
        (1, {'png': (2835, 1417, 1), 'jpeg': (1, 72, 36), 'tiff': (2835 / 100, 1417 / 100, 3)}),
        (0, {'png': (2835, 1417, 0), 'jpeg': (0, 2835, 1417), 'tiff': (2835, 1417, 1)}),
    ],
)
def test_resolution_of_a_png(tmp_path, unit, expected):
    picture = read(tmp_path, png_with((b'pHYs', struct.pack('>IIB', 2835, 1417, unit))))
    written = {file_format: encode_picture(picture, file_format, 95) for file_format in FORMATS}
    assert dict(read_chunks(written['png']))[b'pHYs'] == struct.pack('>IIB', *expected['png'])
    jpeg = opened(written['jpeg']).info
    assert (jpeg['jfif_unit'], *jpeg['jfif_density']) == expected['jpeg']
    for tags in (opened(written['tiff']).tag_v2, opened(written['webp']).getexif()):
        assert (tags[282], tags[283], tags[296]) == pytest.approx(expected['tiff'])


@pytest.mark.parametrize('file_format', ['png', 'jpeg', 'tiff'])
@pytest.mark.parametrize('source', ['JPEG', 'TIFF'])
def test_dots_per_inch(tmp_path, source, file_format):
    IMAGE.save(tmp_path / 'image', source, dpi=(300, 200))
    picture = read_picture(tmp_path / 'image')
    assert opened(encode_picture(picture, file_format, 95)).info['dpi'] == pytest.approx((300, 200), abs=0.01)
    assert kinds_left_out(picture, file_format) == []


def test_a_quarter_turn_turns_resolution_and_xmp(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', (XMP % (6, 12, 8)).decode(), zip=True)
    exif = Image.Exif()
    exif[282], exif[283] = 300.0, 200.0
    turned = Image.fromarray(np.rot90(np.asarray(IMAGE), -1))
    for data in (
        png_with(pnginfo=info, dpi=(300, 200), exif=exif),
        jpeg_with(xmp=XMP % (6, 12, 8), dpi=(300, 200), exif=exif),
    ):
        picture = read(tmp_path, data)
        assert picture.pixels.shape[:2] == (12, 8)
        assert (picture.exif[282], picture.exif[283]) == (200, 300)
        for file_format in ('png', 'jpeg', 'webp', 'tiff', 'avif'):
            image = opened(encode_picture(picture, file_format, 95))
            assert image.info['xmp'] == XMP % (1, 8, 12), file_format
            assert file_format in ('webp', 'avif') or image.info['dpi'] == pytest.approx((200, 300), abs=0.01)
    assert np.array_equal(read(tmp_path, png_with(pnginfo=info)).pixels, np.asarray(turned))


@pytest.mark.parametrize('declared', ['undefined', 'long'])
def test_iptc(tmp_path, declared):
    tifffile.imwrite(
        tmp_path / 'image',
        np.asarray(IMAGE),
        photometric='rgb',
        extratags=[
            (
                33723,
                *((7, len(CITY), CITY) if declared == 'undefined' else (4, 3, np.frombuffer(CITY + b'\0', '<u4'))),
                True,
            )
        ],
    )
    for picture in (read(tmp_path, jpeg_with(CITY)), read_picture(tmp_path / 'image')):
        for file_format in ('jpeg', 'tiff'):
            image = opened(encode_picture(picture, file_format, 95))
            assert IptcImagePlugin.getiptcinfo(image)[2, 90] == b'Berlin'
            assert kinds_left_out(picture, file_format) == []
        assert [kinds_left_out(picture, file_format) for file_format in ('png', 'webp')] == [['IPTC'], ['IPTC']]


def test_comment_of_a_jpeg(tmp_path):
    picture = read(tmp_path, jpeg_with(comment=b'Said'))
    assert opened(encode_picture(picture, 'jpeg', 95)).info['comment'] == b'Said'
    assert kinds_left_out(picture, 'jpeg') == [] and kinds_left_out(picture, 'png') == ['JPEG comment']


def test_segments_that_a_jpeg_cannot_hold(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', 'x' * 65536)
    picture = read(tmp_path, png_with(pnginfo=info, dpi=(1e6, 1e6)))
    assert kinds_left_out(picture, 'jpeg') == ['resolution', 'XMP']
    assert 'xmp' not in opened(encode_picture(picture, 'jpeg', 95)).info


def test_exif_in_a_text_is_exif(tmp_path):
    """As ImageMagick wrote it before PNG had eXIf: in hexadecimal digits."""
    exif = Image.Exif()
    exif[274], exif[271] = 6, 'Camera'
    block = exif.tobytes()
    text = f'\nexif\n{len(block):8}\n{block.hex()}\n'.encode()
    picture = read(tmp_path, png_with((b'zTXt', b'Raw profile type exif\0\0' + zlib.compress(text))))
    assert picture.pixels.shape[:2] == (12, 8) and picture.exif[271] == 'Camera'
    image = opened(encode_picture(picture, 'png', 95))
    assert image.getexif()[271] == 'Camera' and image.getexif()[274] == 1 and image.text == {}


@pytest.mark.parametrize('large', [2**21, 2**25])
def test_large_texts_and_profiles_are_read(tmp_path, large):
    profile = ICC + bytes(large)
    chunks = [(b'zTXt', b'k\0\0' + zlib.compress(b'a' * large)), (b'iCCP', b'x\0\0' + zlib.compress(profile[:large]))]
    picture = read(tmp_path, png_with(*chunks))
    assert picture.icc_profile == profile[:large] and np.array_equal(picture.pixels, np.asarray(IMAGE))
    assert chunks[0] in read_chunks(encode_picture(picture, 'png', 95))


@functools.cache
def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


@pytest.mark.parametrize(
    'name, start, pieces',
    [(b'zTXt', b'k\0\0', 1), (b'iTXt', b'k\0\1\0\0\0', 1), (b'iCCP', b'k\0\0', 1), (b'zTXt', b'k\0\0', 5)],
    ids=['zTXt', 'iTXt', 'iCCP', 'many'],
)
def test_what_inflates_without_end_is_refused(tmp_path, name, start, pieces):
    size = 4 * MOST_INFLATED if pieces == 1 else MOST_INFLATED // 4
    data = png_with(*pieces * [(name, start + zeros(size))])
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match='image must have texts and a profile of 64 MiB or less in all, got more'):
            read(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 3 * MOST_INFLATED
    finally:
        tracemalloc.stop()


def test_sizes_without_end_are_refused(tmp_path):
    head = struct.pack('>IIBBBBB', 100000, 100000, 8, 2, 0, 0, 0)
    data = png_with()
    data = data[:16] + head + struct.pack('>I', zlib.crc32(b'IHDR' + head)) + data[33:]
    with pytest.raises(InputError, match='image has more than 178956970 pixels'):
        read(tmp_path, data)


@pytest.mark.parametrize('name', [b'a\x1b[m', b'a\nbc', b'a\xa0\x85b'])
def test_names_of_chunks_are_printable(tmp_path, name):
    (lost,) = read(tmp_path, png_with((name, b'content'))).metadata.lost
    assert lost.startswith('PNG a') and lost.isprintable()


@pytest.mark.parametrize('tag', [700, 33723, 34675, 282, 283])
@pytest.mark.parametrize(
    'value',
    [(3, (9,)), (3, (9, 8)), (11, (1.5,)), (12, (1e308,)), (12, (float('nan'),)), (5, (3, 0)), (2, 'text'), (9, (-1,))],
)
@pytest.mark.parametrize('file_format', ['png', 'tiff', 'jpeg', 'webp'])
def test_tags_of_any_type(tmp_path, tag, value, file_format):
    """What describes an image may be anything: the image is read, and written in every format."""
    kind, content = value
    if tag in (282, 283) and kind in (3, 9):
        pytest.skip('Pillow writes no such tag')
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory.tagtype[tag] = kind
    directory[tag] = TiffImagePlugin.IFDRational(*content) if kind == 5 else content if kind == 2 else tuple(content)
    directory[282 if tag != 282 else 283] = 72.0
    Image.fromarray(pixels()).save(tmp_path / 'image.tif', tiffinfo=directory)
    picture = read_picture(tmp_path / 'image.tif')
    assert np.array_equal(picture.pixels, pixels())
    encode_picture(picture, file_format, 95)
