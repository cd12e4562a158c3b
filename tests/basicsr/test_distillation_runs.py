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

from lora_sr.archs.span import SPAN
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.data.prepare import prepare_databases

pytestmark = pytest.mark.slow

COMMAND = ['-m', 'lora_sr.train', '-opt', 'run.yml']


@pytest.fixture
def run_folder(pairs, tmp_path):
    """A folder with `run.yml`, 20 iterations of DSCLoRA under a teacher with all three losses, and its checkpoints."""
    write_run(pairs, tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def whole(pairs, tmp_path_factory):
    """Such a folder after the run, which none may change, and what the run printed."""
    folder = tmp_path_factory.mktemp('whole')
    write_run(pairs, folder)
    return folder, run_python(*COMMAND, cwd=folder)


def write_run(pairs, tmp_path):
    torch.manual_seed(0)
    torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), tmp_path / 'student.pth')
    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    options = yaml.safe_load(TINY_OPTIONS.format(root=pairs, suffix='.lmdb', backend='lmdb').replace('1e-3', '0.001'))
    options.update(
        model_type='DistillationModel',
        network_g={'type': 'DSCLoRA', 'feature_channels': 6, 'upscale': 2, 'rank': 2},
        network_t={'type': 'SPAN', 'feature_channels': 8, 'upscale': 2, 'precompute': True, 'self_ensemble': True},
        path={'pretrain_network_g': 'student.pth', 'param_key_g': None, 'pretrain_network_t': 'teacher.pth'},
    )
    made = prepare_databases([pairs / 'gt'], tmp_path / 'raw', [2], [pairs / 'lq'], raw=True, progress=False).databases
    options['datasets']['train'].update(
        type='RawPairedImageDataset', dataroot_gt=str(made[1]), dataroot_lq=str(made[2])
    )
    options['datasets']['val_2'] = {**options['datasets'].pop('val'), 'name': 'second'}
    options['datasets']['val_1'] = {**options['datasets']['val_2'], 'name': 'first'}
    options['train'].update(
        total_iter=20,
        ema_decay=0.9,
        memory_format='channels_last',
        amp='bf16',
        accumulate_iter=2,
        clip_grad_norm=1.0,
        checkpointing=True,
        scheduler={'type': 'MultiStepLR', 'milestones': [8, 16], 'gamma': 0.5},
        distill_pixel_opt={'type': 'MSELoss', 'loss_weight': 1.0},
        affinity_opt={'type': 'SpatialAffinityLoss', 'loss_weight': 0.1, 'layers': ['block_1', 'block_6']},
    )
    options['val']['val_freq'] = 10
    options['logger']['save_checkpoint_freq'] = 1
    (tmp_path / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))


def losses(done) -> list:
    return re.findall(r'l_pix: (\S+) l_distill: (\S+) l_affinity: (\S+)', done.stderr)


def test_same_seed_gives_the_same_losses_and_both_sets_are_validated(whole, run_folder):
    first, second = whole[1], run_python(*COMMAND, '--force_yml', 'name=again', cwd=run_folder)
    assert len(losses(first)) == 20 and losses(first) == losses(second)
    for name in ('first', 'second'):
        # at 10 and at 20, which is the end
        assert len(re.findall(rf'Validation {name}\n\t # psnr: \d+\.\d+', first.stderr)) == 2


def test_killed_run_resumes_with_its_learning_rate_average_and_losses(whole, run_folder):
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
    rates = {iteration: rate for iteration, rate in logged(whole[1]).items() if iteration > reached}
    assert logged(rest) == rates and reached >= 12
    models = run_folder / 'experiments' / 'tiny' / 'models'
    seam, after = (read_checkpoint(models / f'net_g_{iteration}.pth') for iteration in (reached, reached + 1))
    for key, average in after['params_ema'].items():
        torch.testing.assert_close(average, 0.9 * seam['params_ema'][key] + 0.1 * after['params'][key])
    assert any((seam['params_ema'][key] - value).abs().max() > 1e-4 for key, value in seam['params'].items())
    assert losses(rest) == losses(whole[1])[reached:]


RANK_WEIGHTS = """
import sys, torch
import lora_sr
from lora_sr.cli.pipelines import main
from lora_sr.basicsr.models import DistillationModel
optimize = DistillationModel.optimize_parameters
def optimize_and_tell(self, current_iter):
    optimize(self, current_iter)
    total = sum(value.double().abs().sum() for value in self.net_g.state_dict().values())
    sys.stdout.write(f'rank {self.opt["rank"]} image {self.lq.sum():.6f} weights {total:.12f}\\n')
DistillationModel.optimize_parameters = optimize_and_tell
sys.exit(main(True))
"""


def test_two_processes_train_the_same_option_file(run_folder):
    (run_folder / 'ranks.py').write_text(RANK_WEIGHTS)
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, 'ranks.py', '-opt', 'run.yml']
    done = run_python(*launcher, '--launcher', 'pytorch', cwd=run_folder)
    assert 'World size (gpu number): 2' in done.stderr and 'DistributedDataParallel - DSCLoRA' in done.stderr
    assert len(losses(done)) == 20
    # The processes see different images, but their gradients are averaged: their weights never part.
    told = re.findall(r'rank (\d) image (\S+) weights (\S+)', done.stdout)
    images, weights = ([{line[i] for line in told if line[0] == rank} for rank in '01'] for i in (1, 2))
    assert len(images[0]) > 1 and images[0] != images[1]
    assert len(weights[0]) > 1 and weights[0] == weights[1]
    saved = read_checkpoint(run_folder / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth')
    assert saved.keys() == {'params', 'params_ema', 'lora_sr'}


def test_merged_network_has_the_adapted_network_s_table(whole, run_folder):
    """Test the adapted checkpoint, merge it, test the plain one: the tables are the same."""
    checkpoint = whole[0] / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth'
    run_python('-m', 'lora_sr.cli.main', 'merge', checkpoint, '-o', 'merged.pth', cwd=run_folder)
    options = yaml.safe_load((run_folder / 'run.yml').read_text())
    plain = {'type': 'SPAN', 'feature_channels': 6, 'upscale': 2, 'deploy': True}
    tables = []
    for network, path in ((options['network_g'], str(checkpoint)), (plain, 'merged.pth')):
        test = {key: options[key] for key in ('scale', 'num_gpu', 'val')}
        test.update(name='table', model_type='SRModel', network_g=network)
        test['datasets'] = {'test': options['datasets']['val_1']}
        test['path'] = {'pretrain_network_g': path, 'param_key_g': 'params_ema'}
        (run_folder / 'test.yml').write_text(yaml.safe_dump(test))
        done = run_python('-m', 'lora_sr.test', '-opt', 'test.yml', cwd=run_folder)
        tables.append(re.findall(r'# psnr: (\S+)', done.stderr))
    assert len(tables[0]) == 1 and tables[0] == tables[1]


def test_lr_images_of_several_databases_train_without_ground_truth(run_folder, pairs):
    options = yaml.safe_load((run_folder / 'run.yml').read_text())
    train = options['datasets']['train']
    del train['dataroot_gt'], train['gt_size'], options['train']['pixel_opt'], options['train']['affinity_opt']
    train.update(type='LRImageDataset', dataroot_lq=[str(pairs / 'lq.lmdb'), str(pairs / 'gt.lmdb')], lq_size=12)
    options['train']['distill_pixel_opt'] = {'type': 'PSNRLoss'}
    del options['network_t']['precompute'], options['network_t']['self_ensemble']  # which want raw databases
    (run_folder / 'run.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    done = run_python(*COMMAND, cwd=run_folder)
    found = [float(value) for value in re.findall(r'l_distill: (\S+)', done.stderr)]
    assert len(found) == 20 and sum(found[-5:]) < sum(found[:5])
    # The log counts the images of both: eight and eight.
    assert 'Number of train images: 16' in done.stderr
