"""Weights in wrapped files, as other trainers write them, are found by one rule, and are the very same weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from wrapped import assert_equal, before, other, plain

from lora_sr.archs import SPAN
from lora_sr.checkpoints import Checkpoint, load_network
from lora_sr.checkpoints.content import load_weights, read_checkpoint
from lora_sr.checkpoints.unwrapping import WRAPPERS, bare_weights, find_weights
from lora_sr.cli.main import main
from lora_sr.errors import InputError

KEY = 'block_3.c1_r.eval_conv.weight'


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


def test_an_option_file_finds_what_a_run_finds(tmp_path):
    """Also under keys within sections, and whatever the names of its network."""
    torch.save({'params': other(), 'model': {'net_g': before('module.', plain())}}, tmp_path / 'net.pth')
    section = 'network_g: {type: SPAN, feature_channels: 4, upscale: 2, deploy: true}\n'
    path = f'path: {{pretrain_network_g: {tmp_path / "net.pth"}, param_key_g: model.net_g}}\n'
    (tmp_path / 'net.yml').write_text(section + path)
    assert_equal(load_network(tmp_path / 'net.yml').state_dict())
