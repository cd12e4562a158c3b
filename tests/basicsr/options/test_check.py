"""The check of option files: each mistake gives its one sentence, and correct files give none."""

import copy
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs.swinir_arch import SwinIR
from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY
from PIL import Image
from tiny_gan import tiny_gan_options, write_data
from tiny_run import TINY_OPTIONS, change, write_pairs

from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.archs.lkdn import LKDN
from lora_sr.basicsr.options import check_options
from lora_sr.option_file import OptionLoader, load_options

DISTILLATION = """\
network_t: {{type: SPAN, feature_channels: 8, upscale: 2}}
network_g: {{type: SPAN, feature_channels: 4, upscale: 2}}
path: {{pretrain_network_t: {teacher}, param_key_t: params}}
train:
  optim_g: {{type: Adam, lr: 1e-3}}
  scheduler: {{type: MultiStepLR, milestones: [3]}}
  total_iter: 6
  pixel_opt: {{type: L1Loss}}
  distill_pixel_opt: {{type: L1Loss}}
  affinity_opt: {{type: SpatialAffinityLoss, loss_weight: 1.0, layers: [block_1, block_2]}}
"""


@pytest.fixture
def options(tiny_options):
    return load_options(tiny_options)


@pytest.fixture
def distillation(options, tmp_path):
    from lora_sr.archs.span import SPAN

    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    options.update(yaml.load(DISTILLATION.format(teacher=tmp_path / 'teacher.pth'), Loader=OptionLoader))
    options['model_type'] = 'DistillationModel'
    return options


def check(options, tmp_path, is_train=True):
    return check_options(options, is_train, tmp_path)


def test_correct_files(options, pairs, tmp_path, distillation):
    before = str(distillation)
    assert check(distillation, tmp_path) == []
    assert str(distillation) == before
    for suffix, backend in (('', 'disk'), ('.lmdb', 'lmdb')):
        (tmp_path / 'x.yml').write_text(TINY_OPTIONS.format(root=pairs, suffix=suffix, backend=backend))
        opt = load_options(tmp_path / 'x.yml')
        assert check(opt, tmp_path) == []
        change(opt, 'datasets', {'test_1': opt['datasets']['val']})
        assert check(opt, tmp_path, is_train=False) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ['teacher.pth', 'tiny.yml', 'x.yml']


CHANGES = [
    ('name', ..., 'name is missing'),
    ('name', 'a/b', "name has to be the name of a folder, not 'a/b'"),
    ('name', '..', "name has to be the name of a folder, not '..'"),
    ('datasets.val.name', '../x', "datasets.val.name has to be a name, of a folder as well, not '../x'"),
    ('datasets.val.name', '/x', "datasets.val.name has to be a name, of a folder as well, not '/x'"),
    ('model_type', 'SRModell', "model_type: there is no model 'SRModell'; did you mean SRModel"),
    ('num_gpu', 99, 'num_gpu is 99, but this machine has'),
    ('num_gpu', 'all', "num_gpu has to be a whole number of at least 0, not 'all'"),
    ('logger.print_freq', ..., 'logger.print_freq is missing'),
    ('logger', ..., 'logger is missing'),
    ('logger.save_checkpoint_freq', 0, 'logger.save_checkpoint_freq has to be a whole number of at least 1, not 0'),
    ('path', None, 'path has to be a section of keys, not None'),
    ('path', 4, 'path has to be a section of keys, not 4'),
    (
        'path.pretrain_network_g',
        'no.pth',
        'path.pretrain_network_g: the checkpoint no.pth cannot be read: No such file',
    ),
    ('path.pretrain_network_x', 'no.pth', 'path.pretrain_network_x is given, but there is no network_x'),
    ('path.resume_state', 'no.state', 'path.resume_state: the checkpoint no.state cannot be read: No such file'),
    ('network_g.type', 'MSRResnet', "network_g.type: there is no network 'MSRResnet'; did you mean MSRResNet"),
    ('network_g.type', ..., 'network_g.type is missing'),
    ('network_g.type', ['MSRResNet'], "network_g.type has to be a name, not ['MSRResNet']"),
    ('network_g.upscale', None, 'network_g.upscale: MSRResNet cannot be built with None: '),
    ('network_g.num_feats', 4, 'network_g.num_feats is not a known key; the keys here are num_in_ch, num_out_ch'),
    ('network_g.upscale', 4, 'network_g.upscale is 4, but scale is 2; they have to be equal'),
    ('network_g.upscale', ..., 'network_g.upscale is 4 by default in MSRResNet, but scale is 2'),
    ('network_g.num_feat', 'many', "network_g.num_feat has to be a number, not 'many'"),
    ('scale', ..., 'scale is missing'),
    ('train.total_iter', -5, 'train.total_iter has to be a whole number of at least 1, not -5'),
    ('train.optim_g', ..., 'train.optim_g is missing'),
    ('train.optim_g.type', 'AdmaW', "train.optim_g.type: there is no optimizer 'AdmaW'; did you mean AdamW"),
    ('train.optim_g.type', ['AdamW'], "train.optim_g.type has to be a name, not ['AdamW']"),
    ('train.optim_g.lr', ..., 'train.optim_g.lr is missing'),
    ('train.optim_g.lr', '1e-4x', "train.optim_g.lr has to be a number, not '1e-4x'"),
    ('train.optim_g.momentum', 0.9, 'train.optim_g.momentum is not a known key; the keys here are lr, betas'),
    ('train.optim_g.betas', [0.9, 2], 'train.optim_g.betas: AdamW refuses [0.9, 2]: Invalid beta'),
    ('train.optim_g.betas', [], 'train.optim_g.betas has 0 values; AdamW takes 2, e.g. [0.9, 0.999]'),
    ('train.scheduler.type', 'MultistepLR', "train.scheduler.type: there is no scheduler 'MultistepLR'; did you mean"),
    ('train.scheduler.milestone', [3], 'train.scheduler.milestone is not a known key; the keys here are milestones'),
    ('train.scheduler.milestones', 3, 'train.scheduler.milestones has to be a list of numbers, not 3'),
    ('train.scheduler.restarts', [0, 2], 'train.scheduler.restart_weights has 1 values, but restarts 2'),
    (
        'train.scheduler',
        {'type': 'CosineAnnealingRestartLR', 'periods': [2, 2], 'restart_weights': [1, 1]},
        'train.scheduler.periods add up to 4, which has to be at least train.total_iter (6)',
    ),
    ('train.pixel_opt.type', 'L1Los', "train.pixel_opt.type: there is no loss 'L1Los'; did you mean L1Loss"),
    (
        'train.pixel_opt.weight',
        1,
        'train.pixel_opt.weight is not a known key; the keys here are loss_weight, reduction',
    ),
    ('train.pixel_opt', None, 'train.pixel_opt and train.perceptual_opt are both missing; SRModel needs one'),
    ('val.val_freq', ..., 'val.val_freq is missing'),
    ('val.metrics.psnr.type', 'psnr', "val.metrics.psnr.type: there is no metric 'psnr'; "),
    ('val.metrics.psnr.crop_border', ..., 'val.metrics.psnr.crop_border is missing'),
    ('datasets.train', ..., 'datasets.train is missing; the datasets are val'),
    ('datasets.test_1', {}, 'datasets.test_1: a dataset is named train or val'),
    ('datasets.train.type', 'PairedDataset', "datasets.train.type: there is no dataset 'PairedDataset'; did you mean"),
    ('datasets.train.dataroot_gt', 'none', 'datasets.train.dataroot_gt: none does not exist'),
    ('datasets.train.dataroot_lq', ..., 'datasets.train.dataroot_lq is missing'),
    ('datasets.train.io_backend', {'type': 'zip'}, 'datasets.train.io_backend has to be {type: disk} or {type: lmdb}'),
    ('datasets.train.io_backend', {'type': 'lmdb'}, None),
    ('datasets.train.gt_size', 15, 'datasets.train.gt_size is 15, which has to be a multiple of scale (2)'),
    ('datasets.train.gt_size', 64, "datasets.train.gt_size: 64 is larger than the GT image '000.png' of 32x32"),
    ('datasets.train.prefetch_mode', 'gpu', "datasets.train.prefetch_mode: there is no 'gpu'"),
    (
        'datasets.train.dataset_enlarge_ratio',
        0,
        'datasets.train.dataset_enlarge_ratio has to be a number of at least 1',
    ),
    (
        'datasets.train.batch_size_per_gpu',
        200,
        'datasets.train.batch_size_per_gpu must be at most 80, the patches of an epoch, got 200; raise '
        'dataset_enlarge_ratio to 2500, say',
    ),
]


@pytest.mark.parametrize(('path', 'value', 'sentence'), CHANGES)
def test_mistakes(options, tmp_path, path, value, sentence):
    change(options, path, value)
    problems = check(options, tmp_path)
    if sentence is None:  # two folders are wrong
        assert [problem.split(':')[0] for problem in problems] == [
            f'{path[:14]}.dataroot_{key}' for key in ('gt', 'lq')
        ]
        assert all('has to end in .lmdb, since io_backend is lmdb' in problem for problem in problems)
    else:
        assert len(problems) == 1, problems
        assert problems[0].startswith(sentence)


@pytest.mark.parametrize(
    ('section', 'right', 'wrong'),
    [
        ('', 'network_g', 'netwrok_g'),
        ('', 'datasets', 'dataset'),
        ('path', 'pretrain_network_g', 'pretrain_netwrok_g'),
        ('train', 'total_iter', 'total_iters'),
        ('train', 'scheduler', 'shceduler'),
        ('val', 'val_freq', 'val_freqs'),
        ('logger', 'print_freq', 'print_frq'),
        ('datasets.train', 'dataroot_gt', 'dataroot_gtt'),
        ('datasets.train', 'batch_size_per_gpu', 'batch_size_pre_gpu'),
        ('train.optim_g', 'lr', 'lrr'),
        ('train.scheduler', 'milestones', 'milestonse'),
        ('val.metrics.psnr', 'crop_border', 'crop_boarder'),
    ],
)
def test_misspelt_keys(options, tmp_path, section, right, wrong):
    """A misspelt key is told with the right one, and only once, though the right one is missing then."""
    place = options
    for key in section.split('.') if section else ():
        place = place[key]
    place[wrong] = place.pop(right)
    prefix = f'{section}.' if section else ''
    assert check(options, tmp_path) == [f"{prefix}{wrong} is not a known key; did you mean '{right}'?"]


def test_everything_at_once(options, tmp_path):
    for path, value in (('network_g.upscale', 3), ('train.optim_g.type', 'Adm'), ('datasets.val.dataroot_gt', 'none')):
        change(options, path, value)
    assert [problem.split(' ')[0].rstrip(':') for problem in check(options, tmp_path)] == [
        'network_g.upscale',
        'train.optim_g.type',
        'datasets.val.dataroot_gt',
    ]


CLONED = """\
from basicsr.models import sr_model


class SRModel(sr_model.SRModel):
    def init_training_settings(self):
        train_opt = self.opt['train']
        self.fft = train_opt.get('fft_opt')
        self.start = self.opt['train']['start_iter']
"""


@pytest.fixture
def others(monkeypatch):
    """A model, a dataset and a loss of somebody else's."""
    from basicsr.data.paired_image_dataset import PairedImageDataset
    from basicsr.models.sr_model import SRModel

    class MyModel(SRModel):
        pass

    class MyDataset(PairedImageDataset):
        pass

    for registry, entry in ((MODEL_REGISTRY, MyModel), (DATASET_REGISTRY, MyDataset)):
        monkeypatch.setitem(registry._obj_map, entry.__name__, entry)


def test_unknown_keys_of_others_are_left_alone(options, tmp_path, others):
    change(options, 'model_type', 'MyModel')
    change(options, 'datasets.train.type', 'MyDataset')
    assert check(options, tmp_path) == []
    for path in ('my_own_key', 'train.something_else', 'path.memory', 'val.every', 'datasets.train.shuffle'):
        change(options, path, {'a': 1})
    change(options, 'datasets.train.gt_size')  # what theirs inherits from may need it, theirs may not
    assert check(options, tmp_path) == []


def test_what_a_class_reads_in_a_clone_is_known(options, tmp_path, monkeypatch):
    (tmp_path / 'sr_model.py').write_text(CLONED)
    spec = importlib.util.spec_from_file_location('basicsr.models.cloned', tmp_path / 'sr_model.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(MODEL_REGISTRY._obj_map, 'SRModel', module.SRModel)
    for path in ('train.fft_opt', 'train.start_iter', 'train.use_amp'):
        change(options, path, None)
    (problem,) = check(options, tmp_path)
    assert problem.startswith('train.use_amp is not a known key')


def test_what_others_inherit_is_known(options, tmp_path, others):
    change(options, 'model_type', 'MyModel')
    change(options, 'datasets.train.type', 'MyDataset')
    change(options, 'train.pixle_opt', options['train'].pop('pixel_opt'))
    change(options, 'train.ema_decay', 2)
    change(options, 'datasets.train.use_rot', 'no')
    assert check(options, tmp_path) == [
        "train.pixle_opt is not a known key; did you mean 'pixel_opt'?",
        'train.ema_decay has to be a number of at least 0 and less than 1, not 2',
        "datasets.train.use_rot has to be true or false, not 'no'",
    ]


UNKNOWN = [
    ('my_own_key', 'the keys here are name, model_type, scale'),
    ('gt_size', 'the keys here are name, model_type, scale'),
    ('find_unused_parameter', "did you mean 'find_unused_parameters'?"),
    ('path.strict_load', "did you mean 'strict_load_"),
    ('train.use_amp', 'the keys here are pixel_opt, perceptual_opt, ema_decay'),
    ('train.ema', 'the keys here are pixel_opt'),
    ('train.gan_iters', 'the keys here are pixel_opt'),
    ('val.save_best', 'the keys here are val_freq, save_img, suffix, metrics, pbar'),
    ('val.metrics.psnr.crop', 'the keys here are crop_border, input_order'),
    ('logger.print_every', 'the keys here are print_freq'),
    ('logger.wandb.entity', 'the keys here are project, resume_id'),
    ('dist_params.backends', 'the keys here are backend, port'),
    ('datasets.train.use_shuffle', 'the keys here are name, type, dataroot_gt'),
    ('datasets.train.kernel_list', 'the keys here are name, type, dataroot_gt'),
    ('datasets.val.lq_size', "did you mean 'gt_size'?"),
    ('datasets.val.io_backend.path', 'the keys here are type'),
    ('network_g.deploy', 'the keys here are num_in_ch'),
    ('train.optim_g.warmup', 'the keys here are lr'),
    ('train.scheduler.warmup', 'the keys here are milestones'),
    ('train.pixel_opt.eps', 'the keys here are loss_weight'),
]


@pytest.mark.parametrize(('path', 'end'), UNKNOWN)
def test_unknown_keys_everywhere(options, tmp_path, path, end):
    options['logger']['wandb'] = {'project': None}
    change(options, path, 1)
    (problem,) = check(options, tmp_path)
    assert problem.startswith(f'{path} is not a known key; {end}')


def test_unknown_key_hides_no_other_mistake(options, tmp_path):
    change(options, 'datasets.train.use_shuffle', True)
    change(options, 'datasets.train.gt_size', 64)
    unknown, large = check(options, tmp_path)
    assert unknown.startswith('datasets.train.use_shuffle is not a known key')
    assert large.startswith('datasets.train.gt_size: 64 is larger than')


def paths_of(section: dict, start: str = '') -> list[str]:
    """Every key of an option file, as `a.b.c`."""
    found = []
    for key, value in section.items():
        found += [f'{start}{key}', *(paths_of(value, f'{start}{key}.') if isinstance(value, dict) else [])]
    return found


def misspell(options: dict, path: str) -> tuple[dict, str]:
    """A copy of options with the last two letters of a key swapped, in its place, and that key as it now stands."""
    options = section = copy.deepcopy(options)
    *parents, key = path.split('.')
    for parent in parents:
        section = section[parent]
    wrong = f'{key[:-2]}{key[-1]}{key[-2]}'
    entries = [(wrong if name == key else name, value) for name, value in section.items()]
    section.clear()
    section.update(entries)
    return options, wrong


GANS = [pytest.param(model, marks=pytest.mark.slow) for model in ('ESRGANModel', 'RealESRGANModel')]


@pytest.mark.parametrize('model', ['SRModel', 'DistillationModel', *GANS])
def test_a_misspelled_key_is_told_in_one_sentence(request, tmp_path, model):
    """Not also what follows from it: that the key is missing, that a constructor refuses it, that scales differ."""
    if 'GAN' in model:
        write_data(tmp_path)
        options = yaml.load(tiny_gan_options(model, tmp_path), Loader=OptionLoader)
    else:
        options = request.getfixturevalue('options' if model == 'SRModel' else 'distillation')
    paths = [path for path in paths_of(options) if len(path.split('.')[-1]) > 4 and path != 'val.metrics.psnr']
    assert len(paths) > 30
    for path in paths:
        misspelled, key = misspell(options, path)
        if key != path.split('.')[-1]:
            (problem,) = check(misspelled, tmp_path)
            assert key in problem and path.split('.')[-1] in problem.partition(key)[2]


@pytest.mark.slow
def test_no_value_is_too_strange(distillation, tmp_path):
    """Whatever stands somewhere, the check ends, and tells it or finds nothing."""
    for path in paths_of(distillation):
        for value in (None, 'x', -1, ['x'], {}):
            options = copy.deepcopy(distillation)
            change(options, path, value)
            assert all(isinstance(problem, str) for problem in check(options, tmp_path))


@pytest.mark.parametrize('section', ['', 'path', 'train', 'val', 'logger', 'datasets.train'])
def test_keys_that_nobody_reads_may_hold_anything(options, tmp_path, section):
    change(options, f'{section}.x-common'.lstrip('.'), {'a': [1]})
    assert check(options, tmp_path) == []


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('imports', ['my_networks', 'archs/mine.py'], ''),
        ('imports', 'my_networks', "imports has to be a list of modules or .py files, not 'my_networks'"),
        ('manual_seed', None, ''),
        ('manual_seed', 'x', "manual_seed has to be a whole number from 0 to 4294966271 or ~, not 'x'"),
        ('find_unused_parameters', 1, 'find_unused_parameters has to be true or false, not 1'),
        ('dist_params.backend', 'ncll', "dist_params.backend: there is no 'ncll'; it is one of nccl, gloo, mpi"),
        ('path.strict_load_g', 'no', "path.strict_load_g has to be true or false, not 'no'"),
        ('path.pretrain_network_g', 3, 'path.pretrain_network_g has to be a path or ~, not 3'),
        ('train.total_iter', 6.0, ''),
        ('train.warmup_iter', -2, 'train.warmup_iter has to be a whole number of at least -1, not -2'),
        ('train.ema_decay', 1, 'train.ema_decay has to be a number of at least 0 and less than 1, not 1'),
        ('val.save_img', 'false', "val.save_img has to be true or false, not 'false'"),
        ('val.suffix', ['a'], "val.suffix has to be a text or a number or ~, not ['a']"),
        ('logger.use_tb_logger', 'no', "logger.use_tb_logger has to be true or false, not 'no'"),
        (
            'logger.wandb',
            {'project': 'sr'},
            'logger.wandb copies what TensorBoard gets; set logger.use_tb_logger: true',
        ),
        ('logger.wandb', 'sr', "logger.wandb has to be a section of keys, not 'sr'"),
        ('datasets.train.use_hflip', 'yes', "datasets.train.use_hflip has to be true or false, not 'yes'"),
        ('datasets.train.mean', 0.5, 'datasets.train.mean has to be a list of numbers or ~, not 0.5'),
        ('datasets.val.pin_memory', 'no', "datasets.val.pin_memory has to be true or false, not 'no'"),
    ],
)
def test_values_of_the_wrong_kind(options, tmp_path, path, value, sentence):
    change(options, path, value)
    assert check(options, tmp_path) == [sentence] * bool(sentence)


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('network_t', ..., 'network_t, the teacher of a DistillationModel, is missing'),
        ('path.pretrain_network_t', None, 'path.pretrain_network_t, the trained weights of the teacher, is missing'),
        ('path.param_key_t', ['params'], "path.param_key_t has to be params, params_ema or ~, not ['params']"),
        ('network_t.feature_channels', 12, 'path.pretrain_network_t: '),
        ('train.total_iters', 6, 'train.total_iters is not a known key; the keys here are pixel_opt'),
        ('train.perceptual_opt', None, 'train.perceptual_opt is not a known key; the keys here are pixel_opt'),
        ('train.affinity_opt.layers', 'block_1', 'train.affinity_opt.layers has to be a list of module names'),
        ('train.affinity_opt.layers', {'student': ['block1'], 'teacher': ['block_1']},
         "train.affinity_opt.layers: there is no module 'block1' in the student, SPAN; near names are block_1"),
        ('train.affinity_opt.layers', {'student': ['conv_1'], 'teacher': ['conv_1.sk']},
         "train.affinity_opt.layers: there is no module 'conv_1.sk' in the teacher, SPAN; near names are conv_1"),
        ('train.affinity_opt.layer', [1], "train.affinity_opt.layer is not a known key; the keys here are loss_weight"),
        ('train.affinity_opt.layers', {'student': ['block_1'], 'teacher': ['block_1', 'block_2']},
         'train.affinity_opt.layers has 1 layers of the student, but 2 of the teacher'),
        ('train.memory_format', 'nhwc',
         "train.memory_format: there is no 'nhwc'; it is one of contiguous, channels_last"),
    ],
)  # fmt: skip
def test_distillation(distillation, tmp_path, path, value, sentence):
    change(distillation, path, value)
    if path == 'network_t':
        change(distillation, 'path.pretrain_network_t')
        change(distillation, 'train.affinity_opt.layers', {'student': ['block_1'], 'teacher': ['block_2']})
    problems = [
        problem for problem in check(distillation, tmp_path) if path != 'network_t' or 'pretrain' not in problem
    ]
    assert len(problems) == 1, problems
    assert problems[0].startswith(sentence)


def test_distillation_without_sections(distillation, tmp_path):
    for key in ('train', 'network_t', 'path'):
        change(distillation, key)
    assert check(distillation, tmp_path) == [
        'path is missing',
        'train is missing',
        'network_t, the teacher of a DistillationModel, is missing',
    ]


# --- data ---


@pytest.fixture
def data(tmp_path):
    """Pairs of one's own to damage, and options for them, as databases."""
    write_pairs(tmp_path / 'data')

    def options(suffix):
        (tmp_path / 'data.yml').write_text(
            TINY_OPTIONS.format(root=tmp_path / 'data', suffix=suffix, backend='lmdb' if suffix else 'disk')
        )
        opt = load_options(tmp_path / 'data.yml')
        del opt['datasets']['val']
        return opt

    return tmp_path / 'data', options


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


def test_workers_that_persist(options, tmp_path):
    change(options, 'datasets.train.persistent_workers', True)
    sentence = 'datasets.train.persistent_workers needs workers; raise num_worker_per_gpu, or set it to false'
    assert check(options, tmp_path) == [sentence]
    change(options, 'datasets.train.num_worker_per_gpu', 1)
    assert check(options, tmp_path) == []


def test_loggers_that_are_not_installed(options, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    change(options, 'logger.use_tb_logger', True)
    change(options, 'logger.wandb', {'project': 'x'})
    assert check(options, tmp_path) == [
        f'logger.{key} needs {name}, which is not installed: pip install {name}'
        for key, name in (('wandb', 'wandb'), ('use_tb_logger', 'tensorboard'))
    ]


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


def test_output_folder_that_cannot_be_written(options, tmp_path):
    (tmp_path / 'experiments').write_text('a file')
    folder = tmp_path / 'experiments'
    assert check(options, tmp_path) == [f'the output folder {folder} cannot be written: {folder}: it is not a folder']


def test_affinity_with_several_gpus_needs_a_process_for_each(distillation, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    distillation['num_gpu'] = 'auto'
    one, four = (check_options(distillation, True, tmp_path, processes) for processes in (1, 4))
    assert [problem.startswith('train.affinity_opt does not work with several GPUs') for problem in one] == [True]
    assert four == []


def test_names_with_the_suffix_of_basicsr_are_known(options, tmp_path):
    change(options, 'network_g', {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 2})
    assert check(options, tmp_path) == []


def test_network_that_needs_an_absent_file_is_one_sentence(options, tmp_path):
    change(options, 'network_g', {'type': 'BasicVSR', 'num_feat': 4, 'num_block': 1, 'spynet_path': 'absent.pth'})
    assert [
        problem.startswith("network_g.spynet_path: BasicVSR cannot be built with 'absent.pth': ")
        for problem in check(options, tmp_path)
    ] == [True]


@pytest.mark.parametrize(
    ('key', 'value', 'sentence'),
    [
        ('foreach', True, None),
        ('betas', [0.98, 0.92], '"betas" of Adan must be three numbers'),
        ('betas', [0.98, 0.92, 1], '"betas" of Adan must be three numbers'),
        ('betas', 0.98, '"betas" of Adan must be three numbers'),
        ('weight_decay', -1, '"weight_decay" of Adan must be a number of at least 0, got -1'),
    ],
)
def test_adan(options, tmp_path, key, value, sentence):
    change(options, 'train.optim_g', {'type': 'Adan', 'lr': 5e-3, 'betas': [0.98, 0.92, 0.99], 'weight_decay': 0})
    change(options, f'train.optim_g.{key}', value)
    problems = check(options, tmp_path)
    assert len(problems) == (sentence is not None), problems
    assert all(re.match(rf'train.optim_g(\.\w+)?: .*{re.escape(sentence)}', problem) for problem in problems)


def adapted() -> dict:
    base = {'type': 'LKDN', 'num_feat': 4, 'num_atten': 4, 'num_block': 1, 'upscale': 2}
    return {'type': 'AdaptSR', 'base': base, 'lora': {'target_modules': ['B1\\..*', 'c1'], 'rank': 2}}


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('lora.rank', 2, None),
        ('lora.groups', ['attention', 'upsampler'], None),
        ('base', ..., 'network_g.base is missing'),
        ('base', 'LKDN', "network_g.base has to be a section of keys, not 'LKDN'"),
        ('base.type', 'LKDNS', "network_g.base.type: there is no network 'LKDNS'; did you mean LKDN"),
        ('base.num_feats', 4, 'network_g.base.num_feats is not a known key; the keys here are num_in_ch'),
        ('base.upscale', 3, 'network_g.base.upscale is 3, but scale is 2; they have to be equal'),
        ('base.upscale', ..., 'network_g.base.upscale is 4 by default in LKDN, but scale is 2; they have to be equal'),
        ('base.num_feat', 5, 'network_g.base: "num_feat" of LKDN is 5: it must be even'),
        ('base.num_block', {}, 'network_g.base.num_block has to be a number, not {}'),
        ('lora', ..., 'network_g.lora is missing'),
        ('lora', 8, 'network_g: "lora" of AdaptSR has to be a section, e.g. {groups: [all], rank: 8}, not 8'),
        ('lora.target_modules', ..., 'network_g: LoRA has neither groups nor target_modules: say what to adapt'),
        ('lora.target_modules', ['B1'], 'network_g: target_modules "B1" matches "B1", a LKDB, which cannot carry'),
        ('lora.target_modules', 3, 'network_g: "target_modules" of LoRA must be a list, got 3'),
        ('lora.groups', ['convs'], 'network_g: groups of LoRA has no "convs": did you mean "conv"?'),
        (
            'lora.groups',
            ['mlp'],
            'network_g: LKDN has no layer of the group "mlp"; its groups are conv, attention, ups',
        ),
        ('lora.also_train', ['position'], 'network_g: also_train of LoRA has "position", but LKDN has nothing of that'),
        ('lora.rank', 0, 'network_g: LoRA rank of "rank" must be an integer of at least 1, got 0'),
        ('lora.rank_pattern', {'c2': 4}, 'network_g: rank_pattern "c2" matches "c2", a BSConvU'),
        ('lora.target', ['c1'], 'network_g: Unknown LoRA option "target": did you mean "target_modules"?'),
        ('targets', ['c1'], 'network_g.targets is not a known key; the keys here are base, lora'),
    ],
)
def test_network_with_lora(options, tmp_path, path, value, sentence):
    change(options, 'network_g', adapted())
    base = LKDN(num_feat=4, num_atten=4, num_block=1, upscale=2)
    torch.save({'params': base.state_dict()}, tmp_path / 'base.pth')
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    change(options, f'network_g.{path}', value)
    problems = check(options, tmp_path)
    assert len(problems) == (sentence is not None), problems
    assert all(problem.startswith(sentence) for problem in problems)


SMALL_SWINIR = {'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'window_size': 4, 'mlp_ratio': 2, 'upscale': 2}
SMALL_SWINIR['upsampler'] = 'pixelshuffledirect'


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize(
    ('network', 'sentence'),
    [
        (LKDN(num_feat=4, num_atten=4, num_block=1, upscale=2), 'is a checkpoint of LKDN, not of SwinIR'),
        (SwinIR(img_size=8, **SMALL_SWINIR), 'is of a SwinIR with img_size 8, not 16'),
        (SwinIR(img_size=16, **SMALL_SWINIR), None),
    ],
)
def test_base_checkpoint_of_another_network(options, tmp_path, wrapped, network, sentence):
    torch.save({'params': network.state_dict()}, tmp_path / 'base.pth')
    base = {'type': 'SwinIR', 'img_size': 16, **SMALL_SWINIR}
    lora = {'type': 'AdaptSR', 'base': base, 'lora': {'groups': ['all'], 'rank': 2}}
    change(options, 'network_g', lora if wrapped else base)
    change(options, 'path.pretrain_network_g', str(tmp_path / 'base.pth'))
    expected = [f'path.pretrain_network_g: {tmp_path}/base.pth {sentence}'] if sentence else []
    assert check(options, tmp_path) == expected


def test_base_of_an_adapted_network_is_needed(options, tmp_path):
    change(options, 'network_g', adapted())
    missing = ['path.pretrain_network_g, the weights of the network that AdaptSR adapts, is missing']
    assert check(options, tmp_path) == missing
    for states in ('training_states/3.state', 'models/net_g_3.pth'):
        file = tmp_path / 'experiments' / options['name'] / states
        file.parent.mkdir(parents=True)
        torch.save({}, file)
    assert check({**options, 'auto_resume': True}, tmp_path) == []


def test_alpha_of_the_checkpoint_is_told(options, tmp_path):
    change(options, 'network_g', adapted())
    arguments = {key: value for key, value in adapted().items() if key != 'type'}
    for alpha, expected in ((2, []), (16, ['has alpha 16 in B1.c1_d, but network_g 2; give its alpha'])):
        network = AdaptSR(arguments['base'], {**arguments['lora'], 'alpha': alpha})
        torch.save({'params': network.state_dict()}, tmp_path / f'{alpha}.pth')
        change(options, 'path.pretrain_network_g', str(tmp_path / f'{alpha}.pth'))
        found = check(options, tmp_path)
        assert found == [f'path.pretrain_network_g: {tmp_path}/{alpha}.pth {sentence}' for sentence in expected]


LKDN_OF_4 = {'type': 'LKDN', 'num_feat': 4, 'num_atten': 4, 'num_block': 1}
SPAN_OF_4 = {'type': 'SPAN', 'feature_channels': 4}


@pytest.mark.parametrize(
    ('network', 'deploy', 'layers'),
    [
        (LKDN_OF_4, {}, 'upsampler.0'),
        (
            {**LKDN_OF_4, 'upsampler': 'pixelshuffle_rep'},
            {},
            'upsampler.conv1, upsampler.conv3, upsampler.conv3x3',
        ),
        (SPAN_OF_4, {}, 'upsampler.0'),
        (SPAN_OF_4, {'deploy': True}, 'upsampler.0'),  # folded on the way
        (SPAN_OF_4, {'type': 'DSCLoRA'}, 'upsampler.0'),
    ],
)
def test_checkpoint_of_another_scale(options, tmp_path, network, deploy, layers):
    from basicsr.utils.registry import ARCH_REGISTRY

    arguments = {key: value for key, value in network.items() if key != 'type'}
    file = tmp_path / 'x4.pth'
    torch.save({'params': ARCH_REGISTRY.get(network['type'])(**arguments, upscale=4).state_dict()}, file)
    change(options, 'network_g', {**network, **deploy, 'upscale': 2})
    change(options, 'path.pretrain_network_g', str(file))
    sentence = f'path.pretrain_network_g: {file} is of scale 4 and network_g of scale 2: all but {layers} fits'
    assert check(options, tmp_path) == [f'{sentence}; to start from it, set path.strict_load_g: false']
    change(options, 'path.strict_load_g', False)
    assert check(options, tmp_path) == []

    change(options, 'path.strict_load_g', True)
    change(options, 'datasets', {'test': options['datasets']['val']})
    assert check(options, tmp_path, is_train=False) == [f'{sentence}; give a checkpoint of scale 2']


def test_checkpoint_of_another_scale_that_differs_elsewhere_too(options, tmp_path):
    torch.save({'params': LKDN(num_feat=4, num_atten=4, num_block=2).state_dict()}, tmp_path / 'x4.pth')
    change(options, 'network_g', {**LKDN_OF_4, 'upscale': 2})
    change(options, 'path.pretrain_network_g', str(tmp_path / 'x4.pth'))
    (problem,) = check(options, tmp_path)
    assert 'does not fit LKDN' in problem and 'scale' not in problem


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
    assert check(without_gt, tmp_path) == [
        f'datasets.train.dataroot_lq: {root}/lq/x.pcx is not an image of a format that OpenCV reads'
    ]
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
