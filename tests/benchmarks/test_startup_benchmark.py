"""`lora-sr bench startup`: CPU time rather than waiting, budgets from the same run, and what fails is named."""

import pytest
import torch

from lora_sr.benchmarks import startup
from lora_sr.benchmarks.startup import Subject, cpu_seconds, measure
from lora_sr.errors import InputError

BUSY = 'import time\nwhile time.process_time() < 0.4: pass'


def test_cpu_time_counts_and_waiting_does_not():
    bare = cpu_seconds(Subject('python', ('-c', 'pass')))
    assert cpu_seconds(Subject('waits', ('-c', 'import time; time.sleep(0.5)'))) < bare + 0.3
    assert 0.35 < cpu_seconds(Subject('works', ('-c', BUSY))) < 1


def test_the_first_process_is_not_counted(monkeypatch):
    seconds = iter(range(1, 7))
    monkeypatch.setattr(startup, 'cpu_seconds', lambda subject: next(seconds))
    assert measure([Subject('a', ()), Subject('b', ())], 2) == {'a': [3, 5], 'b': [4, 6]}


def test_budgets_follow_the_machine_and_what_is_over_is_named(monkeypatch, capsys, tmp_path):
    seconds = {'python': 0.02, 'import lora_sr': 0.06, 'lora-sr --help': 0.31, 'import torch': 2.0}
    seconds.update({'import lora_sr.adapters': 2.21, 'lora-sr inspect a.pth': 2.69})
    monkeypatch.setattr(startup, 'cpu_seconds', lambda subject: seconds[subject.name])
    with pytest.raises(InputError, match='a.pth cannot be read'):  # before anything is measured
        startup.run(tmp_path / 'a.pth', repeats=1)
    assert capsys.readouterr().out == ''
    torch.save({'a': torch.zeros(1)}, tmp_path / 'a.pth')
    startup.run(tmp_path / 'a.pth', repeats=1)
    *rows, last = capsys.readouterr().out.splitlines()
    assert last == 'over budget: lora-sr --help, import lora_sr.adapters'
    budgets = {row.split('  ')[0]: row.split()[-3:] for row in rows[2:]}
    assert budgets['import lora_sr'] == ['python', '+', '0.05'] and '0.070' in rows[3]
    assert budgets['lora-sr inspect a.pth'] == ['torch', '+', '0.7'] and '2.700' in rows[-1]


def test_what_fails_is_named():
    with pytest.raises(InputError, match='"broken" cannot be measured: RuntimeError: no such luck'):
        cpu_seconds(Subject('broken', ('-c', 'raise RuntimeError("no such luck")')))
