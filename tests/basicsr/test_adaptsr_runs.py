"""AdaptSR by option file: SwinIR trains, validates, goes on and is tested on images of odd sizes."""

import re
from pathlib import Path

import pytest
import torch
from basicsr.archs.swinir_arch import SwinIR
from tiny_run import REPOSITORY, run_python, write_pairs

from lora_sr import load_network
from lora_sr.adapters import is_lora_key
from lora_sr.checkpoints import Checkpoint
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.option_file import load_options

pytestmark = pytest.mark.slow

OPTIONS = REPOSITORY / 'options'
SMALL = {'embed_dim': 12, 'depths': [2], 'num_heads': [2], 'img_size': 16}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight pairs of 11x11 and 44x44 pixels, and a SwinIR x4 that has not seen them."""
    torch.manual_seed(0)
    write_pairs(tmp_path / 'data', gt_size=44, scale=4)
    network = SwinIR(upscale=4, window_size=8, mlp_ratio=2, upsampler='pixelshuffledirect', **SMALL)
    torch.save({'params': network.state_dict()}, tmp_path / 'base.pth')
    return tmp_path


def run(folder: Path, program: str, file: str, *overrides: str, flags: tuple = ()):
    """Run a shipped option file on the pairs of the folder, with a small SwinIR."""
    options = load_options(OPTIONS / file)
    changes = ['num_gpu=0', *(f'network_g:base:{key}={value}' for key, value in SMALL.items())]
    for name, dataset in options['datasets'].items():
        ending = '.lmdb' if dataset['io_backend']['type'] == 'lmdb' else ''
        changes += [f'datasets:{name}:dataroot_{kind}={folder}/data/{kind}{ending}' for kind in ('gt', 'lq')]
    if program == 'train':
        changes += ['datasets:train:gt_size=32', 'datasets:train:batch_size_per_gpu=2', 'val:val_freq=3']
        changes += ['datasets:train:num_worker_per_gpu=0', 'logger:save_checkpoint_freq=3', 'logger:print_freq=1']
        changes += ['logger:use_tb_logger=false', f'path:pretrain_network_g={folder}/base.pth']
    command = ['-m', f'lora_sr.{program}', '-opt', OPTIONS / file, *flags, '--force_yml', *changes, *overrides]
    return run_python(*command, cwd=folder).stderr


def psnr(log: str) -> list:
    return re.findall(r'# psnr: ([\d.]+)', log)


def test_swinir_trains_validates_resumes_and_is_tested_at_odd_sizes(folder):
    file = 'train/AdaptSR/train_AdaptSR_SwinIR-light_x4.yml'
    log = run(folder, 'train', file, 'train:total_iter=3')
    assert len(psnr(log)) == 2  # two sets, when the third iteration is done, which is the end
    checkpoint = folder / 'experiments/train_AdaptSR_SwinIR-light_x4/models/net_g_latest.pth'
    third = read_checkpoint(checkpoint)['params']
    log = run(folder, 'train', file, 'train:total_iter=6', flags=('--auto_resume',))
    assert re.search(r'Resuming training from epoch: \d+, iter: 3', log)
    assert [int(i) for i in re.findall(r'iter:\s+(\d+), lr', log)] == [4, 5, 6]

    base, sixth = Checkpoint.read(folder / 'base.pth').state, read_checkpoint(checkpoint)['params']
    assert all(torch.equal(sixth[key], base[key]) for key in base)
    assert {key for key in sixth if not is_lora_key(key)} == base.keys()
    moved = [key for key in sixth if key.endswith('lora_B') and not torch.equal(sixth[key], third[key])]
    assert len(moved) == sum(key.endswith('lora_B') for key in sixth)

    merged = folder / 'merged.pth'
    run_python('-m', 'lora_sr.cli.main', 'merge', checkpoint, '-o', merged, cwd=folder)
    assert type(load_network(merged)) is SwinIR
    file = 'test/AdaptSR/test_AdaptSR_SwinIR-light_x4.yml'
    adapted = psnr(run(folder, 'test', file, 'val:save_img=false'))
    plain = [f'path:pretrain_network_g={merged}', 'path:param_key_g=params', 'val:save_img=false']
    # A model that knows nothing of windows gives the same.
    assert len(adapted) == 3 and adapted == psnr(run(folder, 'test', file, 'model_type=SRModel', *plain))
    start = [f'path:pretrain_network_g={folder}/base.pth', *plain[1:]]
    assert adapted != psnr(run(folder, 'test', file, *start))


def test_swinir_under_swinir_model_without_a_window_size(folder):
    file = OPTIONS / 'train/AdaptSR/train_AdaptSR_SwinIR-light_x4.yml'
    text = file.read_text().replace('    window_size: 8\n', '')
    (folder / 'file.yml').write_text(text)
    done = run_python('-m', 'lora_sr.train', '-opt', 'file.yml', '--force_yml', 'num_gpu=0', cwd=folder, status=2)
    assert 'error: network_g.base.window_size is missing; SwinIRModel reads it' in done.stderr
