"""The test of learning rates: what it compares is comparable, and the best one counts."""

import math
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_sr.adapt import rates
from lora_sr.adapt.held import Measured
from lora_sr.adapt.rates import RateTest, find_rate, rate_for
from lora_sr.errors import InputError


class Model:
    """As one of BasicSR's: it writes down what it is given."""

    def __init__(self):
        torch.manual_seed(0)
        self.net_g = nn.Linear(2, 1)
        self.optimizers = [torch.optim.Adam(self.net_g.parameters(), lr=1.0)]
        self.steps = []

    def get_bare_model(self, network):
        return network

    def feed_data(self, batch):
        self.batch = batch

    def optimize_parameters(self, number):
        optimizer = self.optimizers[0]
        start = self.net_g.weight.detach().clone()
        moments = len(optimizer.state)
        optimizer.zero_grad()
        self.net_g(self.batch['lq']).square().sum().backward()
        optimizer.step()
        self.steps.append((number, optimizer.param_groups[0]['lr'], self.batch['number'], start, moments))


@pytest.fixture
def model(monkeypatch, tmp_path):
    found = Model()
    batches = ({'lq': torch.ones(1, 2), 'number': number} for number, _ in enumerate(repeat(None)))
    monkeypatch.setattr('lora_sr.basicsr.built.build_of_options', lambda file, change: (found, batches))
    return found


def find(monkeypatch, psnr, steps=20):
    given = iter(psnr)
    monkeypatch.setattr(rates, 'measure', lambda *arguments, **options: Measured(next(given)(), math.nan))
    monkeypatch.setattr(rates, 'FEWEST_STEPS', steps)
    found = find_rate(SimpleNamespace(parent='.'), (1e-3, 1e-2, 1e-1), 0, [], 2)
    return found


def refuses():
    raise InputError('not finite')


def test_each_rate_has_the_same_start_and_the_same_patches(model, monkeypatch):
    found = find(monkeypatch, [lambda: 30.0, lambda: 31.0, lambda: 30.5])
    assert found.psnr == {1e-3: 30, 1e-2: 31, 1e-1: 30.5} and found.best == 1e-2 and found.steps == 20
    trials = [model.steps[4 + 20 * number : 24 + 20 * number] for number in range(3)]  # behind those that were timed
    for rate, trial in zip(found.psnr, trials):
        assert [step[2] for step in trial] == [step[2] for step in trials[0]]
        assert torch.equal(trial[0][3], trials[0][0][3]) and trial[0][4] == 0  # nor does the optimizer remember
        expected = [rate * (1 + math.cos(math.pi * number / 20)) / 2 for number in range(20)]
        assert [step[1] for step in trial] == pytest.approx(expected)


@pytest.mark.parametrize('diverged', [refuses, lambda: math.nan, lambda: -math.inf])
def test_rates_that_diverge_do_not_count(model, monkeypatch, diverged):
    assert find(monkeypatch, [lambda: 30.0, lambda: 29.0, diverged]).best == 1e-3
    with pytest.raises(InputError, match='it diverges at each of the rates 0.001, 0.01, 0.1'):
        find(monkeypatch, [diverged] * 3)


def test_other_errors_are_not_taken_for_a_divergence(model, monkeypatch):
    def fails():
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError):
        find(monkeypatch, [fails])


@pytest.mark.parametrize('top', [1.2e-3, 3e-3, 1e-2, 3.5e-2])
def test_the_top_is_that_of_a_parabola(top):
    found = RateTest({rate: 30 - 2 * math.log(rate / top) ** 2 for rate in (1e-3, 2.5e-3, 6e-3, 1.5e-2, 4e-2)}, 20, 0.1)
    assert found.top == pytest.approx(top)


@pytest.mark.parametrize(
    ('psnr', 'rate'),
    [
        ({1e-3: 31.0, 1e-2: 30.0, 1e-1: 29.0}, 1e-3),
        ({1e-3: 29.0, 1e-2: 30.0, 1e-1: 31.0}, 1e-1),
        ({1e-3: 29.0, 1e-2: 30.0, 1e-1: -math.inf}, 1e-2),
        ({1e-3: 30.0, 1e-2: 30.0, 1e-1: 30.0}, 1e-3),
        ({1e-3: 30.0, 1e-2: 29.0, 1e-1: 30.5}, 1e-1),
        ({1e-2: 30.0}, 1e-2),
    ],
)
def test_where_the_parabola_has_no_top_between_them_the_best_counts(psnr, rate):
    assert RateTest(psnr, 20, 0.1).top == pytest.approx(rate)


def test_a_long_training_has_a_lower_rate():
    assert rate_for(0.01, 200, 200) == rate_for(0.01, 200, 50) == 0.01
    assert rate_for(0.01, 200, 3200) == pytest.approx(0.005)
