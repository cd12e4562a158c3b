"""Colors under alpha 0, against distances measured one by one."""

import numpy as np
import pytest

from lora_sr.images.alpha import without_hidden_colors


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('channels', [2, 4])
def test_hidden_pixels_get_the_color_of_a_near_one(channels, dtype):
    pixels = np.random.default_rng(0).integers(1, 255, (23, 31, channels)).astype(dtype)
    pixels[..., -1] *= np.random.default_rng(1).random((23, 31)) < 0.05
    filled = without_hidden_colors(pixels)
    is_seen = pixels[..., -1] > 0
    assert np.array_equal(filled[..., -1], pixels[..., -1]) and np.array_equal(filled[is_seen], pixels[is_seen])
    places = np.argwhere(is_seen)
    for y, x in np.argwhere(~is_seen):
        distances = np.hypot(*(places - (y, x)).T)
        near = places[distances <= 1.05 * distances.min()]  # OpenCV's distances are not exact
        assert any(np.array_equal(filled[y, x, :-1], pixels[other][:-1]) for other in map(tuple, near))


@pytest.mark.parametrize('alpha', [0, 1, 255])
def test_nothing_changes_where_all_or_nothing_is_visible(alpha):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    pixels[..., 3] = alpha
    assert without_hidden_colors(pixels.copy()).tobytes() == pixels.tobytes()
