"""What datasets give: patches against the images that they are of."""

import os
import random
import shutil
from collections import Counter

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset, paired_image_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils.registry import Registry
from stock_basicsr import stock as stock_source
from tiny_run import write_pairs

from lora_sr.data import prepare_databases
from lora_sr.errors import InputError


def stock(module, name):
    """A class of BasicSR as its file has it, though the registry has one of its name already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, '_do_register', lambda *args, **kwargs: None)
        return stock_source(module, name)


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp('lr')
    write_pairs(root / 'a', count=3, gt_size=20)
    write_pairs(root / 'b', count=2, gt_size=30)
    return root


def paired(roots, names, suffix, phase='train', **options):
    section = {
        'name': 'pairs',
        'type': 'PairedImageDataset',
        'phase': phase,
        'scale': 2,
        'dataroot_gt': [f'{roots}/{name}/gt{suffix}' for name in names],
        'dataroot_lq': [f'{roots}/{name}/lq{suffix}' for name in names],
        'io_backend': {'type': 'lmdb' if suffix else 'disk'},
        'gt_size': 16,
        'use_hflip': True,
        'use_rot': True,
    }
    return build_dataset({**section, **options})


def items(dataset, first=0):
    """All that a dataset gives, with random numbers that go by its place, of which ``first`` is the first."""
    given = []
    for index in range(len(dataset)):
        np.random.seed(first + index)
        random.seed(first + index)
        given.append(dataset[index])
    return given


def same(ours, theirs):
    return all(torch.equal(ours[key], theirs[key]) for key in ('gt', 'lq'))


def stock_pairs(dataset, **changes):
    """BasicSR's own dataset of such options."""
    opt = {**dataset.opt, 'io_backend': {'type': dataset.opt['io_backend']['type']}, **changes}
    return stock(paired_image_dataset, 'PairedImageDataset')(opt)


@pytest.mark.parametrize('phase', ['train', 'val'])
@pytest.mark.parametrize('suffix', ['', '.lmdb'])
def test_pairs_of_several_roots_are_those_of_each_in_turn(roots, suffix, phase):
    """The roots have names in common, of other images. One of them stands there twice."""
    given = items(paired(roots, 'abb', suffix, phase))
    expected = []
    for name in 'abb':
        one = {f'dataroot_{key}': f'{roots}/{name}/{key}{suffix}' for key in ('gt', 'lq')}
        expected += items(stock_pairs(paired(roots, name, suffix, phase), **one), first=len(expected))
    assert len(given) == len(expected) == 7 and all(map(same, given, expected))
    for key in ('gt_path', 'lq_path'):
        # The last part is that by which a validation saves an image, all of it what a fault names.
        assert [os.path.basename(item[key]) for item in given] == [os.path.basename(item[key]) for item in expected]
        assert all(item[key].startswith(f'{roots}/{name}/{key[:2]}') for item, name in zip(given, 'aaabbbb'))


@pytest.mark.parametrize('suffix', ['', '.lmdb'])
def test_one_root_is_read_by_basicsr_itself(roots, suffix):
    one = {'dataroot_gt': f'{roots}/b/gt{suffix}', 'dataroot_lq': f'{roots}/b/lq{suffix}'}
    dataset = paired(roots, 'b', suffix, **one)
    theirs = stock_pairs(dataset)
    assert dataset.paths == theirs.paths and vars(dataset).keys() == vars(theirs).keys()
    assert all(map(same, items(dataset), items(theirs)))
    assert all(map(same, items(paired(roots, 'b', suffix)), items(theirs)))  # a list of one


def test_a_list_of_names_is_for_all_roots_or_for_each(roots, tmp_path):
    first, last = str(tmp_path / 'first.txt'), str(tmp_path / 'last.txt')
    (tmp_path / 'first.txt').write_text('000.png\n')
    (tmp_path / 'last.txt').write_text('001.png (20,20,3)\n000.png\n')

    def names(files, roots_of_pairs='ab'):
        paths = [path['gt_path'] for path in paired(roots, roots_of_pairs, '', meta_info_file=files).paths]
        return [path[len(f'{roots}/') :] for path in paths]

    assert names(first) == ['a/gt/000.png', 'b/gt/000.png']
    assert names([last, first]) == ['a/gt/001.png', 'a/gt/000.png', 'b/gt/000.png']
    assert len(names([None, first])) == 4
    assert names([last], 'a') == ['a/gt/001.png', 'a/gt/000.png']


def test_names_of_lr_images_in_all_roots(roots, tmp_path):
    for name in 'ab':
        (tmp_path / name / 'lq').mkdir(parents=True)
        for path in (roots / name / 'lq').iterdir():
            shutil.copy(path, tmp_path / name / 'lq' / f'{path.stem}x2.png')
    renamed = [f'{tmp_path}/{name}/lq' for name in 'ab']
    dataset = paired(roots, 'ab', '', dataroot_lq=renamed, filename_tmpl='{}x2')
    assert all(map(same, items(dataset), items(paired(roots, 'ab', ''))))


@pytest.mark.parametrize('key', ['dataroot_lq', 'meta_info_file'])
def test_lists_of_other_lengths(roots, key):
    message = f'{key} must have one entry for each of the 2 of dataroot_gt, got 1'
    with pytest.raises(InputError, match=message):
        paired(roots, 'ab', '', **{key: ['one']})
    with pytest.raises(InputError, match=message.replace('got 1', 'got 3')):
        paired(roots, 'ab', '', **{key: ['one'] * 3})


@pytest.mark.parametrize('suffix', ['', '.lmdb'])
def test_samples_of_several_roots_are_the_same_whoever_reads_them(roots, suffix):
    batches = []
    for workers in (0, 2):
        dataset = paired(roots, 'aab', suffix, batch_size_per_gpu=2, num_worker_per_gpu=workers)
        sampler = EnlargedSampler(dataset, 1, 0, 3)
        batches.append(list(build_dataloader(dataset, dataset.opt, num_gpu=0, sampler=sampler, seed=4)))
    assert len(batches[0]) == len(batches[1]) == 12 and all(map(same, *batches))


@pytest.mark.parametrize('phase', ['train', 'val'])
def test_an_image_that_is_gone_is_named_with_its_root(roots, tmp_path, phase):
    for name in 'ab':
        shutil.copytree(roots / name, tmp_path / name)
    dataset = paired(tmp_path, 'ab', '.lmdb', phase, num_worker_per_gpu=0, batch_size_per_gpu=1)
    with (
        lmdb.open(str(tmp_path / 'b/lq.lmdb'), map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.delete(b'001')
    sampler = EnlargedSampler(dataset, 1, 0, 1) if phase == 'train' else None
    with pytest.raises(InputError, match=f'^{tmp_path}/b/gt.lmdb/001 cannot be read: an image is missing, or empty$'):
        list(build_dataloader(dataset, dataset.opt, num_gpu=0, sampler=sampler, seed=1))


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
