"""`lora-sr prepare` on trees in the layouts of RealSR and DRealSR."""

import shutil

import cv2
import lmdb
import numpy as np
import pytest

from lora_sr.cli.main import main
from lora_sr.data import prepare_databases, read_meta_info
from lora_sr.data.sources import find_sources
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale


def write_pair(hr_path, lr_path, scale, number, size=(48, 36)):
    """An HR image, and as its LR image another one of its size by `scale`, so that a bicubic one is told from it."""
    for path, length in ((hr_path, 1), (lr_path, scale)):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng([number, length]).integers(0, 256, (size[0] // length, size[1] // length, 3))
        cv2.imwrite(str(path), noise.astype(np.uint8))


@pytest.fixture
def realsr(tmp_path):
    """Two cameras, two pairs for training and one for testing at each scale, under names that come again."""
    root = tmp_path / 'RealSR(V3)'
    for number, (camera, split, scale) in enumerate(
        (camera, split, scale) for camera in ('Canon', 'Nikon') for split in ('Train', 'Test') for scale in (2, 3, 4)
    ):
        for image in range(1, 3 if split == 'Train' else 2):
            name = root / camera / split / str(scale) / f'{camera}_{image:03d}'
            write_pair(
                name.with_name(f'{name.name}_HR.png'),
                name.with_name(f'{name.name}_LR{scale}.png'),
                scale,
                10 * number + image,
            )
    return root


@pytest.fixture
def drealsr(tmp_path):
    root = tmp_path / 'DRealSR'
    for scale in (2, 4):
        for number, name in enumerate(('Canon_10', 'DSC_1286', 'sony_95')):
            for split in ('train', 'test')[: 2 if number < 2 else 1]:
                part = root / f'x{scale}' / f'{split.capitalize()}_x{scale}'
                write_pair(
                    part / f'{split}_HR' / f'{name}_x{scale}.png',
                    part / f'{split}_LR' / f'{name}_x1.png',
                    scale,
                    number,
                )
    return root


def read(path, key):
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return cv2.imdecode(np.frombuffer(transaction.get(key.encode()), np.uint8), cv2.IMREAD_UNCHANGED)


def names(sources):
    return [(source.key, source.hr.name, {scale: path.name for scale, path in source.lr.items()}) for source in sources]


def test_realsr_train_and_test(realsr, tmp_path):
    for split, size, keys in (
        (
            'train',
            24,
            [f'{camera}_00{n}_s00{s}' for camera in ('Canon', 'Nikon') for n in (1, 2) for s in (1, 2, 3, 4)],
        ),
        ('test', 0, ['Canon_001', 'Nikon_001']),
    ):
        out = tmp_path / split
        options = ['--scale', '4', '--size', str(size), '--step', '24', '--split', split]
        assert main(['prepare', str(realsr), '-o', str(out), *options]) == 0
        end = '_sub.lmdb' if size else '.lmdb'
        assert sorted(path.name for path in out.iterdir()) == [f'HR{end}', f'LR_X4{end}']
        assert list(read_meta_info(out / f'LR_X4{end}')) == keys
    folder = realsr / 'Nikon' / 'Test' / '4'
    np.testing.assert_array_equal(
        read(tmp_path / 'test' / 'HR.lmdb', 'Nikon_001'), cv2.imread(str(folder / 'Nikon_001_HR.png'))
    )
    captured = cv2.imread(str(folder / 'Nikon_001_LR4.png'))
    np.testing.assert_array_equal(read(tmp_path / 'test' / 'LR_X4.lmdb', 'Nikon_001'), captured)
    assert (captured != bicubic_downscale(cv2.imread(str(folder / 'Nikon_001_HR.png')), 4)).any()


def test_realsr_from_any_of_its_folders(realsr, monkeypatch):
    two = [
        ('Canon_001', 'Canon_001_HR.png', {2: 'Canon_001_LR2.png'}),
        ('Canon_002', 'Canon_002_HR.png', {2: 'Canon_002_LR2.png'}),
    ]
    assert names(find_sources([realsr / 'Canon'], [2], split='train')) == two
    assert names(find_sources([realsr / 'Canon' / 'Train' / '2'], [2])) == two
    monkeypatch.chdir(realsr / 'Canon' / 'Train' / '2')
    assert names(find_sources(['.'], [2])) == two
    with pytest.raises(InputError, match=r'\. is RealSR with train at scale 2, where scale 4 is wanted'):
        find_sources(['.'], [4])
    shutil.copytree('.', realsr / 'flat')
    assert names(find_sources([realsr / 'flat'], [2])) == two
    assert len(find_sources([realsr / 'Canon', realsr / 'Nikon'], [3], split='train')) == 4


def test_drealsr_from_any_of_its_folders(drealsr, tmp_path):
    test = [
        ('Canon_10', 'Canon_10_x4.png', {4: 'Canon_10_x1.png'}),
        ('DSC_1286', 'DSC_1286_x4.png', {4: 'DSC_1286_x1.png'}),
    ]
    part = drealsr / 'x4' / 'Test_x4'
    assert names(find_sources([drealsr], [4], split='test')) == test
    assert names(find_sources([drealsr / 'x4'], [4], split='test')) == test
    assert names(find_sources([part], [4])) == test
    assert [key for key, *_ in names(find_sources([drealsr], [2], split='train'))] == [
        'Canon_10',
        'DSC_1286',
        'sony_95',
    ]
    # HR and LR folders named one by one are plain folders, whose keys are the names of the HR files.
    plain = find_sources([part / 'test_HR'], [4], [part / 'test_LR'])
    assert names(plain) == [(hr[:-4], hr, lr) for _, hr, lr in test]
    shutil.copytree(part, drealsr / 'again' / 'x4' / 'Test_x4' / 'Test_x4')
    assert names(find_sources([drealsr / 'again'], [4])) == test
    assert names(find_sources([drealsr / 'again' / 'x4'], [4])) == test
    prepared = prepare_databases([part], tmp_path / 'out', (4,), size=0)
    assert prepared.databases[4].name == 'LR_X4.lmdb' and prepared.entries == 2


def test_patches_of_one_photograph_pair_by_their_number(tmp_path):
    for number in (1, 12):
        write_pair(
            tmp_path / 'Train_x4' / 'train_HR' / f'P1_x4_{number}.png',
            tmp_path / 'Train_x4' / 'train_LR' / f'P1_x1_{number}.png',
            4,
            number,
        )
    for name in ('a', 'b'):
        write_pair(
            tmp_path / 'Train_x4' / 'train_HR' / f'{name}.png', tmp_path / 'Train_x4' / 'train_LR' / f'{name}.png', 4, 0
        )
    assert names(find_sources([tmp_path], [4])) == [
        ('P1_1', 'P1_x4_1.png', {4: 'P1_x1_1.png'}),
        ('P1_12', 'P1_x4_12.png', {4: 'P1_x1_12.png'}),
        ('a', 'a.png', {4: 'a.png'}),
        ('b', 'b.png', {4: 'b.png'}),
    ]


def test_missing_partners(realsr, drealsr, refused):
    folder = realsr / 'Canon' / 'Train' / '4'
    (folder / 'Canon_002_LR4.png').unlink()
    reason = f'{folder}/Canon_002_HR.png has no LR image in {folder}, where it must be called `Canon_002_LR4`'
    assert f'1 of 4 images cannot be used, which --skip-broken leaves out: {reason}.' in (
        refused(realsr, '--scale', 4, '--split', 'train')
    )
    assert names(find_sources([folder], [4], misfits={})) == [
        ('Canon_001', 'Canon_001_HR.png', {4: 'Canon_001_LR4.png'}),
    ]
    (folder / 'Canon_001_LR4.png').unlink()
    for given, total in ((realsr, 4), (folder, 2)):
        message = refused(given, '--scale', 4, '--split', 'train')
        assert message.startswith(f'2 of {total} images cannot be used') and message.endswith(f'\n  {reason}.')
        assert f'{folder}/Canon_001_HR.png has no LR image in {folder}' in message
    with pytest.raises(InputError, match='2 of 2 images cannot be used:'):
        find_sources([folder], [4], misfits={})
    folder = realsr / 'Nikon' / 'Test' / '2'
    (folder / 'Nikon_001_HR.png').unlink()
    message = refused(realsr, '--scale', 2, '--split', 'test')
    assert message.endswith(f'{folder}/Nikon_001_LR2.png has no HR image in {folder}.')
    folder = drealsr / 'x4' / 'Train_x4'
    (folder / 'train_LR' / 'sony_95_x1.png').unlink()
    message = refused(drealsr, '--scale', 4, '--split', 'train')
    assert f'sony_95_x4.png has no LR image in {folder}/train_LR, where it must be called `sony_95_x1`.' in message
    shutil.rmtree(folder / 'train_LR')
    assert 'train_LR is not a folder' in refused(drealsr, '--scale', 4, '--split', 'train')


def test_what_is_wanted_is_not_told_or_not_there(realsr, drealsr, make_images, tmp_path, refused):
    assert '--split must be train or test for ' in refused(realsr, '--scale', 4)
    assert '--split must be train or test, got valid.' in refused(realsr, '--scale', 4, '--split', 'valid')
    for root, name in ((realsr, 'RealSR'), (drealsr, 'DRealSR')):
        message = refused(root, '--split', 'test')
        assert f'--scale must be one scale at a time for {root}, got 2 3 4: {name}' in message
        assert 'has LR images of its own' in refused(root, '--split', 'test', '--scale', 4, '--lr', root)
    there = 'DRealSR with test at scale 2, test at scale 4, train at scale 2, train at scale 4'
    assert f'{there}, where train at scale 3 is wanted' in refused(drealsr, '--split', 'train', '--scale', 3)
    test_x4 = drealsr / 'x4' / 'Test_x4'
    assert 'DRealSR with test at scale 4, where train' in refused(test_x4, '--split', 'train', '--scale', 4)
    message = refused(make_images(tmp_path / 'photos', [(48, 48)]), '--split', 'test')
    assert '--split is for RealSR and DRealSR' in message
    assert main(['degrade', str(realsr / 'Canon' / 'Test' / '4'), '-o', str(tmp_path / 'out'), '--scale', '4']) == 2


def test_lr_images_as_large_as_their_hr_images(realsr, refused):
    folder = realsr / 'Canon' / 'Test' / '4'
    shutil.copy(folder / 'Canon_001_HR.png', folder / 'Canon_001_LR4.png')
    message = refused(realsr / 'Canon', '--scale', 4, '--split', 'test')
    assert 'Canon_001_LR4.png must be 4 times smaller than' in message and 'version 3 of RealSR' in message


def test_folders_of_photographs_are_what_they_were(tmp_path, make_images):
    # Names and folders that only look like those of the published sets.
    train = make_images(tmp_path / 'Train' / '4', [(48, 48)], ['one'])
    hr = make_images(tmp_path / 'photos', [(48, 48)] * 2, ['a_HR', 'b_x4'])
    make_images(hr / 'train_HR', [(48, 48)])
    lr = make_images(tmp_path / 'lr', [(12, 12)] * 2, ['a_HR', 'b_x4x4'])
    for folder, keys in ((train, ['one']), (hr, ['a_HR', 'b_x4'])):
        sources = find_sources([folder], [2, 4])
        assert [(source.key, source.lr, source.captured) for source in sources] == [(key, {}, False) for key in keys]
    assert [source.lr[4].name for source in find_sources([hr], [4], [lr])] == ['a_HR.png', 'b_x4x4.png']
    with pytest.raises(InputError, match='RealSR or DRealSR, with a folder .*CAMERA/Train/4 or Train_x4'):
        find_sources([tmp_path], [4])
