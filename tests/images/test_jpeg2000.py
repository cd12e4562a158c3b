"""JPEG 2000, as Pillow and OpenCV read and write it; what is patched in follows ISO/IEC 15444-1."""

import io
import struct
from itertools import permutations

import cv2
import numpy as np
import pytest
from pictures import pixels
from PIL import Image, ImageCms

from lora_sr.errors import InputError
from lora_sr.images.boxes import boxes_in, make_box
from lora_sr.images.encoding import encode_picture, kinds_left_out
from lora_sr.images.formats import Picture
from lora_sr.images.metadata import Metadata, Resolution

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
XMP = bytes.fromhex('be7acfcb97a942e89c71999491e3afac')
LARGE = {'height': 33, 'width': 40}  # OpenCV takes no smaller ones


def by_opencv(data, flag=cv2.IMREAD_UNCHANGED):
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    return image[:, :, None] if image.ndim == 2 else image[:, :, [2, 1, 0, 3][: image.shape[2]]]


def by_pillow(image, **options):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, 'JPEG2000', **options)
    return file.getvalue()


def with_depth(data, depth):
    """Samples of so many bits in place of 16 (A.5.1, I.5.3.1)."""
    data = bytearray(data)
    start = data.index(b'\xff\x4f\xff\x51')
    (channels,) = struct.unpack_from('>H', data, start + 40)
    data[start + 42 : start + 42 + 3 * channels : 3] = bytes([depth - 1]) * channels
    data[data.index(b'ihdr') + 14] = depth - 1
    return bytes(data)


def with_header(data, change):
    """A JP2 file whose header has the boxes that ``change`` makes of (type, content)."""
    return b''.join(
        make_box(
            box.kind,
            b''.join(
                make_box(*pair)
                for inner in boxes_in(data, box.start, box.stop)
                for pair in change(inner.kind, data[inner.start : inner.stop])
            )
            if box.kind == b'jp2h'
            else data[box.start : box.stop],
        )
        for box in boxes_in(data)
    )


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('file_format', ['jp2', 'j2k'])
def test_without_loss(read, file_format, dtype, channels):
    """At 100; of 16 bits at any quality."""
    image = pixels(dtype, channels, **LARGE)
    data = encode_picture(Picture(image, ICC), file_format, 100 if dtype == np.uint8 else 50)
    assert data.startswith(b'\xff\x4f\xff\x51' if file_format == 'j2k' else b'\0\0\0\x0cjP  ')
    expected = image[:, :, [0, 0, 0, 1]] if channels == 2 and dtype == np.uint16 else image
    if expected.shape[2] != 2:
        assert by_opencv(data).dtype == dtype and np.array_equal(by_opencv(data), expected)
    if dtype == np.uint8 or channels == 1:
        with Image.open(io.BytesIO(data)) as other:
            assert np.array_equal(np.asarray(other), expected.squeeze())
    picture = read(data)
    assert picture.pixels.dtype == dtype and np.array_equal(picture.pixels, expected)
    assert picture.icc_profile == (ICC if file_format == 'jp2' else None)


def test_quality_is_psnr(read):
    """18 dB and 0.3 more for each step."""
    image = cv2.GaussianBlur(pixels(height=96, width=128), (0, 0), 1.5)
    for quality in (20, 50, 80, 95):
        written = by_opencv(encode_picture(Picture(image), 'jp2', quality))
        assert cv2.PSNR(written, image) == pytest.approx(18 + 0.3 * quality, abs=1.5)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_what_pillow_writes(read, channels):
    image = pixels(channels=channels)
    for options in ({}, {'no_jp2': True}, {'tile_size': (8, 8)}, {'progression': 'RPCL', 'num_resolutions': 2}):
        assert np.array_equal(read(by_pillow(image, **options)).pixels, image), options


@pytest.mark.parametrize('depth', [9, 10, 12, 15])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_bits_between_8_and_16_are_spread_over_the_whole_range(read, channels, depth):
    values = np.random.default_rng(0).integers(0, 1 << depth, (33, 40, channels))
    values[0, 0], values[0, 1] = 0, (1 << depth) - 1
    # The middle of the range is what is coded as 0 (G.1).
    stored = (values + (1 << 15) - (1 << depth - 1)).astype(np.uint16)
    bgr = stored if channels == 1 else stored[:, :, [2, 1, 0, 3][:channels]]
    data = cv2.imencode('.jp2', bgr, (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000))[1].tobytes()
    image = read(with_depth(data, depth)).pixels
    assert image.dtype == np.uint16 and np.abs(image - values * 65535 / ((1 << depth) - 1)).max() <= 0.5


@pytest.mark.parametrize('depth', [1, 2, 4, 7])
def test_fewer_than_8_bits(read, depth):
    values = np.random.default_rng(0).integers(0, 1 << depth, (12, 9))
    stored = (values + (1 << 7) - (1 << depth - 1)).astype(np.uint8)
    image = read(with_depth(by_pillow(stored), depth)).pixels[:, :, 0]
    assert np.abs(image - values * 255 / ((1 << depth) - 1)).max() <= 0.5


def with_palette(data, colors, mapping, depth=8):
    """Colors in a header (I.5.3.4) and what of components is mapped to them (I.5.3.5)."""

    def change(kind, content):
        if kind == b'colr':
            yield kind, content[:3] + struct.pack('>I', 16)
            count, columns = colors.shape
            yield b'pclr', struct.pack('>HB', count, columns) + bytes([depth - 1]) * columns + colors.tobytes()
            if mapping is not None:
                yield b'cmap', b''.join(struct.pack('>HBB', *entry) for entry in mapping)
        elif kind != b'cdef':
            yield kind, content

    return with_header(data, change)


@pytest.mark.parametrize('depth', [3, 8])
@pytest.mark.parametrize('columns', [(0, 1, 2), (2, 1, 0), (1, 1, 1), (0, 1, 2, 3), (3, 0, 2, 1)])
def test_a_palette(read, columns, depth):
    """Also of colors that are there twice, and of columns in another order."""
    colors = np.random.default_rng(0).integers(0, 256, (6, 1 + max(columns)), np.uint8)
    colors[2] = colors[0]
    values = np.random.default_rng(1).integers(0, 6, (33, 40), np.uint8)
    stored = values + (1 << 7) - (1 << depth - 1)
    data = with_depth(by_pillow(stored.astype(np.uint8)), depth)
    data = with_palette(data, colors, [(0, 1, column) for column in columns])
    expected = colors[values][:, :, list(columns)]
    assert np.array_equal(read(data).pixels, expected)
    if (columns, depth) == ((0, 1, 2), 8):  # OpenCV takes colors for as few bits, and refuses other orders
        assert np.array_equal(by_opencv(data, cv2.IMREAD_COLOR), expected)


@pytest.mark.parametrize('mapping', [None, [(0, 1, 0)]])
def test_a_palette_of_gray(read, mapping):
    values = np.random.default_rng(1).integers(0, 5, (12, 9), np.uint8)
    colors = np.uint8([[200], [3], [90], [3], [255]])
    assert np.array_equal(read(with_palette(by_pillow(values), colors, mapping)).pixels, colors[values])


def test_a_palette_beside_alpha(read):
    """Indices, of which those beyond the last color are the last one, and a component that has none."""
    colors = np.random.default_rng(0).integers(0, 256, (5, 3), np.uint8)
    values = np.random.default_rng(1).integers(0, 9, (33, 40, 2), np.uint8)
    data = with_palette(by_pillow(values), colors, [(0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0)])
    expected = np.dstack([colors[values[:, :, 0].clip(max=4)], values[:, :, 1]])
    assert np.array_equal(read(data).pixels, expected)


def with_definitions(data, definitions):
    """Channels, their types, and the colors that they are (I.5.3.6)."""
    content = struct.pack('>H', len(definitions)) + b''.join(struct.pack('>3H', *entry) for entry in definitions)
    return with_header(
        data,
        lambda kind, old: (
            [] if kind == b'cdef' else [(kind, old)] + [(b'cdef', content)] * (kind == b'colr' and bool(definitions))
        ),
    )


def orders(channels):
    """Which channel each component is; a second or fourth channel is alpha."""
    return list(permutations(range(channels)))


def definitions_of(order):
    is_alpha = [len(order) in (2, 4) and channel == len(order) - 1 for channel in order]
    entries = [(number, int(alpha), 0 if alpha else order[number] + 1) for number, alpha in enumerate(is_alpha)]
    return entries[::-1]  # the entries have no order of their own


def written(image):
    """A JP2 file without loss, the components as they are."""
    if image.dtype == np.uint8:
        return by_pillow(image, mct=0)
    image = image[:, :, [2, 1, 0, 3][: image.shape[2]]]
    return cv2.imencode('.jp2', image, (cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000))[1].tobytes()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('order', orders(3) + orders(4))
def test_channels_in_any_order(read, order, dtype):
    """As OpenCV reads them, which leaves it to OpenJPEG; Pillow heeds no order."""
    image = pixels(dtype, len(order), **LARGE)
    data = with_definitions(written(np.ascontiguousarray(image[:, :, order])), definitions_of(order))
    assert np.array_equal(by_opencv(data), image)
    assert np.array_equal(read(data).pixels, image)


@pytest.mark.parametrize('order', orders(2))
def test_gray_and_alpha_in_any_order(read, order):
    image = pixels(channels=2)
    picture = read(with_definitions(written(np.ascontiguousarray(image[:, :, order])), definitions_of(order)))
    assert np.array_equal(picture.pixels, image) and picture.has_alpha


@pytest.mark.parametrize('definition', [(0, 0, 1), (0, 0, 0), (0, 65535, 65535)])
def test_one_channel_has_no_order(read, definition):
    image = pixels(channels=1)
    assert np.array_equal(read(with_definitions(by_pillow(image), [definition])).pixels, image)


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_luma_and_chroma_in_any_order(read, order):
    image = pixels()
    data = with_definitions(written(np.ascontiguousarray(image[:, :, order])), definitions_of(order))
    expected = Image.fromarray(image, 'YCbCr').convert('RGB')
    assert np.array_equal(read(with_header(data, with_color_space(18))).pixels, expected)


def test_a_palette_in_another_order(read):
    """The channels are those that the palette makes."""
    colors = np.random.default_rng(0).integers(0, 256, (5, 3), np.uint8)
    values = np.random.default_rng(1).integers(0, 5, (33, 40), np.uint8)
    data = with_palette(by_pillow(values), colors, [(0, 1, column) for column in range(3)])
    data = with_definitions(data, definitions_of((2, 1, 0)))
    assert np.array_equal(by_opencv(data, cv2.IMREAD_COLOR), colors[values][:, :, ::-1])
    assert np.array_equal(read(data).pixels, colors[values][:, :, ::-1])


@pytest.mark.parametrize(
    'definitions',
    [
        [(0, 0, 1), (1, 0, 2)],
        [(0, 0, 1), (1, 0, 2), (2, 0, 2)],
        [(0, 0, 1), (1, 0, 2), (3, 0, 3)],
        [(0, 0, 1), (1, 0, 2), (1, 0, 3)],
        [(0, 0, 1), (1, 0, 2), (2, 0, 4)],
        [(0, 0, 1), (1, 0, 2), (2, 1, 0)],
        [(0, 0, 0), (1, 0, 0), (2, 0, 0)],
        [(0, 0, 1), (1, 0, 2), (2, 0, 3), (2, 1, 0)],
        [(0, 65535, 65535)] * 10000,
    ],
)
def test_channels_that_make_no_sense(read, definitions):
    with pytest.raises(
        InputError, match='must define its channels as gray or RGB and one more at most, got '
    ) as caught:
        read(with_definitions(by_pillow(pixels()), definitions))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize('file_format', ['jp2', 'j2k'])
@pytest.mark.parametrize('profile', [None, ICC])
def test_opencv_has_nothing_to_tell(read, capfd, file_format, profile):
    """Neither of a file without a color space, nor of one whose color space is a profile."""
    data = encode_picture(Picture(pixels(np.uint16, **LARGE), profile), file_format, 100)
    assert read(data).pixels.dtype == np.uint16
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('kind, has_alpha', [(1, True), (2, True), (65535, False)])
def test_what_the_fourth_channel_is(read, kind, has_alpha):
    image = pixels(channels=4)
    image[..., :3] = np.minimum(image[..., :3], image[..., 3:])

    def change(name, content):
        yield name, content[:-4] + struct.pack('>HH', kind, 0) if name == b'cdef' else content

    picture = read(with_header(by_pillow(image), change))
    colors = image[..., :3] * (255.0 / np.maximum(image[..., 3:], 1) if kind == 2 else 1.0)
    assert picture.has_alpha == has_alpha and np.array_equal(picture.pixels[..., 3], image[..., 3])
    assert np.abs(picture.pixels[..., :3] - colors).max() < 0.501


def with_color_space(number):
    return lambda kind, content: [(kind, content[:3] + struct.pack('>I', number) if kind == b'colr' else content)]


def test_luma_and_chroma(read):
    image = Image.fromarray(pixels(), 'YCbCr')
    picture = read(with_header(by_pillow(pixels()), with_color_space(18)))
    assert np.array_equal(picture.pixels, image.convert('RGB'))


def test_metadata_goes_and_comes(read):
    picture = Picture(
        pixels(), ICC, {271: 'Camera', 34665: {40962: 5}}, Metadata(Resolution(11811, 5906, 'm'), b'<x/>', b'IPTC')
    )
    data = encode_picture(picture, 'jp2', 100)
    with Image.open(io.BytesIO(data)) as other:
        assert other.info['dpi'] == pytest.approx((300, 150), rel=1e-4)
    # As ExifTool names the place: an UUID box of these 16 letters, and a TIFF.
    block = data[data.index(b'uuidJpgTiffExif->JP2') + 20 :]
    exif = Image.Exif()
    exif.load(b'Exif\0\0' + block)
    assert exif[271] == 'Camera' and exif.get_ifd(34665)[40962] == 17
    again = read(data)
    assert (again.icc_profile, again.exif[271]) == (ICC, 'Camera') and kinds_left_out(again, 'jp2') == []
    assert again.metadata == picture.metadata
    assert kinds_left_out(picture, 'j2k') == ['a color profile', 'EXIF', 'IPTC', 'resolution', 'XMP']


@pytest.mark.parametrize('dots', [0.7, 72, 300, 1200, 1e6])
def test_resolution_of_any_size(read, dots):
    picture = Picture(pixels(), metadata=Metadata(Resolution(dots, 2 * dots, 'inch')))
    with Image.open(io.BytesIO(encode_picture(picture, 'jp2', 100))) as other:
        assert other.info['dpi'] == pytest.approx((dots, 2 * dots), rel=1e-4)


def test_an_orientation_in_exif_is_applied(read):
    exif = Image.Exif()
    exif[274] = 6
    data = by_pillow(pixels()) + make_box(b'uuid', b'JpgTiffExif->JP2' + exif.tobytes()[6:])
    picture = read(data)
    assert np.array_equal(picture.pixels, np.rot90(pixels(), -1)) and picture.exif[274] == 1


def test_boxes_that_are_not_kept_are_told(read):
    data = by_pillow(pixels()) + make_box(b'xml ', b'<gml/>') + make_box(b'uuid', bytes(16))
    assert kinds_left_out(read(data), 'jp2') == ['JPEG 2000 uuid', 'JPEG 2000 xml']


@pytest.mark.parametrize('outcome', [False, cv2.error('no codec')])
def test_an_opencv_that_does_not_encode_it(monkeypatch, outcome):
    def imencode(*_):
        if outcome is False:
            return False, ()
        raise outcome

    monkeypatch.setattr(cv2, 'imencode', imencode)
    with pytest.raises(InputError, match='JPEG 2000 cannot hold it: OpenCV does not encode it'):
        encode_picture(Picture(pixels(np.uint16, **LARGE)), 'jp2', 95)


def test_what_is_refused(read):
    plain = by_pillow(pixels())
    start = plain.index(b'\xff\x4f\xff\x51')

    def patched(place, content):
        return plain[: start + place] + content + plain[start + place + len(content) :]

    deep = cv2.imencode('.jp2', pixels(np.uint16, **LARGE))[1].tobytes()
    colors = np.zeros((5, 3), np.uint8)
    mapping = [(0, 1, 0), (0, 1, 1), (0, 1, 2)]
    deep_palette = with_palette(deep, colors, mapping)
    gray = by_pillow(pixels(channels=1))
    for data, words in (
        (
            with_header(plain, with_color_space(12)),
            'must be sRGB, gray, sYCC, or have a profile of RGB, got the color space 12',
        ),
        (with_header(plain, with_color_space(14)), 'got the color space 14'),
        (
            encode_picture(Picture(pixels(), bytes(16) + b'CMYK' + bytes(108)), 'jp2', 100),
            'or have a profile of RGB, got CMYK',
        ),
        (patched(40, b'\0\5'), 'must have 1 to 4 channels, got 5'),
        (patched(42, b'\x87'), 'must have channels of equally many bits, 16 at most, and without a sign'),
        (patched(42, b'\x8f\1\1\x8f\1\1\x8f'), 'and without a sign'),
        (patched(46, b'\2'), 'must have all channels in full resolution'),
        (patched(8, struct.pack('>2I', 20000, 20000)), 'must have 201326592 values or fewer in all its channels'),
        (patched(8, struct.pack('>2I', 0, 0)), 'is damaged: its sizes are impossible'),
        (patched(24, struct.pack('>2I', 8, 8)), 'is damaged: it has 1 of 6 tiles'),
        (patched(24, struct.pack('>2I', 0, 0)), 'is damaged: it has 1 of 0 tiles'),
        (plain + make_box(b'jp2c', plain[start:]), 'must hold one picture, got 2'),
        (plain[: start - 8], 'is damaged: it has no pixels'),
        (plain + make_box(b'free', b'') * 70000, 'must have 65536 boxes or fewer beside each other'),
        (with_header(deep, with_color_space(18)), 'of more than 8 bits, as JPEG 2000, got sYCC'),
        (deep_palette, 'of more than 8 bits, as JPEG 2000, got a palette'),
        (with_palette(gray, colors, mapping, depth=16), 'must have a palette of 8 bits'),
        (with_palette(gray, colors[:0], mapping), 'is damaged: its palette makes no sense'),
        (with_palette(gray, colors, [(0, 1, 3)]), 'is damaged: its palette makes no sense'),
        (with_palette(gray, colors, [(1, 1, 0)]), 'is damaged: its palette makes no sense'),
        (with_palette(gray, colors, [(0, 2, 0)]), 'is damaged: its palette makes no sense'),
        (with_palette(gray, colors, [(0, 1, 0)] * 5), 'is damaged: its palette makes no sense'),
        (
            with_header(gray, lambda kind, content: [(kind, content), (b'pclr', b'\0\5\3\7\7\7\0')]),
            'is damaged: its palette is cut short',
        ),
        (
            with_header(plain, lambda kind, content: [(kind, content), (b'cdef', b'\0\1\0\0\0')]),
            'is damaged: its channel definitions are cut short',
        ),
    ):
        with pytest.raises(InputError, match=words) as caught:
            read(data)
        assert '\n' not in str(caught.value)
