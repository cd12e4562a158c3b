"""What several test files share: the folder of reference data beside the repository, and a tiny paired data set."""

from pathlib import Path

import pytest
from tiny_run import TINY_OPTIONS, write_pairs

import lora_sr  # noqa: F401  (plugs into BasicSR, before a test file imports it)

SHARED = Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared() -> Path:
    """The folder `shared` beside the repository, with golden tensors and official weights."""
    if not SHARED.is_dir():
        pytest.skip(f'there is no folder {SHARED} with reference data')
    return SHARED


@pytest.fixture(scope='session')
def pairs(tmp_path_factory) -> Path:
    """A folder with `gt`, `lq`, `gt.lmdb` and `lq.lmdb`: eight 2x pairs of 32x32 and 16x16 pixels. Do not change it."""
    root = tmp_path_factory.mktemp('pairs')
    write_pairs(root)
    return root


@pytest.fixture
def tiny_options(pairs, tmp_path) -> Path:
    """An option file for six iterations of a tiny network on the CPU; with it goes the folder to run in, its parent."""
    file = tmp_path / 'tiny.yml'
    file.write_text(TINY_OPTIONS.format(root=pairs, suffix='', backend='disk'))
    return file
