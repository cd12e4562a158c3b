"""Small pairs of a camera."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from scenes import scene, taken


@pytest.fixture
def camera(tmp_path):
    """A function: write so many pairs to ``tmp_path/HR`` and ``LR``, and give both folders; ``make`` takes an image."""

    def write(count: int = 8, make=taken) -> tuple[Path, Path]:
        folders = tmp_path / 'HR', tmp_path / 'LR'
        for folder in folders:
            folder.mkdir()
        for number in range(count):
            hr = scene(number)
            for folder, image in zip(folders, (hr, make(hr))):
                cv2.imwrite(str(folder / f'{number:02d}.png'), image)
        return folders

    return write
