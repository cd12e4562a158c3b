"""Weights in wrapped files, as other trainers write them, are found by one rule, and are the very same weights."""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from basicsr.archs.rrdbnet_arch import RRDBNet
from safetensors.torch import save_file
from spandrel import MAIN_REGISTRY, ModelLoader
from tiny_run import TINY_OPTIONS, run_python, write_pairs
from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora, save_adapter
from lora_sr.archs import SPAN
from lora_sr.checkpoints import Checkpoint, NetworkSource, load_network
from lora_sr.checkpoints.content import load_weights, read_checkpoint
from lora_sr.checkpoints.unwrapping import WRAPPERS, bare_weights, find_weights
from lora_sr.cli.main import main
from lora_sr.errors import InputError

KEY = 'block_3.c1_r.eval_conv.weight'


def plain() -> OrderedDict:
    torch.manual_seed(0)
    return SPAN(feature_channels=4, upscale=2, deploy=True).state_dict()


def other() -> OrderedDict:
    return OrderedDict((name, value + 1) for name, value in plain().items())


def before(prefix: str, state: dict) -> dict:
    return {f'{prefix}{name}': value for name, value in state.items()}


def within(name: str) -> str:
    return name.replace('block_3.', 'block_3._orig_mod.')


D = {'0.weight': torch.zeros(2, 3, 3, 3)}
OPTIMIZER = {'state': {0: {'exp_avg': torch.zeros(3), 'step': torch.zeros(())}}, 'param_groups': [{'lr': 0.1}]}
# What stands in the file -> where the weights are in it, and what is left out of their names.
FILES = {
    'plain': (plain(), None, ''),
    'BasicSR': ({'params': plain()}, 'params', ''),
    'BasicSR with EMA': ({'params': other(), 'params_ema': plain()}, 'params_ema', ''),
    'no average': ({'params': plain(), 'params_ema': None}, 'params', ''),
    'an empty average': ({'params_ema': {}, 'params': plain()}, 'params', ''),
    'DataParallel': ({'params': before('module.', plain())}, 'params', 'module.'),
    'some behind DataParallel': (
        {**before('module.', dict(list(plain().items())[:9])), **dict(list(plain().items())[9:])},
        None,
        'module.',
    ),
    'compiled': ({'params': before('_orig_mod.', plain())}, 'params', '_orig_mod.'),
    'compiled DataParallel': (before('module._orig_mod.', plain()), None, 'module._orig_mod.'),
    'DataParallel, compiled': (before('_orig_mod.module.', plain()), None, '_orig_mod.module.'),
    'blocks compiled': ({within(name): value for name, value in plain().items()}, None, '_orig_mod.'),
    'FSDP': (before('_fsdp_wrapped_module.', plain()), None, '_fsdp_wrapped_module.'),
    'AveragedModel': ({**before('module.', plain()), 'n_averaged': torch.tensor(9)}, None, 'module.'),
    'Lightning': (
        {
            'state_dict': {**before('net_g.', plain()), **before('net_d.', D), **before('cri_perceptual.vgg.', D)},
            'optimizer_states': [OPTIMIZER],
            'epoch': 3,
            'pytorch-lightning_version': '2.1',
        },
        'state_dict',
        'net_g.',
    ),
    'Lightning with a loss': (
        {'state_dict': {**before('model.', plain()), **before('lpips.net.', D)}},
        'state_dict',
        'model.',
    ),
    'Lightning, one network': ({'state_dict': before('model.', plain()), 'global_step': 3}, 'state_dict', 'model.'),
    'MMEditing': (
        {
            'meta': {'iter': 3},
            'state_dict': {
                **before('generator.', other()),
                **before('generator_ema.', plain()),
                **before('discriminator.', D),
                'step_counter': torch.tensor(3),
            },
        },
        'state_dict',
        'generator_ema.',
    ),
    'ema-pytorch': (
        {
            **before('online_model.', other()),
            **before('ema_model.', plain()),
            'initted': torch.tensor(True),
            'step': torch.tensor(7),
        },
        None,
        'ema_model.',
    ),
    'timm': ({'state_dict': other(), 'state_dict_ema': plain(), 'optimizer': OPTIMIZER}, 'state_dict_ema', ''),
    'DeepSpeed': ({'module': plain(), 'optimizer': OPTIMIZER, 'global_steps': 3}, 'module', ''),
    'StyleGAN': ({'g': other(), 'd': D, 'g_ema': plain(), 'g_optim': OPTIMIZER}, 'g_ema', ''),
    'a loop of one page': ({'model': plain(), 'optimizer': OPTIMIZER, 'epoch': 3}, 'model', ''),
    'a loop with two networks': ({'generator': plain(), 'discriminator': D}, 'generator', ''),
    'flattened': ({**before('params.', other()), **before('params_ema.', plain())}, None, 'params_ema.'),
    'weights_ema': ({'weights': other(), 'weights_ema': plain()}, 'weights_ema', ''),
    'an average before its name': (
        {'model_state_dict': other(), 'ema_model_state_dict': plain()},
        'ema_model_state_dict',
        '',
    ),
    'of generators': (
        {'generator': other(), 'ema_generator': plain(), 'discriminator': D, 'ema_discriminator': D},
        'ema_generator',
        '',
    ),
    'SWA': (
        {'model': other(), 'swa_model': {**before('module.', plain()), 'n_averaged': torch.tensor(3)}},
        'swa_model',
        'module.',
    ),
    'a callback': (
        {'state_dict': other(), 'callbacks': {'EMA': {'ema_state_dict': plain()}, 'Timer': {'x': 3}}},
        'callbacks.EMA.ema_state_dict',
        '',
    ),
    'an average within Lightning': (
        {
            'state_dict': {
                **before('model.', other()),
                **before('ema_model.module.', plain()),
                'ema_model.n_averaged': torch.tensor(3),
            }
        },
        'state_dict',
        'ema_model.module.',
    ),
    'another within Lightning': (
        {'state_dict': {**before('model.', other()), **before('model_ema.', plain()), 'val_psnr.sum': torch.ones(1)}},
        'state_dict',
        'model_ema.',
    ),
    'flattened otherwise': ({**before('model.', other()), **before('ema.', plain())}, None, 'ema.'),
    'numbers of an average': ({'params': plain(), 'ema': {'decay': torch.tensor(0.999)}}, 'params', ''),
    'MMagic': (
        {
            'state_dict': {
                **before('generator.', plain()),
                'data_preprocessor.mean': torch.zeros(3, 1, 1),
                'data_preprocessor.std': torch.ones(3, 1, 1),
            }
        },
        'state_dict',
        'generator.',
    ),
    'another name beside its judge': (
        {'state_dict': {**before('sr_model.', plain()), **before('discriminator.', D)}},
        'state_dict',
        'sr_model.',
    ),
    'letters': ({**before('G.', plain()), **before('D.', D)}, None, 'G.'),
    'student and teacher': ({**before('student.', plain()), **before('teacher.', other())}, None, 'student.'),
    'checkpointed blocks': (
        {name.replace('block_3.', 'block_3._checkpoint_wrapped_module.'): value for name, value in plain().items()},
        None,
        '_checkpoint_wrapped_module.',
    ),
    'state dicts of two': ({'G_state_dict': plain(), 'D_state_dict': D}, 'G_state_dict', ''),
    'gen and disc': ({'gen': plain(), 'disc': D}, 'gen', ''),
    'a scaler': ({'sr': plain(), 'scaler': {'_scale': torch.ones(1)}}, 'sr', ''),
    'deep': ({'checkpoint': {'state_dict': {'params': plain()}}}, 'checkpoint.state_dict.params', ''),
    'deeper': ({'a': {'b': {'c': {'f': {'e': plain()}}}}}, 'a.b.c.f.e', ''),
    'KAIR': ({'netG': before('netG.', plain())}, 'netG', 'netG.'),
    'an average with its rate': ({'ema': {'decay': 0.999, 'params': plain()}, 'model': other()}, 'ema.params', ''),
    'nested': ({'model': {'net_g': {'params': before('module.', plain())}}}, 'model.net_g.params', 'module.'),
    'a name of its own': ({'my_network': plain(), 'epoch': 3}, 'my_network', ''),
    'a name of its own with a discriminator': ({'my_network': plain(), 'my_step': 3, 'net_d': D}, 'my_network', ''),
    'names of its own': ({'params': before('trainer.student.', plain())}, 'params', 'trainer.student.'),
    'numbers beside': ({**plain(), 'epoch': 3, 'note': 'mine'}, None, ''),
    'all of them': (
        {'state_dict': before('module.net_g.', plain()), 'epoch': 3},
        'state_dict',
        'module.net_g.',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', FILES)
def test_a_wrapped_file_is_the_plain_one(tmp_path, name):
    content, param_key, prefix = FILES[name]
    torch.save(content, tmp_path / 'net.pth')
    checkpoint = Checkpoint.read(tmp_path / 'net.pth')
    assert (checkpoint.param_key, checkpoint.prefix, checkpoint.family) == (param_key, prefix, 'SPAN')
    assert_equal(load_network(tmp_path / 'net.pth').state_dict())
    if param_key is not None:
        assert_equal(Checkpoint.read(tmp_path / 'net.pth', param_key).state)


@pytest.mark.parametrize('param_key', ['params', 'params_ema', None])
@pytest.mark.parametrize('name', FILES)
def test_a_run_starts_from_it(tmp_path, name, param_key):
    """By the network that it builds, which need not be known here."""
    content, _, _ = FILES[name]
    if param_key == 'params' and name == 'BasicSR with EMA':
        content = {'params': content['params_ema']}
    torch.save(content, tmp_path / 'net.pth')

    class Own(SPAN):
        pass

    network = Own(feature_channels=4, upscale=2, deploy=True)
    load_weights(network, read_checkpoint(tmp_path / 'net.pth'), 'net.pth', param_key)
    assert_equal(network.state_dict())


def assert_equal(state: dict) -> None:
    expected = plain()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_network_of_ones_own_keeps_what_may_be_its_own(tmp_path):
    """Only what is surely added goes from names that nobody knows."""
    state = {'body.0.weight': torch.zeros(3, 3), 'body.1.weight': torch.zeros(3, 3)}
    assert find_weights({'params': before('module.', state)}, 'file').state.keys() == state.keys()
    assert find_weights({'generator.a': torch.zeros(1), 'encoder.b': torch.zeros(1)}, 'file').prefix == ''


class Owned(nn.Module):
    """A network whose parts are called as trainers call theirs."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize(
    'names', [('generator', 'step_embedding'), ('net_g',), ('generator',), ('params',), ('generator', 'teacher_x', 'd')]
)
def test_a_network_of_ones_own_is_saved_and_loaded_whole(tmp_path, names):
    network, again = Owned(*names), Owned(*names)
    assert bare_weights(network.state_dict()).keys() == network.state_dict().keys()
    compiled = before('_orig_mod.', network.state_dict())
    for content in (network.state_dict(), {'params': compiled}, {'params': before('module.', network.state_dict())}):
        torch.save(content, tmp_path / 'net.pth')
        load_weights(again, read_checkpoint(tmp_path / 'net.pth'), 'net.pth', 'params')
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    'name', ['net.pth', 'NET.SAFETENSORS', 'net', 'net.ckpt', b'caf\xe9.pth', b'caf\xe9.safetensors']
)
@pytest.mark.parametrize('kind', ['torch', 'safetensors', 'old'])
def test_contents_tell_the_format_and_not_names(tmp_path, name, kind):
    file = os.path.join(tmp_path, os.fsdecode(name))
    if kind == 'safetensors':
        save_file(plain(), tmp_path / 'written')
    else:
        torch.save(plain(), tmp_path / 'written', _use_new_zipfile_serialization=kind == 'torch')
    try:
        shutil.move(tmp_path / 'written', file)
    except OSError:
        pytest.skip('the file system takes no such names')
    assert_equal(load_network(file).state_dict())


@pytest.mark.parametrize(
    'beginning, kind',
    [
        (b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
        (b'GGUF\x03\0\0\0', 'a GGUF file'),
        (b'7767517\n3 3\n', 'the text of an ncnn network'),
        (b'\x89PNG\r\n\x1a\n', 'a PNG image'),
    ],
)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_files_of_other_kinds_are_named(tmp_path, capsys, beginning, kind, suffix):
    (tmp_path / f'net{suffix}').write_bytes(beginning + bytes(100))
    assert main(['inspect', str(tmp_path / f'net{suffix}')]) == 2
    assert f'must be in the format of torch or of safetensors, got {kind}' in capsys.readouterr().err


def test_an_exported_onnx_is_named(tmp_path, capsys):
    pytest.importorskip('onnx')
    torch.save(plain(), tmp_path / 'net.pth')
    assert main(['export', 'onnx', str(tmp_path / 'net.pth'), '-o', str(tmp_path / 'net.onnx')]) == 0
    shutil.copy(tmp_path / 'net.onnx', tmp_path / 'renamed.pth')
    for name in ('net.onnx', 'renamed.pth'):
        assert main(['inspect', str(tmp_path / name)]) == 2
        assert 'got an ONNX model' in capsys.readouterr().err


@pytest.mark.parametrize(
    'content, unread',
    [
        ({'model': plain(), 'ema': {'decay': 0.999, 'shadow_params': list(other().values())}}, 'ema'),
        ({'model': plain(), 'callbacks': {'EMACallback': {'ema_weights': [torch.zeros(3), torch.zeros(2)]}}},
         'callbacks.EMACallback.ema_weights'),
        ({'state_dict': {**before('model.', plain()),
                         **{f'model_ema.{name.replace(".", "")}': value for name, value in other().items()},
                         'model_ema.decay': torch.ones(())}}, 'model_ema'),
        ({'params': plain(), 'params_ema': dict(list(other().items())[:3])}, 'params_ema'),
    ],
)  # fmt: skip
def test_an_average_that_is_not_read_is_told(tmp_path, caplog, content, unread):
    torch.save(content, tmp_path / 'net.pth')
    assert_equal(load_network(tmp_path / 'net.pth').state_dict())
    assert f'net.pth has a moving average, {unread},' in caplog.text


def test_what_is_several_things_has_to_be_named(tmp_path):
    torch.save({'a': plain(), 'b': other(), 'c': 3}, tmp_path / 'net.pth')
    with pytest.raises(InputError, match='one under a and one under b, which the param_key has to name'):
        Checkpoint.read(tmp_path / 'net.pth')
    assert torch.equal(Checkpoint.read(tmp_path / 'net.pth', 'b').state[KEY], other()[KEY])
    with pytest.raises(InputError, match='has no "params": it has a, b, c'):
        Checkpoint.read(tmp_path / 'net.pth', 'params')
    dotted = {'x.y': {'z': plain()}, 'x': {'y': {'w': other()}}}
    torch.save(dotted, tmp_path / 'net.pth')
    assert torch.equal(Checkpoint.read(tmp_path / 'net.pth', 'x.y.z').state[KEY], plain()[KEY])


def looped() -> dict:
    loop: dict = {f'k{index}': 3 for index in range(50)}
    for index in range(1000):
        loop[f'section{index}'] = loop
    return loop


def shared() -> dict:
    """Sections within sections, each under every name that there is."""
    section: dict = {f'k{index}': index for index in range(2000)}
    for _ in range(4):
        section = dict.fromkeys(WRAPPERS, section)
    return section


def deep() -> dict:
    content: dict = {'params': plain()}
    for _ in range(300):
        content = {'model': content}
    return content


@pytest.mark.parametrize(
    'content',
    [
        looped(),
        shared(),
        deep(),
        {'params': {'a.weight': np.zeros(3)}},
        {'params': {'a.weight': torch.zeros(3), 'b.weight': np.zeros(3)}},
        {'params': {'params': None}},
        {'params': []},
        {'params_ema': 3, 'params': 'x'},
        {'state_dict': {f'net_g.{name}': 3 for name in plain()}},
        {'model': OPTIMIZER},
        {'optimizer': OPTIMIZER},
    ],
)
def test_files_without_weights_end_in_a_sentence(tmp_path, capsys, content):
    sys.setrecursionlimit(10_000)
    torch.save(content, tmp_path / 'net.pth')
    for arguments in (['upscale', 'x.png', '-o', 'y.png', '-m'], ['merge', '-o', str(tmp_path / 'm.pth')]):
        assert main([*arguments, str(tmp_path / 'net.pth')]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'Traceback' not in error


def old_layout(state: dict) -> dict:
    """RRDBNet as ESRGAN's authors first named it, by rules of its own: the sequence of their modules, counted."""
    modules = {'conv_first': '0', 'conv_body': '1.sub.2', 'conv_up1': '3', 'conv_up2': '6', 'conv_hr': '8'}
    modules['conv_last'] = '10'
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition('.')
        if module == 'body':
            block, dense, conv, kind = rest.split('.')
            renamed[f'model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}'] = value
        else:
            renamed[f'model.{modules[module]}.{rest}'] = value
    return renamed


def later_layout(state: dict) -> dict:
    """As BSRGAN and RealSR have it."""
    names = {'conv_body': 'trunk_conv', 'conv_up1': 'upconv1', 'conv_up2': 'upconv2', 'conv_hr': 'HRconv'}
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition('.')
        rest = rest.replace('rdb', 'RDB')
        renamed[f'RRDB_trunk.{rest}' if module == 'body' else f'{names.get(module, module)}.{rest}'] = value
    return renamed


@pytest.mark.parametrize('relayout', [old_layout, later_layout])
@pytest.mark.parametrize('scale', [4, 2, 1])
@torch.no_grad()
def test_older_layouts_of_esrgan_are_basicsrs_network(tmp_path, relayout, scale):
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=scale, num_feat=8, num_block=2, num_grow_ch=32)
    torch.save(before('module.', relayout(network.state_dict())), tmp_path / 'old.pth')
    checkpoint = Checkpoint.read(tmp_path / 'old.pth')
    loaded = load_network(tmp_path / 'old.pth')
    assert checkpoint.family == 'RRDBNet' and type(loaded) is RRDBNet
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in network.state_dict().items())
    image = torch.rand(1, 3, 12, 16)
    by_spandrel = MAIN_REGISTRY.load(relayout(network.state_dict()))
    assert (by_spandrel(image) - loaded(image).clamp(0, 1)).abs().max() < 1e-5

    # A run's network, whose class its option file names.
    run = RRDBNet(3, 3, scale=scale, num_feat=8, num_block=2, num_grow_ch=32)
    load_weights(run, read_checkpoint(tmp_path / 'old.pth'), 'old.pth', 'params')
    assert torch.equal(run(image), network(image))


def test_weights_beside_others_of_its_shape_are_named(tmp_path):
    """What differs is told, and not what follows from it."""
    state = {**plain(), 'conv_last.weight': torch.zeros(3), 'conv_last.bias': torch.zeros(3)}
    del state['conv_cat.weight']
    torch.save(state, tmp_path / 'net.pth')
    with pytest.raises(InputError) as raised:
        load_network(tmp_path / 'net.pth')
    assert 'conv_1.eval_conv.weight' in str(raised.value)  # its first keys

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    changed = {**network.state_dict(), '1.weight': torch.zeros(5, 4, 3, 3)}
    with pytest.raises(InputError, match=r'1.weight has shape \(5, 4, 3, 3\) instead of \(4, 4, 3, 3\)\.?$'):
        load_weights(network, changed, Path('net.pth'))


@pytest.mark.slow
def test_a_run_gives_a_file_back_in_its_own_layout(tmp_path):
    """Trained with LoRA from an old layout, resumed, and merged: the names are the file's, and spandrel reads it."""
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=2, num_feat=8, num_block=2, num_grow_ch=32)
    file = old_layout(network.state_dict())
    torch.save(file, tmp_path / 'old.pth')
    write_pairs(tmp_path / 'pairs')
    options = yaml.safe_load(TINY_OPTIONS.format(root=tmp_path / 'pairs', suffix='', backend='disk'))
    base = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'scale': 2, 'num_feat': 8, 'num_block': 2}
    options['network_g'] = {'type': 'AdaptSR', 'base': base, 'lora': {'groups': ['all'], 'rank': 2}}
    options['path']['pretrain_network_g'] = 'old.pth'
    options['val'] = None
    options['datasets'].pop('val')
    for iterations in (2, 4):
        options['train']['total_iter'] = iterations
        (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(options))
        run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', '--auto_resume', cwd=tmp_path)
    trained = tmp_path / 'experiments' / 'tiny' / 'models' / 'net_g_4.pth'
    assert main(['merge', str(trained), '-o', str(tmp_path / 'merged.pth')]) == 0
    merged = torch.load(tmp_path / 'merged.pth')['params']
    assert merged.keys() == file.keys()
    assert not torch.equal(merged['model.0.weight'], file['model.0.weight'])
    image = torch.rand(1, 3, 12, 16)
    by_spandrel = ModelLoader(device='cpu').load_from_file(tmp_path / 'merged.pth')
    with torch.no_grad():
        assert (by_spandrel(image) - load_network(trained)(image).clamp(0, 1)).abs().max() < 1e-5


class Dictionary(dict):
    """As a trainer's options are one."""


class Marked(dict):
    """A dictionary with attributes, as EasyDict and yacs make them."""

    def __init__(self):
        super().__init__(lr=1e-3)
        self.frozen = True


class Note:
    """A value of a class of the trainer's own."""

    def __init__(self):
        self.text = 'mine'


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'), reason='torch < 2.6 refuses all of them'
)
@pytest.mark.parametrize('is_archive', [True, False])
@pytest.mark.parametrize(
    'beside',
    [
        argparse.Namespace(lr=1e-3),
        np.float64(31.2),
        np.arange(3),
        Path('data'),
        defaultdict(list, {'psnr': [1.0]}),
        Dictionary(lr=1e-3),
        Marked(),
        Note(),
        [Note(), argparse.Namespace(), {'best': np.float32(3)}, Dictionary(a=Dictionary())],
    ],
)
def test_what_else_a_trainer_kept_is_not_read(tmp_path, beside, is_archive):
    content = {'state_dict': plain(), 'hyper_parameters': beside}
    torch.save(content, tmp_path / 'net.pth', _use_new_zipfile_serialization=is_archive)
    assert_equal(load_network(tmp_path / 'net.pth').state_dict())


class Runs:
    """Makes a file when it is unpickled, through whatever of Python's own."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('is_archive', [True, False])
@pytest.mark.parametrize('function', [os.system, os.mkdir, exec, eval, subprocess.call, shutil.copy, runpy.run_path])
def test_nothing_that_it_names_is_run(tmp_path, function, is_archive):
    argument = f"open({str(tmp_path / 'ran')!r}, 'w')" if function in (exec, eval) else f'touch {tmp_path}/ran'
    content = {'state_dict': plain(), 'hyper_parameters': Runs(function, argument)}
    torch.save(content, tmp_path / 'net.pth', _use_new_zipfile_serialization=is_archive)
    before_loading = set(os.listdir())
    try:
        assert_equal(load_network(tmp_path / 'net.pth').state_dict())
    except InputError as error:
        assert 'holds more than tensors and plain values' in str(error)
    assert not (tmp_path / 'ran').exists() and set(os.listdir()) == before_loading


def test_a_pickled_network_is_told(tmp_path):
    torch.save(SPAN(feature_channels=4, deploy=True), tmp_path / 'net.pth')
    with pytest.raises(InputError, match=r'a pickled lora_sr\.archs\.span\.SPAN, which is not run: its state dict has'):
        load_network(tmp_path / 'net.pth')


def test_adapters_go_onto_an_older_layout_and_it_comes_back(tmp_path):
    """`adapter merge`, and `adapter apply` followed by `merge`, give one file, with the names of the base."""
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=4, num_feat=8, num_block=1, num_grow_ch=32)
    file = {name.replace('.sub.2.', '.sub.1.'): value for name, value in old_layout(network.state_dict()).items()}
    torch.save({'state_dict': file}, tmp_path / 'old.pth')
    add_lora(network, LoRAConfig(['conv_first', r'body\.0\.rdb1\.conv1'], rank=2))
    for name, value in network.named_parameters():
        if name.endswith('lora_B'):
            nn.init.normal_(value)
    save_adapter(network, tmp_path / 'a.safetensors')
    old, adapter, applied, merged = (tmp_path / name for name in ('old.pth', 'a.safetensors', 'b.pth', 'c.pth'))
    assert main(['adapter', 'merge', str(old), str(adapter), '-o', str(merged)]) == 0
    assert main(['adapter', 'apply', str(old), str(adapter), '-o', str(applied)]) == 0
    assert main(['merge', str(applied), '-o', str(tmp_path / 'd.pth')]) == 0
    results = [torch.load(tmp_path / name)['params'] for name in ('c.pth', 'd.pth')]
    assert results[0].keys() == results[1].keys() == file.keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in file)
    image = torch.rand(1, 3, 12, 16)
    by_spandrel = ModelLoader(device='cpu').load_from_file(merged)
    with torch.no_grad():
        assert (by_spandrel(image) - network(image).clamp(0, 1)).abs().max() < 1e-5


def test_the_odd_layer_of_a_span_is_the_one_that_is_blamed(tmp_path):
    """Whichever of its layers is of another width."""
    for odd in ('conv_cat.weight', 'conv_1.eval_conv.weight', 'block_4.c2_r.eval_conv.weight'):
        state = plain()
        state[odd] = torch.zeros(7, *state[odd].shape[1:])
        torch.save(state, tmp_path / 'net.pth')
        with pytest.raises(
            InputError, match=rf'does not fit SPAN: {odd} has shape \(7, [^)]*\) instead of \(4, [^)]*\)\.?$'
        ):
            load_network(tmp_path / 'net.pth')


def test_an_option_file_finds_what_a_run_finds(tmp_path):
    """Also under keys within sections, and whatever the names of its network."""
    torch.save({'params': other(), 'model': {'net_g': before('module.', plain())}}, tmp_path / 'net.pth')
    section = 'network_g: {type: SPAN, feature_channels: 4, upscale: 2, deploy: true}\n'
    path = f'path: {{pretrain_network_g: {tmp_path / "net.pth"}, param_key_g: model.net_g}}\n'
    (tmp_path / 'net.yml').write_text(section + path)
    assert_equal(load_network(tmp_path / 'net.yml').state_dict())


def test_an_adapter_of_others_knows_the_names_of_the_file(tmp_path):
    """Whoever trained it had the file, and not BasicSR's network."""
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=4, num_feat=8, num_block=1, num_grow_ch=32)
    file = {name.replace('.sub.2.', '.sub.1.'): value for name, value in old_layout(network.state_dict()).items()}
    torch.save(file, tmp_path / 'old.pth')
    down, up = torch.randn(2, 3, 3, 3), torch.randn(8, 2, 1, 1)
    kohya = {'lora_unet_model_0.lora_down.weight': down, 'lora_unet_model_0.lora_up.weight': up}
    save_file({**kohya, 'lora_unet_model_0.alpha': torch.tensor(1.0)}, tmp_path / 'kohya.safetensors')
    arguments = [str(tmp_path / name) for name in ('old.pth', 'kohya.safetensors')]
    assert main(['adapter', 'merge', *arguments, '-o', str(tmp_path / 'merged.pth')]) == 0
    merged = torch.load(tmp_path / 'merged.pth')['params']
    update = torch.einsum('or,rihw->oihw', up[..., 0, 0].double(), down.double()) / 2
    expected = {**file, 'model.0.weight': (file['model.0.weight'].double() + update).float()}
    assert merged.keys() == file.keys()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in expected.items())
    source = NetworkSource(arguments[0], adapters=[(arguments[1], 1.0)])
    image = torch.rand(1, 3, 12, 16)
    with torch.no_grad():
        assert torch.allclose(load_network(source)(image), load_network(tmp_path / 'merged.pth')(image), atol=1e-5)
