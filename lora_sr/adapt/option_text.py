"""The option file of an adaptation, which drives stock BasicSR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lora_sr.adapted_folder import HELD, NAME
from lora_sr.option_file import OptionDumper

TEXT = """\
# {network}, adapted to a camera: written by `lora-sr adapt`. In the folder of this file, this repeats its training:
#
#   python -m lora_sr.train -opt train.yml
#   lora-sr merge experiments/{name}/models/net_g_best_{held}.pth{imports_option} -o mine.pth

name: {name}
model_type: SRModel
scale: {scale}
num_gpu: auto
manual_seed: 0
{imports}
datasets:
  train:
    name: camera
    type: RawPairedImageDataset  # whole images, uncompressed, of which a patch is cut
    dataroot_gt: data/HR_raw.lmdb
    dataroot_lq: data/LR_raw.lmdb
    io_backend:
      type: lmdb
    gt_size: {gt_size}
    use_hflip: false  # a camera blurs and shifts in its own directions
    use_rot: false
    batch_size_per_gpu: {batch}
    num_worker_per_gpu: {workers}
    dataset_enlarge_ratio: 100
  val:
    name: {held}
    type: PairedImageDataset
    dataroot_gt: data/held/HR
    dataroot_lq: data/held/LR
    io_backend:
      type: disk

network_g:
  type: AdaptSR
{base}
{lora}

path:
  pretrain_network_g: {pretrain}
  param_key_g: {param_key}
  strict_load_g: true
  resume_state: ~

train:
  memory_format: channels_last
  amp: {amp}
  ema_decay: {ema_decay}
  optim_g:
    type: Adam
    lr: {rate}
    weight_decay: 0
    betas: [0.9, 0.99]
  scheduler:
    type: CosineAnnealingRestartLR
    periods: [{iterations}]
    restart_weights: [1]
    eta_min: 1e-6
  total_iter: {iterations}
  max_minutes: {minutes}
  warmup_iter: -1
  pixel_opt:
    type: MSELoss  # what PSNR, by which all is judged, measures
    loss_weight: 1.0
    reduction: mean

val:
  val_freq: {val_freq}
  save_img: false
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: {scale}
      test_y_channel: true

logger:
  print_freq: {print_freq}
  save_checkpoint_freq: {val_freq}
  keep_last: 1
  keep_best: psnr
  use_tb_logger: false

dist_params:
  backend: nccl
"""


def _section(name: str, values: Mapping[str, Any], indent: int) -> str:
    """A section of an option file, as text."""
    text: str = yaml.dump({name: _plain(values)}, Dumper=OptionDumper, sort_keys=False, default_flow_style=None)
    return '\n'.join(' ' * indent + line for line in text.rstrip().splitlines())


def option_text(
    *,
    network: str,
    scale: int,
    base: Mapping[str, Any],
    lora: Mapping[str, Any],
    pretrain: str | None,
    imports: Sequence[str],
    side: int,
    batch: int,
    workers: int,
    amp: str | None,
    ema_decay: float,
    rate: float,
    iterations: int,
    minutes: float,
    validations: int,
) -> str:
    """The text of the option file.

    Args:
        network: What the network is called.
        scale: Its scale factor.
        base: Its section.
        lora: What of it is adapted.
        pretrain: The file of its weights; ``None`` where its section names it.
        imports: Modules that the run imports first.
        side: Of the LR patches.
        batch: Of them in a step.
        workers: Processes that read.
        amp: ``bf16``, ``fp16`` or ``None``.
        ema_decay: Of the average of the weights.
        rate: The learning rate.
        iterations: Of the run.
        minutes: That it may take.
        validations: How often it measures.
    """
    every = max(1, iterations // validations)
    values = {
        'network': network,
        'name': NAME,
        'held': HELD,
        'scale': scale,
        'imports': f'imports: {_inline(list(imports))}\n' if imports else '',
        'imports_option': ''.join(f' --import {name}' for name in imports),
        'gt_size': side * scale,
        'batch': batch,
        'workers': workers,
        'base': _section('base', base, 2),
        'lora': _section('lora', lora, 2),
        'pretrain': _inline(pretrain),
        'param_key': '~' if pretrain is None else 'params',
        'amp': amp or '~',
        'ema_decay': ema_decay,
        'rate': f'{rate:g}',
        'iterations': iterations,
        'minutes': f'{minutes:.1f}',
        'val_freq': every,
        'print_freq': max(1, every // 4),
    }
    return TEXT.format(**values)


def _inline(value: object) -> str:
    text: str = yaml.dump(_plain(value), Dumper=OptionDumper, default_flow_style=True, width=10**6)
    return text.removesuffix('\n').removesuffix('...').strip() if value is not None else '~'


def _plain(value: Any) -> Any:
    """Tuples, of which YAML knows none, as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
