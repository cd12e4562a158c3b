"""The option files of LKDN, each trained for 20 iterations: as teacher, as student, as the base of LoRA."""

import re
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY, run_python, write_pairs

from lora_sr import load_network
from lora_sr.adapters import is_lora_key
from lora_sr.archs import is_training_form
from lora_sr.archs.lkdn import LKDN, LKDN_S
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import Checkpoint
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.deploy.merge import merge_checkpoint
from lora_sr.option_file import load_options

pytestmark = pytest.mark.slow

OPTIONS = REPOSITORY / 'options' / 'train'


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """A folder with `x2` and `x4`, each eight pairs as folders and as databases, GT of 32x32 pixels."""
    root = tmp_path_factory.mktemp('data')
    for scale in (2, 4):
        write_pairs(root / f'x{scale}', scale=scale)
    return root


@pytest.fixture
def train(data, tmp_path):
    """Train a shipped option file for 20 iterations on small data, with changes as for `--force_yml`.

    Gives back the log, and the checkpoint.
    """
    torch.manual_seed(0)  # for the teachers and the networks at the start, which a test makes

    def train(file, *changes, scale=4, iterations=20):
        overrides = ['num_gpu=0', 'val=~', f'train:total_iter={iterations}', 'logger:print_freq=1']
        overrides += ['logger:use_tb_logger=false', 'datasets:train:batch_size_per_gpu=2']
        overrides += ['datasets:train:num_worker_per_gpu=0']
        file = OPTIONS / file
        options = load_options(file)
        for key, dataset in options['datasets'].items():
            sizes = {'gt_size': 32, 'lq_size': 32 // scale}
            roots = {f'dataroot_{kind}': f'{data}/x{scale}/{kind}' for kind in ('gt', 'lq')}
            if dataset['io_backend']['type'] == 'lmdb':
                roots = {name: f'{root}.lmdb' for name, root in roots.items()}
            for name, value in {**sizes, **roots}.items():
                if name in dataset:
                    overrides.append(f'datasets:{key}:{name}={value}')
        command = ['-m', 'lora_sr.train', '-opt', file, '--force_yml', *overrides, *changes]
        done = run_python(*command, cwd=tmp_path)
        return done.stderr, tmp_path / 'experiments' / options['name'] / 'models' / 'net_g_latest.pth'

    return train


def save(network, path) -> str:
    torch.save({'params_ema': network.state_dict()}, path)
    return str(path)


def losses(log: str, name: str = 'l_pix') -> list:
    found = [float(value) for value in re.findall(rf'{name}: (\S+)', log)]
    assert len(found) == 20
    return found


def assert_falls(values: list) -> None:
    assert sum(values[-5:]) < 0.9 * sum(values[:5]), values


def lora_and_rest(checkpoint, start) -> tuple:
    """How many `lora_B` of a checkpoint have left zero, and whether all but LoRA is as in the file at the start."""
    before, after = Checkpoint.read(start).state, read_checkpoint(checkpoint)['params']
    moved = sum(bool(value.any()) for key, value in after.items() if key.endswith('lora_B'))
    return moved, all(torch.equal(after[key], before[key]) for key in after if not is_lora_key(key))


def test_lkdn_with_adan(train):
    log, checkpoint = train('LKDN/train_LKDN_x4.yml')
    assert_falls(losses(log))
    network = load_network(checkpoint)
    assert isinstance(network, LKDN) and (network.num_block, network.upscale) == (8, 4)


def test_lkdn_s_on_photographs(train):
    log, checkpoint = train('LKDN/train_LKDN-S_x4_photos.yml')
    assert_falls(losses(log))
    network = load_network(checkpoint)
    assert (network.num_block, network.upscale) == (5, 4) and is_training_form(network)


def test_lkdn_s_in_two_stages_and_folded(train, tmp_path):
    log, first = train('LKDN/train_LKDN-S_x4_stage1.yml')
    assert_falls(losses(log))

    _, second = train('LKDN/train_LKDN-S_x4_stage2.yml')
    # It begins with the average of stage 1 and goes slowly: at 2e-5 nothing is far from it after 20 iterations.
    weights = Checkpoint.read(second, 'params').state

    def distance_from(key):
        start = Checkpoint.read(first, key).state
        return max((weights[name] - start[name]).abs().max() for name in weights)

    assert 0 < distance_from('params_ema') < 20 * 2e-4
    assert distance_from('params') > 10 * distance_from('params_ema')
    assert is_training_form(load_network(second))

    merge_checkpoint(second, tmp_path / 'LKDN-S_x4.pth')
    folded = load_network(tmp_path / 'LKDN-S_x4.pth')
    assert not is_training_form(folded)
    assert {key: value.shape for key, value in folded.state_dict().items()} == {
        key: value.shape for key, value in LKDN_S().state_dict().items()
    }


def test_lkdn_teaches_lkdn_s(train, tmp_path):
    teacher = save(LKDN(), tmp_path / 'teacher.pth')
    log, checkpoint = train('LKDN/train_LKDN-S_x4_distill.yml', f'path:pretrain_network_t={teacher}')
    assert_falls([sum(pair) for pair in zip(losses(log), losses(log, 'l_distill'))])
    network = load_network(checkpoint)
    assert network.num_block == 5 and is_training_form(network)


@pytest.mark.parametrize('file', ['train_DSCLoRA_ch26_x4_LKDN', 'train_DSCLoRA_ch26_x4_LKDN_photos'])
def test_lkdn_teaches_dsclora(train, tmp_path, file):
    teacher = save(LKDN(), tmp_path / 'teacher.pth')
    start = tmp_path / 'start.pth'
    weights = SPAN(feature_channels=26, deploy=True).state_dict()
    # On photographs it starts from the official file, which is a plain state dict.
    torch.save(weights if file.endswith('photos') else {'params_ema': weights}, start)
    log, checkpoint = train(
        f'DSCLoRA/{file}.yml',
        f'path:pretrain_network_t={teacher}',
        f'path:pretrain_network_g={start}',
        'train:optim_g:lr=1e-2',
    )
    assert not re.search(r'l_pix: \d', log)
    distances = losses(log, 'l_distill')  # minus the PSNR to the teacher, in dB
    assert sum(distances[-5:]) < sum(distances[:5]) - 5 * 0.5, distances
    assert lora_and_rest(checkpoint, start) == (20, True)
    assert merge_checkpoint(checkpoint, tmp_path / 'merged.pth').network == 'SPAN'


def test_lkdn_with_lora(train, tmp_path):
    start = save(LKDN(), tmp_path / 'start.pth')
    log, checkpoint = train('LKDN/train_LKDN_x4_lora.yml', f'path:pretrain_network_g={start}', 'train:optim_g:lr=1e-2')
    assert_falls(losses(log))
    # All convolutions but the two of fea_conv, depth-wise and dilated ones as well.
    convolutions = [name for name, module in LKDN().named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert lora_and_rest(checkpoint, start) == (len(convolutions) - 2, True)
    assert merge_checkpoint(checkpoint, tmp_path / 'merged.pth').network == 'LKDN'
    assert load_network(tmp_path / 'merged.pth').state_dict().keys() == LKDN().state_dict().keys()


def test_start_from_another_scale(train, tmp_path):
    """As the comment in the option files of x2 and x3 says: all is loaded but the upsampler's convolution."""
    start = save(LKDN(), tmp_path / 'x4.pth')
    changes = [f'path:pretrain_network_g={start}', 'path:strict_load_g=false', 'train:optim_g:lr=0']
    log, checkpoint = train('LKDN/train_LKDN_x2.yml', *changes, scale=2, iterations=1)
    assert set(re.findall(r'Size different, ignore \[(\S+)\]', log)) == {'upsampler.0.weight', 'upsampler.0.bias'}
    before, after = Checkpoint.read(start).state, read_checkpoint(checkpoint)
    for key, value in after['params'].items():  # the upsampler too: the average starts as a copy of what is random
        torch.testing.assert_close(after['params_ema'][key], value)
    for weights in (after['params'], after['params_ema']):
        others = {key for key, value in weights.items() if value.shape != before[key].shape}
        assert others == {'upsampler.0.weight', 'upsampler.0.bias'}
        for key in weights.keys() - others:  # the average is computed anew, so it is rounded
            torch.testing.assert_close(weights[key], before[key])
