"""Shifts and colors of pairs whose shifts and colors are known, and pairs put right."""

import math

import cv2
import numpy as np
import pytest

from lora_sr.data.registration import align, register
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale

MARGIN = 40


@pytest.fixture(scope='module')
def scene():
    """An image with detail of all sizes, larger by a margin at each side than what is used of it."""
    random, size = np.random.default_rng(0), (320, 360)
    octaves = [cv2.resize(random.random((size[0] // n, size[1] // n, 3)), size[::-1]) * n for n in (4, 8, 16, 40)]
    image = sum(octaves)
    return np.uint8(20 + 215 * (image - image.min()) / np.ptp(image))


def shifted(scene, x, y):
    """The scene as it looks where things are (x, y) pixels further to the right and below."""
    return scene[MARGIN - y : scene.shape[0] - MARGIN - y, MARGIN - x : scene.shape[1] - MARGIN - x]


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize(('x', 'y'), [(0, 0), (1, -2), (5, 3), (-12, 12), (0, 24)])
def test_shift(scene, scale, x, y):
    hr, lr = shifted(scene, 0, 0), bicubic_downscale(shifted(scene, x, y), scale)
    found = register(hr, lr[: hr.shape[0] // scale, : hr.shape[1] // scale], scale)
    assert found.shift == pytest.approx((x / scale, y / scale), abs=0.06)
    assert found.correlation > 0.97


def test_colors(scene):
    hr, lr = shifted(scene, 0, 0), bicubic_downscale(shifted(scene, 2, 0), 2).astype(float)
    lr = np.uint8(np.round(lr * [0.8, 0.9, 1.0] + [30, 10, -5]).clip(0, 255))
    found = register(hr, lr, 2)
    assert found.gain == pytest.approx((0.8, 0.9, 1.0), abs=0.01)
    assert found.offset == pytest.approx((30, 10, -5), abs=1.5)
    assert found.color == pytest.approx(30 - 0.2 * 64, abs=1)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize(('x', 'y'), [(4, -6), (-3, 5), (1, 0)])
def test_a_pair_put_right_is_one_that_was_never_wrong(scene, bits, x, y):
    """Nothing is resampled, so that what is left is the error of the gain, and of rounding."""
    hr, moved = shifted(scene, 0, 0), shifted(scene, x, y)
    if bits == 16:
        hr, moved = hr.astype(np.uint16) * 257, moved.astype(np.uint16) * 257
    lr = bicubic_downscale(moved, 2)
    right, lr = align(hr, lr, 2, register(hr, lr, 2))
    assert right.shape[:2] == tuple(2 * length for length in lr.shape[:2])
    expected = bicubic_downscale(right, 2).astype(float)[3:-3, 3:-3]
    peak = np.iinfo(hr.dtype).max
    assert np.abs(expected - lr[3:-3, 3:-3]).max() <= 0.008 * peak
    unaligned = bicubic_downscale(hr, 2).astype(float)[: len(expected), : expected.shape[1]]
    assert np.abs(unaligned - lr[: len(expected), : expected.shape[1]]).max() > 0.02 * peak


def test_images_without_detail():
    flat = np.full((64, 64, 3), 90, np.uint8)
    found = register(flat, flat[:32, :32], 2)
    assert math.hypot(*found.shift) < 1 and found.gain == (1, 1, 1) and found.offset == pytest.approx((0, 0, 0))


def test_small_images():
    with pytest.raises(InputError, match='at least 16 pixels each way, got 15 x 40'):
        register(np.zeros((80, 30, 3), np.uint8), np.zeros((40, 15, 3), np.uint8), 2)


def test_real_pairs_lie_where_their_authors_have_put_them(shared):
    folder = shared / 'data' / 'city100_iphone_x2' / 'test'
    for file in sorted((folder / 'HR').iterdir()):
        found = register(cv2.imread(str(file)), cv2.imread(str(folder / 'LR' / file.name)), 2)
        assert math.hypot(*found.shift) < 0.2 and found.correlation > 0.98 and found.color < 10
