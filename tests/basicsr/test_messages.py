"""What a run logs, where, and under which id at wandb."""

import json
import sys
from types import SimpleNamespace

import pytest
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.utils import logger as basicsr_logger

from lora_sr.basicsr import records
from lora_sr.basicsr.samples import SampleStream


@pytest.fixture
def opt(tmp_path):
    return {
        'name': 'a_long_name', 'num_gpu': 0, 'rank': 0, 'dist': False,
        'path': {'training_states': str(tmp_path / 'training_states'), 'experiments_root': str(tmp_path)},
        'train': {'total_iter': 1200}, 'logger': {
            'print_freq': 100, 'use_tb_logger': True, 'save_checkpoint_freq': 1000, 'wandb': {'project': 'sr'},
        },
    }  # fmt: skip


class Writer(list):
    def add_scalar(self, *values):
        self.append(values)


def test_a_line(opt, tmp_path, monkeypatch, basicsr_log):
    stream = SampleStream(EnlargedSampler([0] * 4000, 2, 0), 0)  # one of two processes
    stream.begin(opt, 8, {'iter': 1000, 'epoch': 0, 'optimizers': [], 'schedulers': []}, None)
    records.begin(opt)
    now = [0.0]
    monkeypatch.setattr(stream.pace, 'clock', lambda: now[0])
    writer = Writer()
    basicsr_log.set_level('INFO', 'basicsr')
    told = basicsr_logger.MessageLogger(opt, 1000, writer)
    stream.pace.begin(1001)
    now[0] = 10.0
    told({'epoch': 0, 'iter': 1101, 'lrs': [1e-3, 5e-4], 'time': 0.2, 'data_time': 0.01, 'l_pix': 0.5, 'other': 2})
    (line,) = [record.getMessage() for record in basicsr_log.records if 'a_lon' in record.getMessage()]
    head, _, rest = line.partition(', samples/s: ')
    # As BasicSR writes it; of 99 iterations at 0.1 s each, since the first one does not count.
    assert head == (
        '[a_lon..][epoch:  0, iter:   1,101, lr:(1.000e-03,5.000e-04,)] [eta: 0:00:09, time (data): 0.200 (0.010)'
    )
    speed, _, rest = rest.partition(', memory: ')
    assert float(speed) == 2 * 8 / 0.1 and rest.endswith(' MiB] l_pix: 5.0000e-01 other: 2.0000e+00 ')
    assert writer == [('losses/l_pix', 0.5, 1101), ('other', 2.0, 1101), ('samples_per_second', 160.0, 1101)]
    (saved,) = map(json.loads, (tmp_path / 'metrics.jsonl').read_text().splitlines())
    assert saved.pop('memory') > 1 << 20
    assert saved == {
        'iter': 1101, 'epoch': 0, 'lr': [1e-3, 5e-4], 'losses': {'l_pix': 0.5, 'other': 2.0},
        'seconds': 0.1, 'data_seconds': 0.01, 'samples_per_second': 160.0,
    }  # fmt: skip


@pytest.fixture
def begun(monkeypatch):
    """What wandb was told of each run that began."""
    runs = []

    def init(**values):
        runs.append(values)
        return SimpleNamespace(id=values['id'] or f'made{len(runs)}')

    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init))
    return lambda: [(run['id'], run['resume'], run['project'], run['sync_tensorboard']) for run in runs]


def test_a_run_that_goes_on_keeps_its_id_at_wandb(opt, begun):
    basicsr_logger.init_wandb_logger(opt)
    opt['path']['resume_state'] = '100.state'
    basicsr_logger.init_wandb_logger(opt)
    opt['logger']['wandb']['resume_id'] = 'given'
    basicsr_logger.init_wandb_logger(opt)
    del opt['logger']['wandb']['resume_id']
    basicsr_logger.init_wandb_logger(opt)
    assert begun() == [
        (None, None, 'sr', True),
        ('made1', 'allow', 'sr', True),
        *[('given', 'allow', 'sr', True)] * 2,
    ]


def test_a_run_that_begins_anew_has_another_id(opt, begun):
    for _ in range(2):
        basicsr_logger.init_wandb_logger(opt)
    assert [known for known, *_ in begun()] == [None, None]
