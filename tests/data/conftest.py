"""Small images that the tests make, and the published sets where they are at hand."""

from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture
def benchmark_set(shared):
    """A function: the folder of a published test set."""
    return lambda name: shared / 'data' / 'benchmark' / name


@pytest.fixture
def make_images():
    """A function: write images of given sizes, different in content, to a folder that it makes."""

    def make(folder: Path, sizes, names=None, suffix='.png') -> Path:
        folder.mkdir(parents=True)
        for number, (height, width) in enumerate(sizes, 1):
            noise = np.random.default_rng(number).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
            image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
            cv2.imwrite(str(folder / f'{names[number - 1] if names else f"{number:04d}"}{suffix}'), image)
        return folder

    return make
