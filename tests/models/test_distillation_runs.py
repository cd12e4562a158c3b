"""Whole runs of the distillation model: repeated, killed and resumed, in two processes."""

import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny_run import TINY_OPTIONS, logged, python_environment, run_python

from lora_sr.archs.span_arch import SPAN
from lora_sr.checkpoint_file import read_checkpoint


@pytest.fixture
def run_folder(pairs, tmp_path):
    """A folder with `run.yml`, 20 iterations of DSCLoRA under a teacher with all three losses, and its checkpoints."""
    torch.manual_seed(0)
    torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), tmp_path / 'student.pth')
    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    options = yaml.safe_load(TINY_OPTIONS.format(root=pairs, suffix='.lmdb', backend='lmdb').replace('1e-3', '0.001'))
    options.update(
        model_type='DistillationModel',
        network_g={'type': 'DSCLoRA', 'feature_channels': 6, 'upscale': 2, 'rank': 2},
        network_t={'type': 'SPAN', 'feature_channels': 8, 'upscale': 2},
        path={'pretrain_network_g': 'student.pth', 'param_key_g': None, 'pretrain_network_t': 'teacher.pth'},
    )
    options['datasets']['val_2'] = {**options['datasets'].pop('val'), 'name': 'second'}
    options['datasets']['val_1'] = {**options['datasets']['val_2'], 'name': 'first'}
    options['train'].update(
        total_iter=20,
        ema_decay=0.9,
        memory_format='channels_last',
        scheduler={'type': 'MultiStepLR', 'milestones': [8, 16], 'gamma': 0.5},
        distill_pixel_opt={'type': 'MSELoss', 'loss_weight': 1.0},
        affinity_opt={'type': 'SpatialAffinityLoss', 'loss_weight': 0.1, 'layers': ['block_1', 'block_6']},
    )
    options['val']['val_freq'] = 10
    (tmp_path / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    return tmp_path


def losses(done) -> list:
    return re.findall(r'l_pix: (\S+) l_distill: (\S+) l_affinity: (\S+)', done.stderr)


COMMAND = ['-m', 'lora_sr.train', '-opt', 'run.yml']


def test_same_seed_gives_the_same_losses_and_both_sets_are_validated(run_folder):
    first, second = (run_python(*COMMAND, '--force_yml', f'name={name}', cwd=run_folder) for name in 'ab')
    assert len(losses(first)) == 20 and losses(first) == losses(second)
    for name in ('first', 'second'):
        assert (
            len(re.findall(rf'Validation {name}\n\t # psnr: \d+\.\d+', first.stderr)) == 3
        )  # at 10, at 20, at the end


def test_killed_run_resumes_with_its_learning_rate_average_and_losses(run_folder):
    whole = run_python(*COMMAND, '--force_yml', 'name=whole', cwd=run_folder)

    state = run_folder / 'experiments' / 'tiny' / 'training_states' / '12.state'
    process = subprocess.Popen(
        [sys.executable, *COMMAND],
        cwd=run_folder,
        env=python_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(file.stem) for file in state.parent.glob('*.state'))

    rest = run_python(*COMMAND, '--auto_resume', cwd=run_folder)
    rates = {iteration: rate for iteration, rate in logged(whole).items() if iteration > reached}
    assert logged(rest) == rates and reached >= 12
    models = [run_folder / 'experiments' / name / 'models' for name in ('whole', 'tiny')]
    before, resumed = (read_checkpoint(folder / f'net_g_{reached}.pth') for folder in models)
    for key in ('params', 'params_ema'):
        assert all(torch.equal(value, resumed[key][name]) for name, value in before[key].items())
    # From there on the images come in another order: the losses are of the same level, not the same.
    for key, tolerance in ((0, 0.5), (1, 0.5), (2, 0.5)):
        levels = [
            torch.tensor([float(line[key]) for line in losses(run)[reached - 20 :]]).mean() for run in (whole, rest)
        ]
        assert levels[1].item() == pytest.approx(levels[0].item(), rel=tolerance)
    ends = [read_checkpoint(folder / 'net_g_latest.pth')['params_ema'] for folder in models]
    changed = [key for key in ends[0] if key.endswith('lora_B')]
    for key in changed:
        torch.testing.assert_close(ends[1][key], ends[0][key], rtol=0.5, atol=5e-3)


def test_two_processes_train_the_same_option_file(run_folder):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2]
    done = run_python(*launcher, *COMMAND, '--launcher', 'pytorch', cwd=run_folder)
    assert 'World size (gpu number): 2' in done.stderr and 'DistributedDataParallel - DSCLoRA' in done.stderr
    assert len(losses(done)) == 20
    saved = read_checkpoint(run_folder / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth')
    assert saved.keys() == {'params', 'params_ema'} and saved['params']['upsampler.0.lora_B'].any()
