"""Gray and alpha of 16 bits in a TIFF, which neither Pillow nor OpenCV reads, as tifffile writes it."""

import numpy as np
import pytest
import tifffile

from lora_sr.images.formats import read_picture

GRAY_ALPHA = np.random.default_rng(0).integers(1, 65536, (21, 37, 2)).astype(np.uint16)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'rowsperstrip': 4},
        {'tile': (16, 16)},
        {'compression': 'zlib'},
        {'compression': 'zlib', 'predictor': True, 'rowsperstrip': 4},
        {'compression': 'zlib', 'predictor': True, 'tile': (16, 16)},
    ],
    ids='plain strips tiles deflate predictor predictor-tiles'.split(),
)
@pytest.mark.parametrize('order', '<>')
def test_however_it_is_stored(tmp_path, order, options):
    tifffile.imwrite(
        tmp_path / 'image',
        GRAY_ALPHA,
        photometric='minisblack',
        planarconfig='contig',
        extrasamples=['unassalpha'],
        byteorder=order,
        **options,
    )
    picture = read_picture(tmp_path / 'image')
    assert picture.pixels.dtype == np.uint16 and np.array_equal(picture.pixels, GRAY_ALPHA) and picture.has_alpha


def test_what_it_means(tmp_path):
    """White is zero, an orientation, and a description beside it; what is no alpha is not said to be."""
    tifffile.imwrite(
        tmp_path / 'image',
        GRAY_ALPHA,
        photometric='miniswhite',
        planarconfig='contig',
        extrasamples=['unspecified'],
        software='Scanner',
        extratags=[(274, 3, 1, 6, True)],
    )
    picture = read_picture(tmp_path / 'image')
    expected = np.rot90(np.dstack([65535 - GRAY_ALPHA[..., 0], GRAY_ALPHA[..., 1]]), -1)
    assert np.array_equal(picture.pixels, expected) and picture.exif[305] == 'Scanner' and not picture.has_alpha
