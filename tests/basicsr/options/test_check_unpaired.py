"""The check of data sets: LR images without ground truth, raw databases, and what a teacher makes once of both."""

import lmdb
import numpy as np
import pytest
from option_check import check
from PIL import Image
from tiny_run import change

from lora_sr.basicsr.options import check_options
from lora_sr.data import prepare_databases
from lora_sr.data.lmdb_store import LmdbWriter


@pytest.fixture
def without_gt(distillation, pairs):
    """A distillation from LR images alone, from a folder of 16x16 images that counts twice."""
    train = distillation['datasets']['train']
    for key in ('dataroot_gt', 'gt_size'):
        del train[key]
    train.update(type='LRImageDataset', dataroot_lq=[f'{pairs}/lq', f'{pairs}/lq'], lq_size=16)
    del distillation['train']['pixel_opt']
    return distillation


def test_lr_images_without_gt_are_correct(without_gt, pairs, tmp_path):
    assert check(without_gt, tmp_path) == []
    without_gt['datasets']['train'].update(dataroot_lq=f'{pairs}/lq.lmdb', io_backend={'type': 'lmdb'})
    assert check(without_gt, tmp_path) == []


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        (
            'datasets.train.dataroot_lq',
            [],
            'datasets.train.dataroot_lq has to be a folder or a database, or a list of them, not []',
        ),
        (
            'datasets.train.dataroot_lq',
            5,
            'datasets.train.dataroot_lq has to be a folder or a database, or a list of them, not 5',
        ),
        ('datasets.train.dataroot_lq', ['nowhere'], 'datasets.train.dataroot_lq: nowhere does not exist'),
        ('datasets.train.lq_size', ..., 'datasets.train.lq_size is missing'),
        ('datasets.train.lq_size', 0, 'datasets.train.lq_size has to be a whole number of at least 1, not 0'),
        ('datasets.train.lq_size', 17, "datasets.train.lq_size: 17 is larger than '000.png' of 16x16 in {pairs}/lq"),
        (
            'datasets.train.io_backend',
            {'type': 'lmdb'},
            'datasets.train.dataroot_lq: the name of {pairs}/lq has to end in .lmdb, since io_backend is lmdb',
        ),
        (
            'datasets.train.batch_size_per_gpu',
            161,
            'datasets.train.batch_size_per_gpu must be at most 160, the patches of an epoch, got 161; raise '
            'dataset_enlarge_ratio to 1007, say',
        ),
        (
            'train.pixel_opt',
            {'type': 'L1Loss'},
            'train.pixel_opt compares with the ground truth, which an LRImageDataset does not have: leave it out, or '
            'train on a PairedImageDataset',
        ),
        (
            'datasets.val.type',
            'LRImageDataset',
            'datasets.val: an LRImageDataset has no ground truth to measure with; use a PairedImageDataset',
        ),
    ],
)
def test_lr_images_without_gt(without_gt, pairs, tmp_path, path, value, sentence):
    change(without_gt, path, value)
    assert check(without_gt, tmp_path) == [sentence.format(pairs=pairs)]


def test_mistakes_of_distillation_without_gt_that_would_train(without_gt, tmp_path):
    without_gt['train']['distill_pixel_opt'] = {'type': 'PSNRLoss', 'eps': 0}
    without_gt['train']['optim_g']['betas'] = [0.98, 0.92, 0.99]
    assert check(without_gt, tmp_path) == [
        'train.optim_g.betas has 3 values; Adam takes 2, e.g. [0.9, 0.999]',
        'train.distill_pixel_opt: "eps" of PSNRLoss must be more than 0, got 0.',
    ]


def test_teacher_and_lr_images_of_a_model_of_others(without_gt, tmp_path, others):
    without_gt['model_type'] = 'MyModel'
    assert check(without_gt, tmp_path) == []


def test_teacher_of_a_model_without_one(without_gt, tmp_path):
    without_gt['model_type'] = 'SRModel'
    sentence = 'network_t, a teacher, is for a DistillationModel alone; set model_type: DistillationModel'
    assert sentence in check(without_gt, tmp_path)


def test_damaged_lr_images(without_gt, data, tmp_path):
    root, _ = data
    without_gt['datasets']['train'].update(dataroot_lq=[str(root / 'lq')])
    assert check(without_gt, tmp_path) == []
    file = root / 'lq' / '004.png'
    Image.open(file).save(root / 'lq' / 'x.pcx')
    assert check(without_gt, tmp_path) == []  # OpenCV does not read it, but Pillow
    (root / 'lq' / 'x.pcx').unlink()
    file.write_bytes(b'not an image')
    (problem,) = check(without_gt, tmp_path)
    assert problem.startswith(f'datasets.train.dataroot_lq: {file} is not an image')


def test_lr_images_need_a_teacher(without_gt, tmp_path):
    without_gt.update(model_type='SRModel')
    del without_gt['network_t'], without_gt['path']['pretrain_network_t']
    without_gt['train'] = {**without_gt['train'], 'pixel_opt': {'type': 'L1Loss'}}
    sentence = 'datasets.train: an LRImageDataset has no ground truth; it needs a teacher, model_type: '
    assert f'{sentence}DistillationModel' in check(without_gt, tmp_path)


def test_a_training_file_is_no_test(without_gt, tmp_path):
    """BasicSR measures on all of its data sets, also on those that have nothing to measure with."""
    problems = check_options(without_gt, False, tmp_path)
    sentence = 'datasets.train must be left out of a test, for an LRImageDataset has no ground truth to measure with: '
    assert f'{sentence}--force_yml datasets:train=~' in problems
    del without_gt['datasets']['train']
    assert not any(problem.startswith('datasets.train') for problem in check_options(without_gt, False, tmp_path))


@pytest.fixture
def raw(data, tmp_path):
    """Pairs as raw databases, and options for them."""
    root, options = data
    prepare_databases([root / 'gt'], root, [2], [root / 'lq'], raw=True, progress=False)
    opt = options('.lmdb')
    opt['datasets']['train'].update(
        type='RawPairedImageDataset', dataroot_gt=f'{root}/HR_raw.lmdb', dataroot_lq=f'{root}/LR_X2_raw.lmdb'
    )
    return root, opt


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({}, None),
        ({'use_rgb_permutation': True, 'blend_prob': 0.3, 'blend_alpha': 0.4}, None),
        ({'blend_prob': 1.3}, 'datasets.train.blend_prob has to be a number from 0 to 1, not 1.3'),
        ({'blend_alpha': 0.4}, 'datasets.train.blend_alpha needs a blend_prob of more than 0'),
        ({'gt_size': 34}, "datasets.train.gt_size: 34 is larger than the GT image '000' of 32x32"),
        (
            {'type': 'PairedImageDataset'},
            'datasets.train.dataroot_gt: ROOT/HR_raw.lmdb holds raw images, which a PairedImageDataset does not read; '
            'set type: RawPairedImageDataset',
        ),
        (
            {'dataroot_gt': 'ROOT/gt.lmdb'},
            'datasets.train.dataroot_gt: ROOT/gt.lmdb holds no raw images: make them by lora-sr prepare --raw, or set '
            'type: PairedImageDataset',
        ),
        (
            {'io_backend': {'type': 'disk'}},
            'datasets.train.io_backend must be {type: lmdb} for a RawPairedImageDataset, got {type: disk}',
        ),
        (
            {'dataroot_lq': 'ROOT/gray.lmdb'},
            'datasets.train.dataroot_lq: the images of all roots must have the same number of channels, got 3 in '
            'ROOT/LR_X2_raw.lmdb and 1 in ROOT/gray.lmdb',
        ),
    ],
)
def test_raw_databases(raw, tmp_path, changes, sentence):
    root, options = raw
    section = options['datasets']['train']
    section.update({k: v.replace('ROOT', str(root)) if isinstance(v, str) else v for k, v in changes.items()})
    if 'gray' in section['dataroot_lq']:
        writer = LmdbWriter(root / 'gray.lmdb')
        for number in range(8):
            writer.put_raw(f'{number:03}', np.zeros((16, 16, 1), np.uint8))
        writer.finish()
        section.update(
            dataroot_lq=[f'{root}/LR_X2_raw.lmdb', section['dataroot_lq']], dataroot_gt=[section['dataroot_gt']] * 2
        )
    assert check(options, tmp_path) == ([] if sentence is None else [sentence.replace('ROOT', str(root))])


def test_damaged_raw_databases(raw, tmp_path):
    root, options = raw
    with lmdb.open(f'{root}/HR_raw.lmdb', map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.put(b'003.00000', b'short')
    sentence = f"datasets.train.dataroot_gt: the database {root}/HR_raw.lmdb is damaged: the entry '003' is not a "
    assert check(options, tmp_path) == [f'{sentence}whole image']
    with lmdb.open(f'{root}/HR_raw.lmdb', map_size=1 << 24) as env, env.begin(write=True) as transaction:
        transaction.delete(b'003.00000')
    sentence = f'datasets.train.dataroot_gt: the database {root}/HR_raw.lmdb has 7 entries, but meta_info.txt 8'
    assert check(options, tmp_path) == [sentence]
    (root / 'HR_raw.lmdb/meta_info.txt').write_text('000.raw (16,16,3) uint8 zz\n')
    sentence = f'datasets.train.dataroot_gt: {root}/HR_raw.lmdb holds no raw images: make them by lora-sr prepare --raw'
    assert check(options, tmp_path) == [f'{sentence}, or set type: PairedImageDataset']


def test_raw_lr_images_without_gt(without_gt, raw, tmp_path):
    root, _ = raw
    section = without_gt['datasets']['train']
    section.update(type='RawLRImageDataset', dataroot_lq=f'{root}/LR_X2_raw.lmdb', io_backend={'type': 'lmdb'})
    assert check(without_gt, tmp_path) == []
    section['lq_size'] = 17
    sentence = f"datasets.train.lq_size: 17 is larger than '000' of 16x16 in {root}/LR_X2_raw.lmdb"
    assert check(without_gt, tmp_path) == [sentence]
    section.update(lq_size=8, type='LRImageDataset')
    sentence = f'datasets.train.dataroot_lq: {root}/LR_X2_raw.lmdb holds raw images, which a LRImageDataset does not '
    assert check(without_gt, tmp_path) == [f'{sentence}read; set type: RawLRImageDataset'.replace('a LR', 'an LR')]
    section['type'] = 'RawLRImageDataset'
    without_gt['train']['pixel_opt'] = {'type': 'L1Loss'}
    sentence = 'train.pixel_opt compares with the ground truth, which a RawLRImageDataset does not have: leave it out, '
    assert check(without_gt, tmp_path) == [f'{sentence}or train on a RawPairedImageDataset']


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'network_t.precompute': True, 'network_t.self_ensemble': True}, None),
        ({'network_t.precompute': False}, None),
        ({'network_t.precompute': 1}, 'network_t.precompute has to be true or false, not 1'),
        ({'network_t.self_ensemble': True}, 'network_t.self_ensemble needs network_t.precompute: true'),
        ({'network_g.precompute': True}, 'network_g.precompute is not a known key; the keys here are '),
        ({'network_t.precomputed': True}, "network_t.precomputed is not a known key; did you mean 'precompute'?"),
        (
            {'network_t.precompute': True, 'datasets.train.type': 'LRImageDataset'},
            'network_t.precompute needs whole images: make raw databases by lora-sr prepare --raw, and set '
            'datasets.train.type: RawPairedImageDataset, or RawLRImageDataset; got LRImageDataset',
        ),
        (
            {'network_t.precompute': True, 'train.distill_pixel_opt': None},
            'network_t.precompute needs train.distill_pixel_opt, the loss that reads the outputs of the teacher',
        ),
    ],
)
def test_a_teacher_computed_once(without_gt, raw, tmp_path, changes, sentence):
    root, _ = raw
    without_gt['datasets']['train'].update(
        type='RawLRImageDataset', dataroot_lq=f'{root}/LR_X2_raw.lmdb', io_backend={'type': 'lmdb'}
    )
    for path, value in changes.items():
        change(without_gt, path, value)
    problems = check(without_gt, tmp_path)
    if sentence is None:
        assert problems == []
    else:
        assert any(problem.startswith(sentence) for problem in problems), problems


@pytest.mark.parametrize('key', [{'color': 'y'}, {'mean': [0.5] * 3, 'std': [1] * 3}])
def test_a_teacher_computed_once_sees_images_as_they_are(without_gt, raw, tmp_path, key):
    root, options = raw
    without_gt['network_t']['precompute'] = True
    without_gt['datasets']['train'] = {**options['datasets']['train'], **key}
    sentence = f'network_t.precompute needs images as they are stored, without datasets.train.{min(key)}'
    assert sentence in check(without_gt, tmp_path)
