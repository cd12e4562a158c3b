"""What several test files share: reference data beside the repository, a tiny paired dataset, small images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_run import TINY_OPTIONS, write_pairs

import lora_sr  # noqa: F401  (plugs into BasicSR, before a test file imports it)

SHARED = Path(__file__).resolve().parents[2] / 'shared'


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker('gpu') and not torch.cuda.is_available():
        pytest.skip('there is no GPU')


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder `shared` beside the repository, with golden tensors and official weights."""
    if not SHARED.is_dir():
        pytest.skip(f'there is no folder {SHARED} with reference data')
    return SHARED


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


@pytest.fixture(scope='session')
def pairs(tmp_path_factory) -> Path:
    """A folder with `gt`, `lq`, `gt.lmdb` and `lq.lmdb`: eight 2x pairs of 32x32 and 16x16 pixels. Do not change it."""
    root = tmp_path_factory.mktemp('pairs')
    write_pairs(root)
    return root


@pytest.fixture
def basicsr_log(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """`caplog` of BasicSR's logger, which hands nothing on from its first use, whichever test that is in."""
    from basicsr.utils import get_root_logger

    monkeypatch.setattr(get_root_logger(), 'propagate', True)
    return caplog


@pytest.fixture
def tiny_options(pairs, tmp_path) -> Path:
    """An option file for six iterations of a tiny network on the CPU; with it goes the folder to run in, its parent."""
    file = tmp_path / 'tiny.yml'
    file.write_text(TINY_OPTIONS.format(root=pairs, suffix='', backend='disk'))
    return file
