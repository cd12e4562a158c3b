"""The check of option files: each mistake gives its one sentence, and correct files give none."""

import copy
import importlib.util
import re
import sys

import pytest
import torch
import yaml
from basicsr.utils.registry import MODEL_REGISTRY
from option_check import check, paths_of
from tiny_gan import tiny_gan_options, write_data
from tiny_run import TINY_OPTIONS, change

from lora_sr.basicsr.options import check_options
from lora_sr.basicsr.options.check import for_screen
from lora_sr.basicsr.options.whole_numbers import make_whole
from lora_sr.option_file import OptionLoader, load_options


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
    ('name', 'a\nb', "name has to be the name of a folder, not 'a\\nb'"),
    ('train.scheduler.gamma', -0.5, 'train.scheduler.gamma has to be a number of at least 0, not -0.5'),
    ('network_d', {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'a\nb': 1}, 'network_d.a\\nb is not a known key'),
    ('train.optim_g.lr', 1e300, 'train.optim_g.lr has to be a number, not 1e+300'),
    ('name', 'x' * 201, "name has to be the name of a folder, not 'xxx"),
    ('datasets.val.name', 'a\nb', "datasets.val.name has to be a name, of a folder as well, not 'a\\nb'"),
    (
        'val.metrics.psnr.crop_border',
        [4],
        'val.metrics.psnr.crop_border has to be a whole number from 0 to 1024, not [4]',
    ),
    (
        'val.metrics.psnr.crop_border',
        4.0,
        'val.metrics.psnr.crop_border has to be a whole number from 0 to 1024, not 4.0',
    ),
    (
        'val.metrics.psnr.crop_border',
        None,
        'val.metrics.psnr.crop_border has to be a whole number from 0 to 1024, not None',
    ),
    (
        'val.metrics.psnr.crop_border',
        -1,
        'val.metrics.psnr.crop_border has to be a whole number from 0 to 1024, not -1',
    ),
    (
        'model_type',
        'VideoBaseModel',
        'datasets.val.type has to be a dataset of videos for a VideoBaseModel, not PairedImageDataset',
    ),
    ('datasets.val.name', '../x', "datasets.val.name has to be a name, of a folder as well, not '../x'"),
    ('datasets.val.name', '/x', "datasets.val.name has to be a name, of a folder as well, not '/x'"),
    ('model_type', 'SRModell', "model_type: there is no model 'SRModell'; did you mean SRModel"),
    ('num_gpu', 99, 'num_gpu is 99, but this machine has'),
    ('num_gpu', 'all', "num_gpu has to be a whole number of at least 0, not 'all'"),
    ('logger.print_freq', ..., 'logger.print_freq is missing'),
    ('logger.keep_last', 0, 'logger.keep_last has to be a whole number of at least 1 or ~, not 0'),
    ('logger.keep_best', 'ssim', "logger.keep_best has to be a name in val.metrics (psnr), not 'ssim'"),
    (
        'logger.save_images_to_tb',
        True,
        'logger.save_images_to_tb needs TensorBoard; set logger.use_tb_logger: true',
    ),
    ('train.max_minutes', 0, 'train.max_minutes has to be a number of at least 0.1 or ~, not 0'),
    ('val.tile', 0.5, 'val.tile has to be a whole number of at least 1 or ~, not 0.5'),
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
    (
        'train.optim_g',
        {'type': 'pytorch_optimizer.SOAP', 'lr': 1e-3, 'nonsense': 1},
        'train.optim_g.nonsense is not a known key; the keys here are lr, betas',
    ),
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
    ('train.use_half', 'the keys here are pixel_opt, perceptual_opt, ema_decay'),
    ('train.use_amp', "did you mean 'amp'?"),
    ('train.ema', 'the keys here are pixel_opt'),
    ('train.gan_freq', 'the keys here are pixel_opt'),
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


def test_tiles_for_images_of_one_size(options, tmp_path, monkeypatch):
    change(options, 'val.tile', 64)
    assert check(options, tmp_path) == []
    monkeypatch.setattr('lora_sr.basicsr.options.general.network_info', lambda network: None)
    (problem,) = check(options, tmp_path)
    assert problem == 'val.tile needs a network that takes images of any size; leave it out for MSRResNet'


def test_the_best_of_a_run_without_validation(options, tmp_path):
    change(options, 'logger.keep_best', 'psnr')
    assert check(options, tmp_path) == []
    change(options, 'val', None)
    (problem,) = check(options, tmp_path)
    assert problem == "logger.keep_best has to be a name in val.metrics (there is none), not 'psnr'"


def test_unknown_key_hides_no_other_mistake(options, tmp_path):
    change(options, 'datasets.train.use_shuffle', True)
    change(options, 'datasets.train.gt_size', 64)
    unknown, large = check(options, tmp_path)
    assert unknown.startswith('datasets.train.use_shuffle is not a known key')
    assert large.startswith('datasets.train.gt_size: 64 is larger than')


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
        ('path.param_key_t', ['params'], "path.param_key_t has to be a key, keys joined by dots, or ~, not ['params']"),
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


def test_loggers_that_are_not_installed(options, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    change(options, 'logger.use_tb_logger', True)
    change(options, 'logger.wandb', {'project': 'x'})
    assert check(options, tmp_path) == [
        f'logger.{key} needs {name}, which is not installed: pip install {name}'
        for key, name in (('wandb', 'wandb'), ('use_tb_logger', 'tensorboard'))
    ]


def test_problems_for_a_screen():
    (long,) = for_screen(['a' * 200 + 'END' * 60])
    assert len(long) == 300 and long.startswith('a' * 190) and long.endswith('END') and ' … ' in long
    assert for_screen(['one\ntwo', '']) == ['one\\ntwo', '']
    many = for_screen(list(map(str, range(30))))
    assert len(many) == 20 and many[18:] == ['18', '… and 11 more problems']


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('manual_seed', 2**32 - 1025, None),
        ('manual_seed', 2**32 - 1024, 'manual_seed has to be a whole number from 0 to 4294966271 or ~, not 4294966272'),
        ('datasets.train.num_worker_per_gpu', 1024, None),
        (
            'datasets.train.num_worker_per_gpu',
            1025,
            'datasets.train.num_worker_per_gpu has to be a whole number',
        ),
        (
            'datasets.train.dataset_enlarge_ratio',
            10**8,
            'datasets.train.dataset_enlarge_ratio must be at most 12,5',
        ),
        ('train.optim_g.amsgrad', 'x', "train.optim_g.amsgrad has to be true or false, not 'x'"),
    ],
)
def test_limits(options, tmp_path, path, value, sentence):
    change(options, path, value)
    problems = check(options, tmp_path)
    assert problems == [] if sentence is None else len(problems) == 1 and problems[0].startswith(sentence)


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
    assert all(re.match(rf'train.optim_g(\.{key})?: .*{re.escape(sentence)}', problem) for problem in problems)


def test_whole_numbers_are_made_whole_where_they_count():
    given = {
        'scale': 4.0,
        'num_gpu': 0.0,
        'train': {'total_iter': 1e5, 'warmup_iter': -1.0, 'optim_g': {'lr': 1.0}, 'ema_decay': 1.0},
        'datasets': {'train': {'gt_size': 96.0, 'mean': [1.0], 'dataset_enlarge_ratio': 2.5}, 'val': None},
        'logger': 3,
        'val': {'val_freq': 5e3, 'metrics': {'psnr': {'crop_border': 4.0}}},
    }
    make_whole(given)
    text = repr(given)
    assert text == (
        "{'scale': 4, 'num_gpu': 0, 'train': {'total_iter': 100000, 'warmup_iter': -1, 'optim_g': {'lr': 1.0}, "
        "'ema_decay': 1.0}, 'datasets': {'train': {'gt_size': 96, 'mean': [1.0], 'dataset_enlarge_ratio': 2.5}, "
        "'val': None}, 'logger': 3, 'val': {'val_freq': 5000, 'metrics': {'psnr': {'crop_border': 4.0}}}}"
    )
