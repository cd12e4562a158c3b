"""Raw databases against BasicSR's own datasets on PNGs of the same whole images."""

import pickle
import random
from collections import Counter
from itertools import permutations

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset, paired_image_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils.registry import MODEL_REGISTRY
from test_datasets import items, stock

from lora_sr.basicsr.integer_images import to_planes, with_floats
from lora_sr.data import prepare_databases
from lora_sr.data.lmdb_store import LmdbWriter, RawDatabase
from lora_sr.errors import InputError

CPU = torch.device('cpu')
AUGMENTATIONS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    """Images of 8 bits in `a` and `b`, of 16 in `deep`: `HR.lmdb`, `LR_bicubic_X2.lmdb`, and both raw."""
    root = tmp_path_factory.mktemp('raw')
    rng = np.random.default_rng(0)
    for name, count, kind in (('a', 3, np.uint8), ('b', 2, np.uint8), ('deep', 2, np.uint16)):
        (root / name).mkdir()
        for number in range(count):
            size = (60 + 2 * number, 44 + 6 * number, 3)
            cv2.imwrite(f'{root}/{name}/{number:03}.png', rng.integers(0, np.iinfo(kind).max + 1, size, kind))
        for raw in (False, True):
            prepare_databases([root / name], root / name, [2], size=None if raw else 0, raw=raw, progress=False)
    return root


def section(roots, names, kind, phase='train', **options):
    end = '_raw.lmdb' if kind.startswith('Raw') else '.lmdb'
    gt, lq = ([f'{roots}/{name}/{stem}{end}' for name in names] for stem in ('HR', 'LR_bicubic_X2'))
    if len(names) == 1:
        gt, lq = gt[0], lq[0]
    opt = {'name': 'pairs', 'type': kind, 'phase': phase, 'scale': 2, 'io_backend': {'type': 'lmdb'}}
    opt.update(dataroot_gt=gt, dataroot_lq=lq, gt_size=16, lq_size=16, use_hflip=True, use_rot=True)
    return {**opt, **options}


def floats(batches):
    return [with_floats(batch, CPU) for batch in batches]


def assert_same(given, expected):
    assert len(given) == len(expected) > 0
    for ours, theirs in zip(given, expected):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if torch.is_tensor(value):
                assert ours[key].dtype == value.dtype and torch.equal(ours[key], value)
            else:
                assert str(ours[key]).replace('_raw', '') == str(value).replace('_raw', '')


def stock_pairs(opt):
    """BasicSR's own, without the patch for lists of roots."""
    return stock(paired_image_dataset, 'PairedImageDataset')({**opt, 'io_backend': {'type': 'lmdb'}})


@pytest.mark.parametrize('name', ['a', 'deep'])
@pytest.mark.parametrize(('hflip', 'rotation'), AUGMENTATIONS)
def test_patches_are_those_of_basicsr(roots, name, hflip, rotation):
    flags = {'use_hflip': hflip, 'use_rot': rotation}
    ours = build_dataset(section(roots, [name], 'RawPairedImageDataset', **flags))
    theirs = stock_pairs(section(roots, [name], 'PairedImageDataset', **flags))
    for first in range(0, 80, 8):  # which turns them in all ways
        given = items(ours, first)
        assert_same(floats(given), items(theirs, first))
    whole = {'a': torch.uint8, 'deep': torch.uint16}[name]
    assert {item[key].dtype for item in given for key in ('gt', 'lq')} == {whole}
    assert all(item[key].is_contiguous() for item in given for key in ('gt', 'lq'))


@pytest.mark.parametrize('name', ['a', 'deep'])
def test_validation_has_whole_images(roots, name):
    ours = build_dataset(section(roots, [name], 'RawPairedImageDataset', 'val'))
    assert_same(floats(items(ours)), items(stock_pairs(section(roots, [name], 'PairedImageDataset', 'val'))))


@pytest.mark.parametrize('phase', ['train', 'val'])
@pytest.mark.parametrize(
    'options',
    [{'color': 'y'}, {'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.4]}, {'mean': [0.1, 0.2, 0.3], 'std': [1] * 3}],
)
def test_values_of_other_colors_are_those_of_basicsr(roots, options, phase):
    ours = build_dataset(section(roots, ['a'], 'RawPairedImageDataset', phase, **options))
    assert_same(items(ours), items(stock_pairs(section(roots, ['a'], 'PairedImageDataset', phase, **options))))


@pytest.mark.parametrize('names', ['abb', ['a', 'deep', 'a']])
def test_several_roots_with_weights(roots, names):
    """8 and 16 bits go into the same batches, without a change of their values."""
    names = list(names)
    ours = build_dataset(section(roots, names, 'RawPairedImageDataset'))
    theirs = build_dataset(section(roots, names, 'PairedImageDataset'))
    assert_same(floats(items(ours, 5)), items(theirs, 5))
    assert len({item['gt'].dtype for item in items(ours)}) == 1


@pytest.mark.parametrize('names', ['a', 'abb', ['b', 'deep']])
@pytest.mark.parametrize(('hflip', 'rotation'), AUGMENTATIONS)
def test_lr_patches_are_those_of_the_other_dataset(roots, names, hflip, rotation):
    flags = {'use_hflip': hflip, 'use_rot': rotation}
    ours = build_dataset(section(roots, list(names), 'RawLRImageDataset', **flags))
    theirs = build_dataset(section(roots, list(names), 'LRImageDataset', **flags))
    for first in range(0, 40, 8):
        assert_same(floats(items(ours, first)), items(theirs, first))


@pytest.mark.parametrize('kind', ['RawPairedImageDataset', 'RawLRImageDataset'])
def test_samples_of_a_seed_are_the_same_whoever_reads_them(roots, kind):
    batches = []
    for workers, name in ((0, kind), (2, kind), (0, kind.replace('Raw', ''))):
        opt = section(roots, ['a', 'deep'], name, batch_size_per_gpu=2, num_worker_per_gpu=workers)
        sampler = EnlargedSampler(build_dataset(opt), 1, 0, 3)
        loader = build_dataloader(build_dataset(opt), opt, num_gpu=0, sampler=sampler, seed=4)
        batches.append(floats(loader))
    assert_same(batches[0], batches[1])
    assert_same(batches[0], batches[2])


@pytest.mark.parametrize('kind', ['RawPairedImageDataset', 'RawLRImageDataset'])
def test_channels_of_a_sample_change_places_alike(roots, kind):
    """All orders come equally often, for an image and what belongs to it."""
    plain, permuted = (
        build_dataset(section(roots, ['a'], kind, use_rgb_permutation=is_permuted)) for is_permuted in (False, True)
    )
    for dataset in (plain, permuted):  # as if the GT images were outputs of a teacher
        dataset.teach({dataset.opt['dataroot_lq']: f'{roots}/a/HR_raw.lmdb'})
    orders = Counter()
    for first in range(0, 400, 4):
        for before, after in zip(items(plain, first), items(permuted, first)):
            tensors = [key for key, value in before.items() if torch.is_tensor(value)]
            found = [order for order in permutations(range(3))
                     if all(torch.equal(after[key], before[key][list(order)]) for key in tensors)]  # fmt: skip
            assert len(found) == 1 and 'taught' in tensors
            orders[found[0]] += 1
    assert len(orders) == 6 and max(orders.values()) < 2 * min(orders.values())


@pytest.mark.parametrize('kind', ['RawPairedImageDataset', 'RawLRImageDataset'])
@pytest.mark.parametrize('names', ['a', ['a', 'deep']])
def test_a_sample_is_blended_with_one_color(roots, tmp_path, kind, names):
    """An image and what belongs to it become share * image + (1 - share) * color, to half a step of 16 bits."""
    plain, blended = (
        build_dataset(section(roots, list(names), kind, blend_prob=prob, blend_alpha=0.3)) for prob in (0, 0.5)
    )
    rng = np.random.default_rng(0)
    outputs = {}
    for number, (root, database) in enumerate(blended.lq.databases.items()):
        shapes = {key: (2 * image.shape[0], 2 * image.shape[1], 3) for key, image in database.images.items()}
        outputs[root] = tmp_path / f'{number}.lmdb'
        write_raw(outputs[root], {key: rng.integers(0, 65536, shape, np.uint16) for key, shape in shapes.items()})
    for dataset in (plain, blended):
        dataset.teach(outputs)
    shares, colors = [], []
    for first in range(300):
        before, after = (floats(items(dataset, first)[:1])[0] for dataset in (plain, blended))
        tensors = [key for key, value in before.items() if torch.is_tensor(value)]
        x, y = (sample['taught'].double().flatten(1) for sample in (before, after))
        share = ((x - x.mean(1, True)) * y).sum() / (x - x.mean(1, True)).square().sum()
        offset = (y - share * x).mean(1)[:, None, None]
        for key in tensors:
            error = (share * before[key] + offset - after[key]).abs().max()
            assert error < (2 if key == 'taught' else 1) * 0.7 / 65535
        if share < 1 - 1e-6:
            shares.append(float(share))
            colors.append(offset.flatten() / (1 - share))
    colors = torch.stack(colors)
    assert 'taught' in tensors and 110 < len(shares) < 190
    assert min(shares) > 0.3 - 1e-5 and np.histogram(shares, 7, (0.3, 1))[0].min() > 8
    assert -1e-3 < colors.min() < 0.05 and 0.95 < colors.max() < 1.001 and colors.std(1).mean() > 0.2


def test_gray_images_have_no_channels_to_permute(tmp_path):
    image = np.zeros((32, 32, 1), np.uint8)
    for name in ('HR', 'LR_bicubic_X2'):
        write_raw(tmp_path / f'{name}_raw.lmdb', {'a': image[:: 1 if name == 'HR' else 2, :: 1 if name == 'HR' else 2]})
    for kind in ('RawPairedImageDataset', 'RawLRImageDataset'):
        opt = section(tmp_path.parent, [tmp_path.name], kind, use_rgb_permutation=True)
        with pytest.raises(InputError, match='use_rgb_permutation must be false for images of 1 channels, got true'):
            build_dataset(opt)


def test_images_of_different_channels_have_no_color_in_common(tmp_path):
    write_raw(tmp_path / 'HR_raw.lmdb', {'a': np.zeros((32, 32, 1), np.uint8)})
    write_raw(tmp_path / 'LR_bicubic_X2_raw.lmdb', {'a': np.zeros((16, 16, 3), np.uint8)})
    for options, sentence in (
        ({'blend_prob': 0.3}, 'blend_prob must be 0 for LR images of 3 channels and GT images of 1, got 0.3'),
        ({'use_rgb_permutation': True}, 'use_rgb_permutation must be false for images of 1 channels, got true'),
    ):
        with pytest.raises(InputError, match=sentence):
            build_dataset(section(tmp_path.parent, [tmp_path.name], 'RawPairedImageDataset', **options))


def write_raw(path, images):
    writer = LmdbWriter(path)
    for key, image in images.items():
        writer.put_raw(key, image)
    writer.finish()


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_any_number_of_channels(tmp_path, channels, kind):
    rng = np.random.default_rng(channels)
    gt = {f'{n}': rng.integers(0, np.iinfo(kind).max, (24, 32, channels), kind) for n in range(2)}
    write_raw(tmp_path / 'gt.lmdb', gt)
    write_raw(tmp_path / 'lq.lmdb', {key: np.ascontiguousarray(image[::2, ::2]) for key, image in gt.items()})
    opt = section(tmp_path, ['.'], 'RawPairedImageDataset')
    opt.update(dataroot_gt=f'{tmp_path}/gt.lmdb', dataroot_lq=f'{tmp_path}/lq.lmdb')
    dataset = build_dataset(opt)
    for item in items(dataset) + items(dataset, 7):
        assert item['gt'].shape == (channels, 16, 16) and item['lq'].shape == (channels, 8, 8)
        views = [image[t : t + 16, s : s + 16] for image in gt.values() for t in range(9) for s in range(17)]
        patch = item['gt'].permute(1, 2, 0).numpy()
        turned = [np.rot90(patch[:, ::flip], k) for flip in (1, -1) for k in range(4)]
        assert any(np.array_equal(a, b) for a in turned for b in views)
    with pytest.raises(InputError, match=r'same number of channels, got \d in .*gt.lmdb and \d in .*other.lmdb$'):
        write_raw(tmp_path / 'other.lmdb', {'0': np.zeros((40, 40, channels % 4 + 1), kind)})
        build_dataset(
            {
                **opt,
                'dataroot_gt': [opt['dataroot_gt'], f'{tmp_path}/other.lmdb'],
                'dataroot_lq': [opt['dataroot_lq']] * 2,
            }
        )


def test_whole_numbers_become_what_img2tensor_gives():
    """All of them, bit for bit, in float64 as well: rounded once."""
    for kind, peak in ((np.uint8, 255), (np.uint16, 65535)):
        image = np.arange(peak + 1, dtype=kind).reshape(-1, 16, 1)
        expected = (image.astype(np.float64) / peak).astype(np.float32)[None, :, :, 0]
        given = with_floats({'lq': to_planes(image)[None], 'mask': to_planes(image)}, CPU)
        assert np.array_equal(given['lq'][0].numpy(), expected)
        assert given['mask'].dtype == to_planes(image).dtype
    same = np.arange(256, dtype=np.uint16) * np.uint16(257)
    assert np.array_equal(same.astype(np.float32) / 65535, np.arange(256, dtype=np.uint8).astype(np.float32) / 255)


KERNELS = {'kernel_list': ['iso', 'aniso'], 'kernel_prob': [0.5, 0.5], 'blur_sigma': [0.2, 3], 'sinc_prob': 0.1}
KERNELS.update(betag_range=[0.5, 4], betap_range=[1, 2], blur_kernel_size=21)


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
@pytest.mark.parametrize('size', [(430, 450), (390, 410), (402, 300), (400, 400), (64, 48)])
def test_degraded_samples_are_the_same(tmp_path, size, kind):
    """Larger and smaller than the patch of 400 pixels: the image, and the kernels that are drawn behind it."""
    rng = np.random.default_rng(0)
    (tmp_path / 'hr').mkdir()
    cv2.imwrite(f'{tmp_path}/hr/0.png', rng.integers(0, np.iinfo(kind).max, (*size, 3), kind))
    for raw in (False, True):
        prepare_databases([tmp_path / 'hr'], tmp_path, [2], size=None if raw else 0, raw=raw, progress=False)
    opt = {'name': 'x', 'type': 'RealESRGANDataset', 'final_sinc_prob': 0.8, 'use_hflip': True, 'use_rot': True}
    opt.update(KERNELS, **{f'{key}2': value for key, value in KERNELS.items()})
    given = []
    for root in ('HR.lmdb', 'HR_raw.lmdb'):
        opt.update(dataroot_gt=f'{tmp_path}/{root}', io_backend={'type': 'lmdb'})
        dataset, samples = build_dataset(opt), []
        for seed in range(12):
            random.seed(seed)
            np.random.seed(seed)
            samples.append(dataset[0])
        given.append(samples)
    assert_same(*given)


def test_a_database_survives_the_way_to_a_worker(roots):
    database = RawDatabase(roots / 'a/HR_raw.lmdb')
    image = database.view('000')[:, :]
    assert np.array_equal(image, cv2.imread(f'{roots}/a/000.png')[..., ::-1])
    assert np.array_equal(pickle.loads(pickle.dumps(database)).view('000')[:, :], image)


def test_any_part_of_an_image_of_many_bands(tmp_path):
    """Also of rows that are longer than a band is meant to be."""
    rng = np.random.default_rng(0)
    images = {'tall': (700, 401, 3), 'wide': (3, 90000, 3), 'gray': (513, 1024, 1)}
    images = {key: rng.integers(0, 65536, shape, np.uint16) for key, shape in images.items()}
    write_raw(tmp_path / 'x.lmdb', images)
    database = RawDatabase(tmp_path / 'x.lmdb')
    assert [image.bands for image in database.images.values()] == [7, 3, 5]
    assert sum(image.stored_bytes for image in database.images.values()) < (tmp_path / 'x.lmdb/data.mdb').stat().st_size
    for key, image in images.items():
        view = database.view(key)
        assert view.shape == image.shape and np.array_equal(view[:, :], image)
        for _ in range(50):
            (top, bottom), (left, right) = (sorted(rng.integers(0, side + 1, 2)) for side in image.shape[:2])
            part = view[top:bottom, left:right, ...]
            assert part.dtype == np.uint16 and np.array_equal(part, image[top:bottom, left:right])


def test_what_is_missing_or_cut(roots, tmp_path):
    database = RawDatabase(roots / 'a/HR_raw.lmdb')
    with pytest.raises(InputError, match='HR_raw.lmdb has no image 999'):
        database.view('999')
    write_raw(tmp_path / 'x.lmdb', {'0': np.zeros((64, 64, 3), np.uint8)})
    database = RawDatabase(tmp_path / 'x.lmdb')
    database.view('0')[:1, :1]
    with open(tmp_path / 'x.lmdb/data.mdb', 'r+b') as file:
        file.truncate(8192)
    with pytest.raises(InputError, match='x.lmdb is damaged: data.mdb has 8192 bytes of'):
        database.view('0')[:1, :1]
    for number, value in enumerate((b'1', None)):
        folder = tmp_path / f'y{number}.lmdb'
        write_raw(folder, {'0': np.zeros((64, 64, 3), np.uint8)})
        with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as transaction:
            transaction.delete(b'0.00000') if value is None else transaction.put(b'0.00000', value)
        with pytest.raises(InputError, match=r'y\d.lmdb is damaged: 0 is not whole'):
            RawDatabase(folder).view('0')[:1, :1]


def test_pairs_of_other_keys(roots):
    opt = section(roots, ['a'], 'RawPairedImageDataset')
    with pytest.raises(
        InputError, match='HR_raw.lmdb and .*LR_bicubic_X2_raw.lmdb must have the same keys, got others'
    ):
        build_dataset({**opt, 'dataroot_lq': opt['dataroot_lq'].replace('/a/', '/b/')})
    with pytest.raises(InputError, match='is not a new key in the form `KEY.raw'):
        build_dataset({**opt, 'dataroot_lq': opt['dataroot_lq'].replace('_raw', '')})


@pytest.mark.parametrize(
    'name', ['SRModel', 'SwinIRModel', 'ESRGANModel', 'RealESRNetModel', 'RealESRGANModel', 'DistillationModel']
)
def test_every_model_is_fed_floating_point(name):
    """BasicSR's, ours, and what somebody derives from them later."""
    found = MODEL_REGISTRY.get(name)

    class Mine(found):
        def feed_data(self, data):
            self.seen = data['lq']
            super().feed_data(data)

    batch = {key: torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8) for key in ('lq', 'gt')}
    for kind in (found, Mine):
        model = object.__new__(kind)
        model.device, model.is_train, model.opt = CPU, False, {}
        model.memory_format, model.usm_sharpener = torch.contiguous_format, torch.nn.Identity()
        model.feed_data(dict(batch))
        for key, value in batch.items():
            assert torch.equal(getattr(model, key), value.double().div(255).float())
    assert model.seen.dtype == torch.float32


@pytest.mark.parametrize(('kind', 'dtype'), [('TheirDataset', torch.uint8), ('RawPairedImageDataset', torch.float32)])
def test_whole_numbers_of_others_are_left_to_their_models(kind, dtype):
    """A model that divides by 255 itself must not do so twice."""

    class Theirs(MODEL_REGISTRY.get('SRModel')):
        def feed_data(self, data):
            self.data = data

    model = object.__new__(Theirs)
    model.device, model.opt = CPU, {'datasets': {'train': {'type': kind}}}
    model.feed_data({'lq': torch.zeros(1, 3, 2, 2, dtype=torch.uint8)})
    assert model.data['lq'].dtype == dtype
    model.feed_data([1])  # whatever a loader of theirs gives
    assert model.data == [1]
