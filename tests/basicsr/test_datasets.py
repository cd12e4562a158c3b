"""What datasets give: patches against the images that they are of."""

from collections import Counter

import cv2
import numpy as np
import pytest
from basicsr.data import build_dataset
from tiny_run import write_pairs

from lora_sr.data import prepare_databases


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


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
    """A folder with pairs of 16 bits, as files and as databases."""
    root = tmp_path_factory.mktemp('deep')
    rng = np.random.default_rng(0)
    for name, side in (('gt', 48), ('lq', 24)):
        (root / name).mkdir()
        for number in range(3):
            cv2.imwrite(f'{root}/{name}/{number:03}.png', rng.integers(0, 65536, (side, side, 3), np.uint16))
    prepare_databases([root / 'gt'], root, [2], lr_folders=[root / 'lq'], size=0, progress=False)
    return root


@pytest.mark.parametrize('phase', ['train', 'val'])
@pytest.mark.parametrize('kind', ['disk', 'lmdb'])
@pytest.mark.parametrize('name', ['PairedImageDataset', 'LRImageDataset', 'RealESRGANPairedDataset_basicsr'])
def test_images_of_16_bits(deep, name, kind, phase):
    gt, lq = (deep / 'HR.lmdb', deep / 'LR_X2.lmdb') if kind == 'lmdb' else (deep / 'gt', deep / 'lq')
    section = {'name': 'deep', 'type': name, 'phase': phase, 'scale': 2, 'io_backend': {'type': kind}}
    section.update(gt_size=48, lq_size=24, use_hflip=False, use_rot=False, dataroot_gt=str(gt), dataroot_lq=str(lq))
    dataset = build_dataset(section)
    for number in range(3):
        for key in dataset[number].keys() & {'gt', 'lq'}:
            expected = cv2.imread(f'{deep}/{key}/{number:03}.png', cv2.IMREAD_UNCHANGED)[..., ::-1].astype(np.float64)
            values = dataset[number][key]
            assert np.array_equal(values.permute(1, 2, 0).numpy(), (expected / 65535).astype(np.float32))


def test_images_of_16_bits_without_pairs(deep):
    """As they are degraded on the fly: padded to 400 pixels, the image is the top left corner."""
    kernels = {'kernel_list': ['iso'], 'kernel_prob': [1], 'blur_sigma': [0.2, 3], 'betag_range': [0.5, 4]}
    kernels.update(blur_kernel_size=21, betap_range=[1, 2], sinc_prob=0.1)
    section = {'name': 'deep', 'type': 'RealESRGANDataset', 'dataroot_gt': f'{deep}/HR.lmdb', 'final_sinc_prob': 0.8}
    section.update(kernels, **{f'{key}2': value for key, value in kernels.items()})
    dataset = build_dataset({**section, 'io_backend': {'type': 'lmdb'}, 'use_hflip': False, 'use_rot': False})
    expected = cv2.imread(f'{deep}/gt/001.png', cv2.IMREAD_UNCHANGED)[..., ::-1].astype(np.float64) / 65535
    assert np.array_equal(dataset[1]['gt'][:, :48, :48].permute(1, 2, 0).numpy(), expected.astype(np.float32))


def test_one_root_needs_no_list(roots):
    assert len(make(roots, [], '', dataroot_lq=f'{roots}/b/gt')) == 2
