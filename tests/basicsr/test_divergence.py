"""A training whose losses or weights are no longer finite ends, and overwrites nothing."""

import copy
import os

import pytest
import torch
from basicsr.models import build_model
from tiny_run import logged, model_options, run_python

from lora_sr.basicsr.patches.divergence import check_weights
from lora_sr.checkpoints import load_network
from lora_sr.checkpoints.content import load_weights, read_checkpoint
from lora_sr.errors import DivergenceError, InputError

BAD = [float('nan'), float('inf'), -float('inf')]


@pytest.fixture
def model(tmp_path):
    return build_model(model_options(tmp_path))


def step(model, iteration, lq=0.5):
    model.update_learning_rate(iteration, -1)
    model.feed_data({'lq': torch.full((1, 3, 6, 6), lq), 'gt': torch.rand(1, 3, 12, 12)})
    model.optimize_parameters(iteration)


@pytest.mark.parametrize('bad', BAD)
def test_one_bad_batch_ends_the_training(model, bad):
    step(model, 1)
    with pytest.raises(
        DivergenceError, match=r'stopped at iteration 2: the loss l_pix is (nan|inf)\. No checkpoint had'
    ):
        step(model, 2, lq=bad)
    with pytest.raises(DivergenceError, match=r'of net_g is no longer finite'):
        model.save(0, -1)
    assert os.listdir(model.opt['path']['models']) == []


@pytest.mark.parametrize('bad', BAD)
def test_weights_that_a_last_step_breaks_are_not_saved(model, bad):
    step(model, 1)
    model.save(0, 9)
    model.save(0, 10)
    step(model, 2)
    model.net_g.conv_last.weight.data[0, 0, 0, 0] = bad
    sentence = (
        r'the training was stopped at iteration 2: conv_last.weight of net_g is no longer finite. The last checkpoint '
        'is of iteration 10: lower the learning rate, and go on with --auto_resume.'
    )
    with pytest.raises(DivergenceError, match=sentence):
        model.save(0, 2)
    assert sorted(os.listdir(model.opt['path']['training_states'])) == ['10.state', '9.state']


def test_an_average_that_is_not_finite_is_not_saved(tmp_path):
    opt = model_options(tmp_path)
    opt['train']['ema_decay'] = 0.9
    model = build_model(copy.deepcopy(opt))
    step(model, 1)
    model.net_g_ema.conv_first.bias.data[0] = float('nan')
    with pytest.raises(DivergenceError, match='conv_first.bias of net_g is no longer finite'):
        model.save(0, -1)


def test_buffers_may_be_infinite(model):
    """Masks are; statistics that are NaN are not."""
    network = torch.nn.Linear(2, 2)
    network.register_buffer('mask', torch.tensor([0.0, -float('inf')]))
    load_weights(network, network.state_dict(), 'a.pth')
    check_weights(model, 'net_g', [network])
    with pytest.raises(InputError, match='not finite: mask'):
        load_weights(network, {**network.state_dict(), 'mask': torch.tensor([0.0, float('nan')])}, 'a.pth')


@pytest.mark.parametrize('bad', BAD)
def test_a_checkpoint_that_is_not_finite_is_refused(model, tmp_path, bad):
    model.save(0, 4)
    file = f'{model.opt["path"]["models"]}/net_g_4.pth'
    content = dict(read_checkpoint(file))
    content['params']['conv_hr.weight'][0, 0] = bad
    torch.save(content, tmp_path / 'bad.pth')
    with pytest.raises(InputError, match=r'bad.pth holds values that are not finite: conv_hr.weight.'):
        load_network(tmp_path / 'bad.pth')
    opt = model_options(tmp_path / 'other')
    opt['path']['pretrain_network_g'] = str(tmp_path / 'bad.pth')
    with pytest.raises(InputError, match=r'bad.pth holds values that are not finite: conv_hr.weight.'):
        build_model(opt)


@pytest.mark.slow
def test_a_run_that_diverges(tiny_options, tmp_path):
    command = ['-m', 'lora_sr.train', '-opt', tiny_options]
    run_python(*command, cwd=tmp_path)
    models = tmp_path / 'experiments/tiny/models'
    before = {file.name: file.read_bytes() for file in models.iterdir()}
    changes = ['train:total_iter=30', 'train:optim_g:lr=1e30']
    done = run_python(*command, '--auto_resume', '--force_yml', *changes, cwd=tmp_path, status=1)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith('error: '))
    assert 'the training was stopped at iteration ' in line and 'go on with --auto_resume' in line
    assert 'Traceback' not in done.stderr and max(logged(done)) < 30
    assert {name: (models / name).read_bytes() for name in before} == before
    for file in models.iterdir():
        assert all(torch.isfinite(value).all() for value in read_checkpoint(file)['params'].values())
