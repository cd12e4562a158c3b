"""A tiny run: a dataset of eight pairs, the options of six iterations on it, and how to start it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]

TINY_OPTIONS = """\
name: tiny
model_type: SRModel
scale: 2
num_gpu: 0
manual_seed: 0
dist_params: {{backend: gloo}}
datasets:
  train:
    name: train
    type: PairedImageDataset
    dataroot_gt: {root}/gt{suffix}
    dataroot_lq: {root}/lq{suffix}
    io_backend: {{type: {backend}}}
    gt_size: 16
    use_hflip: true
    use_rot: true
    batch_size_per_gpu: 2
    num_worker_per_gpu: 0
    dataset_enlarge_ratio: 10
  val:
    name: val
    type: PairedImageDataset
    dataroot_gt: {root}/gt{suffix}
    dataroot_lq: {root}/lq{suffix}
    io_backend: {{type: {backend}}}
network_g:
  type: MSRResNet
  num_feat: 4
  num_block: 1
  upscale: 2
path:
  pretrain_network_g: ~
  strict_load_g: true
  resume_state: ~
train:
  optim_g: {{type: AdamW, lr: 1e-3, betas: [0.9, 0.99]}}
  scheduler: {{type: MultiStepLR, milestones: [3, 5], gamma: 0.5}}
  total_iter: 6
  warmup_iter: -1
  pixel_opt: {{type: L1Loss, loss_weight: 1.0}}
val:
  val_freq: 4
  save_img: false
  suffix: ~
  metrics:
    psnr: {{type: calculate_psnr, crop_border: 2, test_y_channel: false}}
logger:
  print_freq: 1
  save_checkpoint_freq: 2
  use_tb_logger: false
"""


def write_pairs(root: Path, count: int = 8, gt_size: int = 32, scale: int = 2) -> None:
    """Write `root/gt`, `root/lq` (PNG files) and `root/gt.lmdb`, `root/lq.lmdb` of the same random images."""
    rng = np.random.default_rng(0)
    for name, size in (('gt', gt_size), ('lq', gt_size // scale)):
        folder, database = root / name, root / f'{name}.lmdb'
        folder.mkdir(parents=True)
        with lmdb.open(str(database), map_size=1 << 24) as env, env.begin(write=True) as transaction:
            for index in range(count):
                image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                png = cv2.imencode('.png', image)[1].tobytes()
                (folder / f'{index:03}.png').write_bytes(png)
                transaction.put(f'{index:03}'.encode(), png)
        lines = [f'{index:03}.png ({size},{size},3) 1\n' for index in range(count)]
        (database / 'meta_info.txt').write_text(''.join(lines))


def model_options(folder: Path) -> dict:
    """Options of a small network, as `parse_options` hands them to its model, which saves in a folder."""
    folders = {name: str(folder / name) for name in ('models', 'training_states')}
    for path in folders.values():
        os.makedirs(path)
    return {
        'name': 'tiny',
        'model_type': 'SRModel',
        'num_gpu': 0,
        'is_train': True,
        'dist': False,
        'rank': 0,
        'path': folders,
        'network_g': {'type': 'MSRResNet', 'num_feat': 2, 'num_block': 1, 'upscale': 2},
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-3, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [4], 'gamma': 0.5},
            'pixel_opt': {'type': 'L1Loss'},
            'total_iter': 20,
        },
        'val': {'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}},
    }


def change(options: dict, path: str, value=...):
    """Set what stands at `a.b.c`, or remove it."""
    *parents, key = path.split('.')
    for parent in parents:
        options = options[parent]
    if value is ...:
        del options[key]
    else:
        options[key] = value


def python_environment() -> dict:
    """The environment of a run: this repository's package, one thread, and no launcher's variables."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS='1')
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID'):
        environment.pop(name, None)
    return environment


def run_python(*arguments, cwd, status=0):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=python_environment(),
        capture_output=True,
        text=True,
        timeout=900,  # machines differ, and may be busy
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def logged(done) -> dict:
    """The learning rate of each iteration that was logged."""
    found = re.findall(r'iter:\s*([\d,]+), lr:\(([\d.e+-]+),', done.stdout + done.stderr)
    return {int(iteration): float(rate) for iteration, rate in found}
