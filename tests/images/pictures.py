"""Pixels for the tests of image files."""

import numpy as np


def pixels(dtype=np.uint8, channels=3, height=13, width=17):
    generator = np.random.default_rng(channels)
    if dtype == np.float32:
        return generator.random((height, width, channels), dtype)
    values = generator.integers(0, np.iinfo(dtype).max, (height, width, channels), endpoint=True)
    return values.astype(dtype)
