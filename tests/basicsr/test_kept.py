"""Which checkpoints stay, whatever kills the run while it removes others."""

import copy
import os
from pathlib import Path

import pytest
import torch
from basicsr.models import build_model
from tiny_run import model_options

from lora_sr.basicsr.kept import keep_best
from lora_sr.checkpoints.content import read_checkpoint


@pytest.fixture
def options(tmp_path):
    return {**model_options(tmp_path), 'logger': {'keep_last': 2}}


def saved(options):
    models, states = (sorted(os.listdir(options['path'][key])) for key in ('models', 'training_states'))
    return models, states


def names(*iterations, others=()):
    networks, states = [f'net_g_{one}.pth' for one in iterations], [f'{one}.state' for one in iterations]
    return sorted([*networks, *others]), sorted(states)


def test_the_last_ones_stay(options):
    model = build_model(options)
    for count, iteration in enumerate((2, 4, 10, 100), 1):
        model.save(0, iteration)
        assert saved(options) == names(*(2, 4, 10, 100)[max(0, count - 2) : count])


def test_all_stay_by_default(options):
    options['logger'] = {}
    model = build_model(options)
    for iteration in (2, 4, 6, 8):
        model.save(0, iteration)
    assert saved(options) == names(2, 4, 6, 8)


@pytest.mark.parametrize('attribute', ['best_metric_results', 'resumed_best'])
def test_the_best_stays(options, attribute):
    model = build_model(options)
    model.save(0, 2)
    never, best = ({'better': 'higher', 'val': 1.0, 'iter': iteration} for iteration in (-1, 2))
    setattr(model, attribute, {'a': {'psnr': best}, 'b': {'psnr': never, 'ssim': {**best, 'iter': 4}}})
    for iteration in (4, 6, 8, 10):
        model.save(0, iteration)
    assert saved(options) == names(2, 4, 8, 10)
    best['iter'] = 10
    model.save(0, 12)
    assert saved(options) == names(4, 10, 12)


def test_what_is_not_of_the_run_stays(options):
    others = ['net_g_1.pth', 'net_g_best_set_2.pth', 'net_g_latest.pth', 'net_other_2.pth', 'net_g_2.pth.txt']
    for name in others:
        Path(options['path']['models'], name).write_bytes(b'')
    model = build_model(options)
    for iteration in (2, 4, 6):
        model.save(0, iteration)
    assert saved(options) == names(4, 6, others=others)


def test_a_run_that_went_on_from_an_earlier_state(options):
    """What came after that is of the same run, and later."""
    model = build_model({**options, 'logger': {}})
    for iteration in (2, 4, 6, 8, 10):
        model.save(0, iteration)
    other = build_model(copy.deepcopy(options))
    other.save(0, 6)
    assert saved(options) == names(4, 6, 8, 10)


def test_a_kill_at_any_time(options, monkeypatch):
    """After each number of removals: the last checkpoints are whole, and the next call removes what is left."""
    unlink, left = Path.unlink, [0]

    class Killed(BaseException):
        pass

    def counted(path, **arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        unlink(path, **arguments)

    for number in range(6):
        model = build_model({**copy.deepcopy(options), 'logger': {}})
        for iteration in (2, 4, 6, 8):
            model.save(0, iteration)
        model.opt['logger']['keep_last'] = 1
        monkeypatch.setattr(Path, 'unlink', counted)
        left[0] = number
        with pytest.raises(Killed):
            model.save(0, 8)
        models, states = saved(options)
        assert 'net_g_8.pth' in models and '8.state' in states
        assert {name[6:-4] for name in models} <= {name[:-6] for name in states}  # none that nobody knows of
        monkeypatch.undo()
        model.save(0, 10)
        assert saved(options) == names(10)


def test_nothing_is_removed_before_the_new_one_is_there(options, monkeypatch):
    model = build_model(options)
    for iteration in (2, 4):
        model.save(0, iteration)

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('lora_sr.basicsr.patches.checkpoints.save_atomically', fail)
    with pytest.raises(OSError):
        model.save(0, 6)
    assert saved(options) == names(2, 4)


@pytest.mark.parametrize('ema_decay', [0, 0.5])
def test_the_best_network_of_each_set(options, ema_decay):
    options['logger'] = {'keep_best': 'psnr'}
    options['train']['ema_decay'] = ema_decay
    model = build_model(options)
    values = {'a/b': [3.0, 2.0, 4.0, 4.0], 'c': [3.0, 1.0, 2.0, float('nan')]}
    written = {}
    for index in range(4):
        with torch.no_grad():
            for value in model.net_g.parameters():
                value.add_(1)
        for dataset in values:
            model._initialize_best_metric_results(dataset)
            model._update_best_metric_result(dataset, 'psnr', values[dataset][index], index)
            keep_best(model, dataset, index)
        written[index] = copy.deepcopy(model.net_g.state_dict())
    assert saved(options) == (['net_g_best_a_b.pth', 'net_g_best_c.pth'], [])
    for name, index in (('a_b', 3), ('c', 0)):
        file = read_checkpoint(f'{options["path"]["models"]}/net_g_best_{name}.pth')
        assert file.origin.iteration == index and ('params_ema' in file) == bool(ema_decay)
        assert all(torch.equal(file['params'][key], value) for key, value in written[index].items())


def test_the_discriminator_is_not_kept_as_the_best(options):
    options['logger'] = {'keep_best': 'psnr'}
    model = build_model(options)
    model.net_d = torch.nn.Linear(1, 1)
    save = model.save

    def save_both(epoch, iteration):
        save(epoch, iteration)
        model.save_network(model.net_d, 'net_d', iteration)

    model.save = save_both
    model.best_metric_results = {'a': {'psnr': {'better': 'higher', 'val': 1.0, 'iter': 5}}}
    keep_best(model, 'a', 5)
    assert saved(options) == (['net_g_best_a.pth'], [])
    model.save(0, 6)
    assert saved(options)[0] == ['net_d_6.pth', 'net_g_6.pth', 'net_g_best_a.pth']
