"""The bicubic against the published LR images and against MATLAB's algorithm written out in float64."""

import cv2
import numpy as np
import pytest

from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale, bicubic_upscale


@pytest.mark.parametrize(
    'name, scale', [('Set5', 2), ('Set5', 3), ('Set5', 4), ('Set14', 2), ('Set14', 3), ('Set14', 4), ('B100', 4)]
)
def test_equals_the_published_lr_but_for_two_pixels_at_the_border(benchmark_set, name, scale):
    paths = sorted((benchmark_set(name) / f'GTmod{scale}').iterdir())
    assert paths
    for path in paths:
        published = cv2.imread(str(path.parents[1] / f'LRbicx{scale}' / path.name), cv2.IMREAD_UNCHANGED)
        ours = bicubic_downscale(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), scale)
        assert ours.shape == published.shape
        np.testing.assert_array_equal(ours[2:-2, 2:-2], published[2:-2, 2:-2], err_msg=str(path))


def matlab_imresize(image, scale):
    """MATLAB's `imresize.m`, dimension by dimension, pixel by pixel."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    for axis in (0, 1):
        image = np.moveaxis(image, axis, 0)
        length = len(image)
        kernel_width = 4 / min(scale, 1)
        mirrored = [*range(length), *reversed(range(length))]
        rows = []
        for x in range(1, int(np.ceil(length * scale)) + 1):
            u = x / scale + 0.5 * (1 - 1 / scale)
            left = int(np.floor(u - kernel_width / 2))
            indices = range(left, left + int(np.ceil(kernel_width)) + 2)
            weights = [kernel(min(scale, 1) * (u - i)) for i in indices]
            row = sum(
                w / sum(weights) * image[mirrored[(i - 1) % (2 * length)]].astype(np.float64)
                for w, i in zip(weights, indices)
            )
            rows.append(np.floor(np.clip(row, 0, 255) + 0.5).astype(np.uint8))
        image = np.moveaxis(np.stack(rows), 0, axis)
    return image


@pytest.mark.parametrize('size', [(24, 36, 3), (25, 31, 3), (7, 9), (1, 1, 3), (3, 40, 1), (2, 5, 4)])
@pytest.mark.parametrize('scale', [2, 3, 4, 8])
def test_equals_matlabs_algorithm_at_any_size(size, scale):
    rng = np.random.default_rng(0)
    # Extreme values overshoot and are clipped; even steps make the exact halves that rounding has to settle.
    for image in (rng.integers(0, 256, size), rng.choice([0, 255], size), 32 * rng.integers(0, 8, size)):
        image = image.astype(np.uint8)
        np.testing.assert_array_equal(bicubic_downscale(image, scale), matlab_imresize(image, 1 / scale))
        np.testing.assert_array_equal(bicubic_upscale(image, scale), matlab_imresize(image, scale))


def test_blocks_of_rows_make_no_difference(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (95, 64, 3), np.uint8)
    whole = bicubic_downscale(image, 3), bicubic_upscale(image, 2)
    monkeypatch.setattr('lora_sr.images.bicubic.BLOCK_BYTES', 1)
    np.testing.assert_array_equal(bicubic_downscale(image, 3), whole[0])
    np.testing.assert_array_equal(bicubic_upscale(image, 2), whole[1])


def test_scale_1_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (11, 13, 3), np.uint8)
    np.testing.assert_array_equal(bicubic_downscale(image, 1), image)
    np.testing.assert_array_equal(bicubic_upscale(image, 1), image)


@pytest.mark.parametrize(
    'image, scale',
    [
        (np.zeros((8, 8, 3), np.float32), 2),
        (np.zeros((8, 8, 3), np.uint16), 2),
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
