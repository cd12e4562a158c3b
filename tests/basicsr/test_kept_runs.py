"""A run that is stopped and goes on, with all that makes it one to live with, beside one that was not."""

import json

import pytest
import torch
import yaml
from tiny_run import run_python

from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.metrics_file import read_metrics
from lora_sr.option_file import load_options
from lora_sr.report.curves import read_curves

pytestmark = pytest.mark.slow
CHANGES = {
    'logger': {'keep_last': 1, 'keep_best': 'psnr', 'use_tb_logger': True, 'save_images_to_tb': True},
    'val': {'tile': 8, 'val_freq': 2},
    'train': {'total_iter': 12},
}
# Asks to stop the run after its seventh iteration, as `kill` would.
STOPPING = """
import os, signal, sys
import lora_sr
from basicsr.models.sr_model import SRModel
step = SRModel.optimize_parameters
def optimize_parameters(self, iteration):
    step(self, iteration)
    if iteration == 7:
        os.kill(os.getpid(), signal.SIGUSR1)
SRModel.optimize_parameters = optimize_parameters
from lora_sr.cli.main import run_pipeline
sys.exit(run_pipeline(is_train=True))
"""


def lines(root):
    """What stands in the metrics, but for times and memory."""
    timed = ('seconds', 'data_seconds', 'samples_per_second', 'memory')
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_metrics(root / 'experiments/tiny/metrics.jsonl')
    ]


def test_a_run_that_is_stopped_and_goes_on(tiny_options, tmp_path):
    pytest.importorskip('tensorboard')
    options = load_options(tiny_options)
    for section, values in CHANGES.items():
        options[section].update(values)
    roots = [tmp_path / name for name in ('whole', 'stopped')]
    for root in roots:
        root.mkdir()
        (root / 'tiny.yml').write_text(yaml.safe_dump(json.loads(json.dumps(options))))
    run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', cwd=roots[0])
    first = run_python('-c', STOPPING, '-opt', 'tiny.yml', cwd=roots[1])
    assert 'stopped by SIGUSR1: iteration 7 is saved; --auto_resume goes on from it' in first.stderr
    assert lines(roots[1])[-1] == {'iter': 7, 'stopped': 'SIGUSR1'}
    run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', '--auto_resume', cwd=roots[1])

    told, other = map(lines, roots)
    assert told == other
    assert [line['iter'] for line in told if 'losses' in line] == list(range(1, 13))
    assert sum('finished' in line for line in told) == 1
    values = {line['iter']: line['metrics']['psnr'] for line in told if 'validation' in line}
    assert read_curves(roots[1] / 'experiments/tiny') == {'val': values} and sorted(values) == [2, 4, 6, 8, 10, 12]

    models = roots[1] / 'experiments/tiny/models'
    best = max(sorted(values, reverse=True), key=values.get)
    kept = {'net_g_12.pth', 'net_g_latest.pth', 'net_g_best_val.pth', f'net_g_{best}.pth'}
    assert kept - {file.name for file in models.iterdir()} == set()
    assert {file.name for file in models.iterdir()} == {
        file.name for file in (roots[0] / 'experiments/tiny/models').iterdir()
    }
    assert read_checkpoint(models / 'net_g_best_val.pth').origin.iteration == best
    for name in ('net_g_latest.pth', 'net_g_best_val.pth'):
        mine, theirs = (read_checkpoint(root / 'experiments/tiny/models' / name)['params'] for root in roots)
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(roots[0] / 'tb_logger/tiny')).Reload().Tags()
    assert 'val/003' in shown['images'] and 'losses/l_pix' in shown['scalars']
