"""LR images without ground truth: patches against the images that they are of."""

from collections import Counter

import cv2
import numpy as np
import pytest
from basicsr.data import build_dataset
from tiny_run import write_pairs


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp('lr')
    write_pairs(root / 'a', count=3, gt_size=20)
    write_pairs(root / 'b', count=2, gt_size=30)
    return root


def make(roots, names, suffix, **options):
    section = {
        'name': 'lr',
        'type': 'LRImageDataset',
        'phase': 'train',
        'dataroot_lq': [f'{roots}/{name}/gt{suffix}' for name in names],
        'io_backend': {'type': 'lmdb' if suffix else 'disk'},
        'lq_size': 16,
        'use_hflip': True,
        'use_rot': True,
    }
    return build_dataset({**section, **options})


def places(patch, image):
    """Where in ``image`` the patch is, and in which of the eight orientations: (orientation, top, left)."""
    found = set()
    for orientation in range(8):
        turned = np.rot90(patch, orientation % 4)
        turned = turned[::-1] if orientation > 3 else turned
        size = len(turned)
        for top in range(image.shape[0] - size + 1):
            for left in range(image.shape[1] - size + 1):
                if np.array_equal(turned, image[top : top + size, left : left + size]):
                    found.add((orientation, top, left))
    return found


@pytest.mark.parametrize('suffix', ['', '.lmdb'])
def test_patches_are_cut_everywhere_and_turned_in_all_ways(roots, suffix):
    np.random.seed(0)
    dataset = make(roots, ['a'], suffix)
    image = cv2.imread(f'{roots}/a/gt/001.png')[:, :, ::-1]
    seen = set()
    for _ in range(300):
        item = dataset[1]
        assert item.keys() == {'lq', 'lq_path'} and item['lq'].shape == (3, 16, 16)
        patch = (item['lq'].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        found = places(patch, image)
        assert len(found) == 1
        seen |= found
    assert len({orientation for orientation, _, _ in seen}) == 8
    assert {top for _, top, _ in seen} == {left for _, _, left in seen} == set(range(5))


def test_without_augmentation_nothing_is_turned(roots):
    dataset = make(roots, ['b'], '', use_hflip=False, use_rot=False)
    image = cv2.imread(f'{roots}/b/gt/000.png')[:, :, ::-1]
    for _ in range(20):
        patch = (dataset[0]['lq'].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        assert {orientation for orientation, _, _ in places(patch, image)} == {0}


@pytest.mark.parametrize('suffix', ['', '.lmdb'])
def test_a_root_that_stands_there_twice_counts_twice(roots, suffix):
    dataset = make(roots, ['a', 'b', 'b'], suffix)
    images = {}
    for name in 'ab':
        for path in sorted((roots / name / 'gt').iterdir()):
            images[name, path.stem] = cv2.imread(str(path))[:, :, ::-1]
    owners = Counter()
    for index in range(len(dataset)):
        patch = (dataset[index]['lq'].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        owners.update(key for key, image in images.items() if places(patch, image))
    assert owners == {('a', '000'): 1, ('a', '001'): 1, ('a', '002'): 1, ('b', '000'): 2, ('b', '001'): 2}


def test_one_root_needs_no_list(roots):
    assert len(make(roots, [], '', dataroot_lq=f'{roots}/b/gt')) == 2
