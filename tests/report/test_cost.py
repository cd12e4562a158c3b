"""Runtime, peak memory and the challenge's score: how they are measured, not how long things take."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_sr.errors import InputError
from lora_sr.report import cost
from lora_sr.report.cost import measure_peak_memory, measure_runtimes, ntire_score

CPU = torch.device('cpu')


def test_the_baseline_has_the_score_that_the_organizers_give_as_an_example():
    efdn = (16.69, 16.70, 0.276)  # ms, G, M: the example of the challenge of 2025
    assert round(ntire_score(efdn, efdn), 4) == 7.3891


def test_score_by_hand(shared):
    challenge = json.loads((shared / 'reference.json').read_text())['published']['NTIRE efficient SR']
    entries = challenge['2026 (RTX A6000, mean ms of valid and test)']
    keys = ('ms', 'flops_g', 'params_m')
    dscf, span = ([entries[name][key] for key in keys] for name in ('15_DSCF_Fused', '00_SPAN baseline'))
    # exp(2 * 7.88 / 7.74), exp(2 * 8.22 / 9.83) and exp(2 * 0.126 / 0.151)
    expected = 0.7 * 7.66128 + 0.15 * 5.32521 + 0.15 * 5.30596
    assert ntire_score(dscf, span) == pytest.approx(expected, abs=2e-4)
    assert '0.7*runtime + 0.15*FLOPs + 0.15*params' in challenge['rule']


def test_a_score_beyond_all_numbers_is_infinite():
    assert ntire_score((1e4, 1, 1), (1, 1, 1)) == math.inf


class Noting(nn.Module):
    def __init__(self, name, notes):
        super().__init__()
        self.name, self.notes = name, notes

    def forward(self, x):
        self.notes.append((self.name, tuple(x.shape), torch.is_grad_enabled()))
        return x


def test_networks_take_turns_after_warming_up(monkeypatch):
    monkeypatch.setattr(cost, 'SECONDS', 0.0)  # only the least number of rounds
    notes = []
    found = measure_runtimes({name: Noting(name, notes) for name in 'ab'}, 5, 7, CPU)
    assert list(found) == ['a', 'b'] and all(seconds > 0 for seconds in found.values())
    order = [name for name, *_ in notes]
    assert order == ['a'] * cost.WARM_UP + ['b'] * cost.WARM_UP + ['a', 'b'] * cost.MIN_ROUNDS
    assert {tuple(rest) for _, *rest in notes} == {((1, 3, 5, 7), False)}


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux tells the memory of a process')
def test_peak_memory_is_what_the_pass_needs():
    output = 3 * 128**2 * 16**2 * 4  # bytes; the input has 0.2 MB
    found = measure_peak_memory(nn.Upsample(scale_factor=16), 128, 128, CPU)
    assert found == pytest.approx(output, abs=2e6)


def test_the_current_folder_is_not_run(tmp_path, monkeypatch):
    (tmp_path / 'torch.py').write_text('raise SystemExit(7)')
    monkeypatch.chdir(tmp_path)
    assert measure_peak_memory(nn.Upsample(scale_factor=2), 8, 8, CPU) >= 0


def test_a_process_that_does_not_get_through_is_told(monkeypatch):
    if not sys.platform.startswith('linux'):
        pytest.skip('only Linux tells the memory of a process')
    monkeypatch.setattr(subprocess, 'run', lambda *_, **__: subprocess.CompletedProcess([], -9, b'', b''))
    with pytest.raises(InputError, match=r'of Upsample cannot be measured .* 9x8 pixels \(status -9: it was ended\)'):
        measure_peak_memory(nn.Upsample(), 8, 9, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_on_a_gpu():
    network, device = nn.Upsample(scale_factor=16), torch.device('cuda')
    output = 3 * 128**2 * 16**2 * 4
    assert measure_peak_memory(network, 128, 128, device) == pytest.approx(output, abs=2e6)
    assert measure_runtimes({'up': network}, 128, 128, device)['up'] > 0
