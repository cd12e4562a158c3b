"""The benchmark of Adan: that the two sides do the same work, and what it prints."""

import re

import pytest
import torch

from lora_sr.benchmarks import adan as adan_benchmark
from lora_sr.cli.main import main


def test_both_optimizers_do_the_same_work():
    optimizers = adan_benchmark.make_optimizers(torch.float64)
    start = [param.clone() for param in optimizers['ours'].param_groups[0]['params']]
    assert adan_benchmark.measure_difference(optimizers) < 1e-12
    for optimizer in optimizers.values():
        params = optimizer.param_groups[0]['params']
        assert all((param != before).all() for param, before in zip(params, start))


def test_prints_times_and_their_ratio(monkeypatch, capsys):
    measure_times = adan_benchmark.measure_times
    monkeypatch.setattr(adan_benchmark, 'measure_times', lambda optimizers, _: measure_times(optimizers, repeats=2))
    assert main(['bench', 'adan']) == 0
    out = capsys.readouterr().out
    assert re.search(r'^Adan, a step on the \d+ tensors of LKDN x4', out)
    ours, theirs = (float(re.search(rf'^{name} +(\S+) ms$', out, re.M)[1]) for name in ('ours', 'adan_pytorch'))
    ratio = float(re.search(r'^adan_pytorch / ours +(\S+)$', out, re.M)[1])
    assert ratio == pytest.approx(theirs / ours, rel=0.05)


def test_different_parameters_are_told(monkeypatch):
    monkeypatch.setattr(adan_benchmark, 'measure_difference', lambda optimizers: float('nan'))
    with pytest.raises(RuntimeError, match='the parameters of the two differ by nan of the largest'):
        adan_benchmark.run()
