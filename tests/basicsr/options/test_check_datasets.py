"""The check of data sets: folders and databases of pairs, also several."""

import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from option_check import check
from PIL import Image
from tiny_run import TINY_OPTIONS, change, write_pairs

from lora_sr.basicsr.options.dataset_content import _read_header
from lora_sr.option_file import load_options

NEEDS_PIPES = pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with names')


def write_image(path: Path, height: int, width: int):
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def missing_lr(root):
    (root / 'lq/003.png').unlink()


def strange_lr(root):
    (root / 'lq/003.png').rename(root / 'lq/3.png')


def wrong_size(root):
    write_image(root / 'gt/005.png', 32, 30)


def unreadable(root):
    (root / 'gt/004.png').write_bytes(b'not an image')


def cut_short(root):
    path = root / 'lq/004.png'
    path.write_bytes(path.read_bytes()[:-100])


def no_images(root):
    for name in ('gt', 'lq'):
        shutil.rmtree(root / name)
        (root / name).mkdir()


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (missing_lr, "datasets.train: GT and LR do not pair: '003.png' is missing in dataroot_lq (ROOT/lq)"),
        (strange_lr, "datasets.train: GT and LR do not pair: '003.png' is missing in dataroot_lq (ROOT/lq), '3.png' is "
                     'missing in dataroot_gt (ROOT/gt)'),
        (wrong_size, "datasets.train: GT and LR do not pair: '005.png' is 30x32 in GT and 16x16 in LR, which is not 2 "
                     'times as large (scale: 2)'),
        (unreadable, 'datasets.train.dataroot_gt: ROOT/gt/004.png is not an image, or a damaged one'),
        (cut_short, 'datasets.train.dataroot_lq: ROOT/lq/004.png is not an image, or a damaged one'),
        (no_images, 'datasets.train.dataroot_gt: ROOT/gt holds no images'),
    ],
)  # fmt: skip
def test_damaged_folders(data, tmp_path, damage, sentence):
    root, options = data
    assert check(options(''), tmp_path) == []
    damage(root)
    assert check(options(''), tmp_path) == [sentence.replace('ROOT', str(root))]


def no_meta(root):
    (root / 'gt.lmdb/meta_info.txt').unlink()


def huge_meta(root):
    os.truncate(root / 'gt.lmdb/meta_info.txt', 6 << 30)  # takes no place on the disk


def pipe_as_meta(root):
    no_meta(root)
    os.mkfifo(root / 'gt.lmdb/meta_info.txt')


def sizes_beyond_numbers(root):
    (root / 'gt.lmdb/meta_info.txt').write_text(f'000.png ({"9" * 5000},32,3) 1\n')


def no_database(root):
    (root / 'gt.lmdb/data.mdb').unlink()


def no_format(root):
    (root / 'gt.lmdb/data.mdb').write_bytes(b'x' * 9000)


def short_file(root):
    path = root / 'gt.lmdb/data.mdb'
    path.write_bytes(path.read_bytes()[:-5000])


def missing_entry(root):
    path = root / 'gt.lmdb/meta_info.txt'
    path.write_text(path.read_text().replace('003.png', '103.png'))


def fewer_lines(root):
    for name in ('gt', 'lq'):
        path = root / f'{name}.lmdb/meta_info.txt'
        path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-1]))


def other_scale(root):
    shutil.rmtree(root / 'lq.lmdb')
    write_pairs(root / 'x4', scale=4)
    (root / 'x4/lq.lmdb').rename(root / 'lq.lmdb')


def other_keys(root):
    shutil.rmtree(root / 'lq.lmdb')
    write_pairs(root / 'more', count=10)
    (root / 'more/lq.lmdb').rename(root / 'lq.lmdb')


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (no_meta, 'datasets.train.dataroot_gt: ROOT/gt.lmdb/meta_info.txt cannot be read'),
        (
            huge_meta,
            'datasets.train.dataroot_gt: ROOT/gt.lmdb/meta_info.txt must be a list of images of at most 1 GiB, got 6.0',
        ),
        pytest.param(
            pipe_as_meta,
            'datasets.train.dataroot_gt: the list ROOT/gt.lmdb/meta_info.txt cannot be read: it must be a file, got a',
            marks=NEEDS_PIPES,
        ),
        (sizes_beyond_numbers, 'datasets.train.dataroot_gt: ROOT/gt.lmdb/meta_info.txt, line 1: "000.png (999'),
        (no_database, 'datasets.train.dataroot_gt: the database ROOT/gt.lmdb has no data.mdb'),
        (no_format, 'datasets.train.dataroot_gt: the database ROOT/gt.lmdb is damaged: '),
        (short_file, 'datasets.train.dataroot_gt: the database ROOT/gt.lmdb is damaged: data.mdb has '),
        (missing_entry, "datasets.train.dataroot_gt: the database ROOT/gt.lmdb has no entry '103'"),
        (fewer_lines, 'datasets.train.dataroot_gt: the database ROOT/gt.lmdb has 8 entries, but meta_info.txt 7'),
        (
            other_scale,
            "datasets.train: GT and LR do not pair: '000' is 32x32 in GT and 8x8 in LR, which is not 2 times",
        ),
        (
            other_keys,
            "datasets.train: GT and LR do not pair: '008' and 1 more are missing in dataroot_gt (ROOT/gt.lmdb)",
        ),
    ],
)
def test_damaged_databases(data, tmp_path, damage, sentence):
    root, options = data
    assert check(options('.lmdb'), tmp_path) == []
    damage(root)
    problems = check(options('.lmdb'), tmp_path)
    assert len(problems) == 1, problems
    assert problems[0].startswith(sentence.replace('ROOT', str(root)))


def test_validation_may_have_a_border(data, tmp_path):
    """BasicSR crops GT images of the validation sets; benchmark sets need it."""
    root, options = data
    write_image(root / 'gt/005.png', 33, 35)
    opt = options('')
    change(opt, 'datasets', {'test': opt['datasets']['train']})
    assert check(opt, tmp_path, is_train=False) == []


def test_data_for_less_than_a_batch(data, tmp_path):
    _, options = data
    opt = options('')
    change(opt, 'datasets.train.dataset_enlarge_ratio', 1)
    change(opt, 'datasets.train.batch_size_per_gpu', 9)
    sentence = (
        'datasets.train.batch_size_per_gpu must be at most 8, the patches of an epoch, got 9; raise '
        'dataset_enlarge_ratio to 113, say'
    )
    assert check(opt, tmp_path) == [sentence]
    change(opt, 'datasets.train.batch_size_per_gpu', 5)  # the three that are left over do not end a run early
    assert check(opt, tmp_path) == []


def test_validation_sets_of_one_name(options, tmp_path):
    change(options, 'datasets.val_2', {**options['datasets']['val']})
    sentence = 'datasets.val_2.name must differ from that of datasets.val, got val for both'
    assert check(options, tmp_path) == [sentence]
    change(options, 'datasets.val_2.name', 'train')  # no images and no curves go by the name of the training set
    assert check(options, tmp_path) == []


def test_images_that_exif_data_turn(data, tmp_path):
    """OpenCV turns them as it reads; of a pair it must turn both."""
    root, options = data
    opt = options('')
    exif = Image.Exif()
    exif[0x0112] = 6

    def write(folder, turned):
        for file in (root / folder).glob('*.png'):
            image = Image.open(file).convert('RGB')
            image.save(file, exif=exif) if turned else image.save(file)

    write('gt', True)
    (problem,) = check(opt, tmp_path)
    assert re.search(
        "GT and LR do not pair: the EXIF data of '000.png' turn it one way in GT and another in LR", problem
    )
    write('lq', True)
    assert check(opt, tmp_path) == []


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_sizes_are_those_that_opencv_decodes(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / f'image{suffix}'
    Image.new('RGB', (12, 8)).save(file, exif=exif)
    assert _read_header(file, whole=True) == (cv2.imread(str(file)).shape[:2], turn)


def test_cut_jpeg(data, tmp_path):
    root, options = data
    for folder in ('gt', 'lq'):
        for file in (root / folder).glob('*.png'):
            Image.open(file).convert('RGB').save(file.with_suffix('.jpg'))
            file.unlink()
    assert check(options(''), tmp_path) == []
    file = root / 'gt/003.jpg'
    file.write_bytes(file.read_bytes()[:-40])
    assert check(options(''), tmp_path) == [f'datasets.train.dataroot_gt: {file} is not an image, or a damaged one']


def test_list_beside_a_database(data, tmp_path):
    _, options = data
    opt = options('.lmdb')
    for count, faults in ((8, 0), (3, 1)):
        (tmp_path / 'list.txt').write_text(''.join(f'{index:03}.png (32,32,3)\n' for index in range(count)))
        change(opt, 'datasets.train.meta_info_file', str(tmp_path / 'list.txt'))
        assert [problem.split(';')[0] for problem in check(opt, tmp_path)] == faults * [
            'datasets.train.meta_info_file names 3 images, but BasicSR reads all 8 of a database'
        ]


@pytest.mark.parametrize('suffix', ['', '.lmdb'])
@pytest.mark.parametrize(
    ('make', 'sentence'),
    [
        pytest.param(
            lambda file: os.mkfifo(file),
            'the list FILE cannot be read: it must be a file, got a pipe',
            marks=NEEDS_PIPES,
        ),
        (
            lambda file: (file.touch(), os.truncate(file, 6 << 30)),
            'FILE must be a list of images of at most 1 GiB, got',
        ),
        (Path.touch, 'FILE must name an image in each line, got an empty file'),
        (lambda file: file.write_text('000.png\n\n'), 'FILE must name an image in each line, got "" in line 2'),
        (lambda file: file.write_text('x' * 9000), f'FILE must name an image in each line, got "{"x" * 60}…'),
    ],
)
def test_lists_that_are_none(data, tmp_path, make, sentence, suffix):
    _, options = data
    opt, file = options(suffix), tmp_path / 'list.txt'
    make(file)
    change(opt, 'datasets.train.meta_info_file', str(file))
    (problem,) = check(opt, tmp_path)
    assert problem.startswith(f'datasets.train.meta_info_file: {sentence.replace("FILE", str(file))}')


# --- several roots ---


@pytest.fixture(params=['', '.lmdb'], ids=['folders', 'databases'])
def two(request, tmp_path):
    """Options of a run on two roots, which have names in common, and the folder with them."""
    write_pairs(tmp_path / 'data/a')
    write_pairs(tmp_path / 'data/b', count=3)
    file, suffix = tmp_path / 'two.yml', request.param
    file.write_text(TINY_OPTIONS.format(root=tmp_path, suffix='', backend='lmdb' if suffix else 'disk'))
    opt = load_options(file)
    for section in opt['datasets'].values():
        for key in ('gt', 'lq'):
            section[f'dataroot_{key}'] = [f'{tmp_path}/data/{name}/{key}{suffix}' for name in 'ab']
    return opt, tmp_path / 'data', suffix


def test_several_roots_are_correct(two, tmp_path):
    opt, root, suffix = two
    assert check(opt, tmp_path) == []
    train = opt['datasets']['train']
    for key in ('dataroot_gt', 'dataroot_lq'):
        train[key] = [*train[key], train[key][0]]
    train.update(dataset_enlarge_ratio=1, batch_size_per_gpu=19)
    assert check(opt, tmp_path) == []
    train['batch_size_per_gpu'] = 20
    sentence = 'datasets.train.batch_size_per_gpu must be at most 19, the patches of an epoch, got 20; raise'
    assert [problem[: len(sentence)] for problem in check(opt, tmp_path)] == [sentence]


def test_each_root_is_checked(two, tmp_path):
    opt, root, suffix = two
    for name in 'ab':
        shutil.rmtree(root / name / f'lq{suffix}')
        write_pairs(root / f'x4/{name}', count=2, scale=4) if name == 'b' else None
    (root / f'x4/b/lq{suffix}').rename(root / f'b/lq{suffix}')
    del opt['datasets']['val']
    missing = f"'002{'' if suffix else '.png'}' is missing in dataroot_lq ({root}/b/lq{suffix})"
    assert check(opt, tmp_path) == [
        f'datasets.train.dataroot_lq: {root}/a/lq{suffix} does not exist',
        f'datasets.train: GT and LR do not pair: {missing}',
    ]


def test_sizes_are_told_with_their_root(two, tmp_path):
    opt, root, suffix = two
    del opt['datasets']['val']
    change(opt, 'datasets.train.gt_size', 40)
    name = '000' if suffix else '000.png'
    sentence = "datasets.train.gt_size: 40 is larger than the GT image '{}' of 32x32"
    assert check(opt, tmp_path) == [sentence.format(f'{root}/{part}/gt{suffix}/{name}') for part in 'ab']
    change(opt, 'datasets.train.gt_size', 16)
    change(opt, 'datasets.train.dataroot_lq', [f'{root}/a/lq{suffix}', f'{root}/b/gt{suffix}'])
    (problem,) = check(opt, tmp_path)
    assert problem.startswith(f"datasets.train: GT and LR do not pair: '{root}/b/gt{suffix}/{name}' is 32x32 in GT and")


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('dataroot_lq', ['a'], 'dataroot_lq must have one entry for each of the 2 of dataroot_gt, got 1'),
        ('dataroot_lq', 'a', 'dataroot_lq must have one entry for each of the 2 of dataroot_gt, got 1'),
        ('meta_info_file', ['a'] * 3, 'meta_info_file must have one entry for each of the 2 of dataroot_gt, got 3'),
        ('dataroot_gt', [], 'dataroot_gt has to be a folder or a database, or a list of them, not []'),
        (
            'dataroot_gt',
            ['a', None],
            "dataroot_gt has to be a folder or a database, or a list of them, not ['a', None]",
        ),
        (
            'dataroot_gt',
            [['a'], 'b'],
            "dataroot_gt has to be a folder or a database, or a list of them, not [['a'], 'b']",
        ),
        ('meta_info_file', [], 'meta_info_file has to be a path, or a list of them or ~, not []'),
        ('meta_info_file', [['a'], 'b'], "meta_info_file has to be a path, or a list of them or ~, not [['a'], 'b']"),
        ('meta_info_file', ['nowhere', None], 'meta_info_file: nowhere cannot be read: [Errno 2] No such file or'),
        (
            'type',
            'RealESRGANPairedDataset',
            'dataroot_gt of a RealESRGANPairedDataset must be one path, got a list',
        ),
    ],
)
def test_lists_of_roots_that_are_wrong(two, tmp_path, path, value, sentence):
    opt, _, _ = two
    del opt['datasets']['val']
    change(opt, f'datasets.train.{path}', value)
    assert check(opt, tmp_path)[0].startswith(f'datasets.train.{sentence}')


def test_a_list_of_one_database_is_told_with_it(two, tmp_path):
    opt, root, suffix = two
    (tmp_path / 'list.txt').write_text('000.png (32,32,3)\n')
    change(opt, 'datasets.train.meta_info_file', [None, f'{tmp_path}/list.txt'])
    expected = f'datasets.train.meta_info_file names 1 images, but BasicSR reads all 3 of {root}/b/gt.lmdb'
    assert [problem.split(';')[0] for problem in check(opt, tmp_path)] == ([expected] if suffix else [])


def test_images_of_one_name_are_not_saved_over_each_other(two, tmp_path, monkeypatch):
    opt, _, suffix = two
    monkeypatch.chdir(tmp_path)  # where paths are short

    def roots(names):
        for key in ('gt', 'lq'):
            change(opt, f'datasets.val.dataroot_{key}', [f'data/{name}/{key}{suffix}' for name in names])

    roots('ab')
    assert check(opt, tmp_path) == []  # as long as they are not saved
    change(opt, 'val.save_img', True)
    for names in ('ab', 'aa'):
        roots(names)
        first, second = (f'data/{name}/lq{suffix}' for name in names)
        assert check(opt, tmp_path) == [
            f"datasets.val must have images of different names to save them, got '000' in {first} and in {second}: "
            'make a dataset of each root, or set val.save_img: false'
        ]
    roots('a')
    assert check(opt, tmp_path) == []


def test_workers_that_persist(options, tmp_path):
    change(options, 'datasets.train.persistent_workers', True)
    sentence = 'datasets.train.persistent_workers needs workers; raise num_worker_per_gpu, or set it to false'
    assert check(options, tmp_path) == [sentence]
    change(options, 'datasets.train.num_worker_per_gpu', 1)
    assert check(options, tmp_path) == []


def test_metrics_without_ground_truth(options, data, tmp_path):
    root, _ = data
    change(options, 'datasets.val.type', 'SingleImageDataset')
    change(options, 'datasets.val.dataroot_gt')
    (problem,) = check(options, tmp_path)
    assert problem.startswith(
        'val.metrics.psnr: calculate_psnr compares with a ground truth, which datasets.val, a Sing'
    )
    change(options, 'val.metrics', {'niqe': {'type': 'calculate_niqe', 'crop_border': 2}})
    assert check(options, tmp_path) == []
