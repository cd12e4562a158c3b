"""The bicubic against the published LR images and against MATLAB's algorithm written out in float64."""

import cv2
import numpy as np
import pytest

from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale, bicubic_upscale


@pytest.mark.parametrize(
    'name, scale', [('Set5', 2), ('Set5', 3), ('Set5', 4), ('Set14', 2), ('Set14', 3), ('Set14', 4), ('B100', 4)]
)
def test_equals_the_published_lr_bit_by_bit(benchmark_set, name, scale):
    paths = sorted((benchmark_set(name) / f'GTmod{scale}').iterdir())
    assert paths
    for path in paths:
        published = cv2.imread(str(path.parents[1] / f'LRbicx{scale}' / path.name), cv2.IMREAD_UNCHANGED)
        original = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(bicubic_downscale(original, scale), published, err_msg=str(path))
        mirrored = bicubic_downscale(original, scale, 'mirror')
        np.testing.assert_array_equal(mirrored[2:-2, 2:-2], published[2:-2, 2:-2], err_msg=str(path))
        assert (mirrored != published).any()  # what the docs say of it


@pytest.mark.parametrize('border, first', [('replicate', 64), ('mirror', 70)])
def test_what_lies_beyond_the_edge(border, first):
    # At 1 / 2 the kernel is (-3, -9, 29, 111, 111, 29, -9, -3) / 256. Replicated, the first pixel of 128 counts
    # -3 - 9 + 29 + 111 = 128 times in the first result; mirrored, 29 + 111 = 140 times. -12 times is clipped to 0.
    row = np.zeros((2, 8), np.uint8)
    row[:, 0] = 128
    np.testing.assert_array_equal(bicubic_downscale(row, 2, border), [[first, 0, 0, 0]])
    np.testing.assert_array_equal(bicubic_downscale(row[:, ::-1].T, 2, border), [[0], [0], [0], [first]])


def matlab_imresize(image, scale, border):
    """MATLAB's `imresize.m`, dimension by dimension, pixel by pixel; of an early release it replicates the edges."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    dtype = image.dtype
    for axis in (0, 1):
        image = np.moveaxis(image, axis, 0)
        length = len(image)
        kernel_width = 4 / min(scale, 1)
        if border == 'mirror':
            aux = [*range(length), *reversed(range(length))]
            source = {i: aux[(i - 1) % (2 * length)] for i in range(-200, 200 + length)}
        else:
            source = {i: min(max(1, i), length) - 1 for i in range(-200, 200 + length)}
        rows = []
        for x in range(1, int(np.ceil(length * scale)) + 1):
            u = x / scale + 0.5 * (1 - 1 / scale)
            left = int(np.floor(u - kernel_width / 2))
            indices = range(left, left + int(np.ceil(kernel_width)) + 2)
            weights = [kernel(min(scale, 1) * (u - i)) for i in indices]
            row = sum(w / sum(weights) * image[source[i]].astype(np.float64) for w, i in zip(weights, indices))
            rows.append(np.floor(np.clip(row, 0, np.iinfo(dtype).max) + 0.5).astype(dtype))
        image = np.moveaxis(np.stack(rows), 0, axis)
    return image


@pytest.mark.parametrize('size', [(24, 36, 3), (25, 31, 3), (7, 9), (1, 1, 3), (3, 40, 1), (2, 5, 4)])
@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize('border', ['replicate', 'mirror'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_equals_matlabs_algorithm_at_any_size(size, scale, border, dtype):
    rng, most = np.random.default_rng(0), np.iinfo(dtype).max
    # Extreme values overshoot and are clipped; even steps make the exact halves that rounding has to settle.
    for image in (
        rng.integers(0, most + 1, size),
        rng.choice([0, most], size),
        (most + 1) // 8 * rng.integers(0, 8, size),
    ):
        image = image.astype(dtype)
        np.testing.assert_array_equal(
            bicubic_downscale(image, scale, border), matlab_imresize(image, 1 / scale, border)
        )
        np.testing.assert_array_equal(bicubic_upscale(image, scale, border), matlab_imresize(image, scale, border))


def test_blocks_of_rows_make_no_difference(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (95, 64, 3), np.uint8)
    whole = bicubic_downscale(image, 3), bicubic_upscale(image, 2)
    monkeypatch.setattr('lora_sr.images.bicubic.BLOCK_BYTES', 1)
    np.testing.assert_array_equal(bicubic_downscale(image, 3), whole[0])
    np.testing.assert_array_equal(bicubic_upscale(image, 2), whole[1])


def test_the_largest_sums_do_not_overflow():
    for dtype in (np.uint8, np.uint16):
        white = np.full((33, 35), np.iinfo(dtype).max, dtype)
        for scale in (5, 7, 11, 13, 16):
            assert (bicubic_downscale(white, scale) == white[0, 0]).all()
            assert (bicubic_upscale(white, scale) == white[0, 0]).all()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_scale_1_changes_nothing(dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (11, 13, 3), dtype)
    np.testing.assert_array_equal(bicubic_downscale(image, 1), image)
    np.testing.assert_array_equal(bicubic_upscale(image, 1), image)


@pytest.mark.parametrize(
    'image, scale',
    [
        (np.zeros((8, 8, 3), np.float32), 2),
        (np.zeros((8, 8, 3), np.int16), 2),
        (np.zeros((0, 8, 3), np.uint8), 2),
        (np.zeros(8, np.uint8), 2),
        (np.zeros((8, 8), np.uint8), 0),
        (np.zeros((8, 8), np.uint8), 2.5),
        (np.zeros((8, 8), np.uint8), 17),
    ],
)
def test_refuses_what_it_cannot_resize(image, scale):
    with pytest.raises(InputError, match=', got '):
        bicubic_downscale(image, scale)


def test_refuses_another_border():
    with pytest.raises(InputError, match='must be replicate or mirror, got reflect.'):
        bicubic_upscale(np.zeros((8, 8), np.uint8), 2, 'reflect')
