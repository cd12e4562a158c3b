"""Shipped option files, made small: tiny networks, two iterations."""

from __future__ import annotations

from pathlib import Path

import torch
from basicsr.utils.registry import ARCH_REGISTRY

from lora_sr.basicsr.options.schema import TEACHER
from lora_sr.data import prepare_databases
from lora_sr.option_file import load_options

LQ_SIZE = 16
DISCRIMINATOR = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}  # for any patches, as others are not
SMALL = {
    'SPAN': {'feature_channels': 8},
    'DSCLoRA': {'feature_channels': 8},
    'LKDN': {'num_feat': 8, 'num_atten': 8},
    'LKDN_S': {'num_feat': 8, 'num_atten': 8},
    'EDSR': {'num_feat': 8, 'num_block': 1},
    'RRDBNet': {'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4},
    'SwinIR': {'depths': [1], 'embed_dim': 12, 'num_heads': [2], 'img_size': LQ_SIZE},
}


def shrink(section: dict) -> None:
    inner = section['base'] if section['type'] == 'AdaptSR' else section
    inner.update(SMALL[inner['type']])


def write_weights(section: dict, file: Path, key: str | None) -> str:
    """Write random weights of the plain network that one is trained from."""
    section = {name: value for name, value in section.get('base', section).items() if name not in TEACHER}
    kind = section.pop('type')
    if kind == 'DSCLoRA':
        kind, section = 'SPAN', {name: section[name] for name in ('feature_channels', 'upscale')}
    weights = ARCH_REGISTRY.get(kind)(**section).state_dict()
    torch.save({key: weights} if key else weights, file)
    return str(file)


def small_training(file: Path, data: Path, folder: Path) -> dict:
    """Two iterations of a train file."""
    options = load_options(file)
    scale, path = options['scale'], options['path']
    options.update({'network_d': DISCRIMINATOR} if 'network_d' in options else {})
    for key in [key for key in ('network_g', 'network_t') if key in options]:
        shrink(options[key])
        pretrained = f'pretrain_{key}'
        if path.get(pretrained):
            weights = path.get(f'param_key_{key[-1]}', 'params')
            path[pretrained] = write_weights(options[key], folder / f'{key}.pth', weights)
    train = options['datasets']['train']
    sizes = {'gt_size': LQ_SIZE * scale, 'lq_size': LQ_SIZE}
    for section in (options, train):
        section.update({key: value for key, value in sizes.items() if key in section})
    degrades = train['type'] == 'RealESRGANDataset'
    train.update(io_backend={'type': 'lmdb'}, dataset_enlarge_ratio=100)
    train.update(batch_size_per_gpu=1 if degrades else 2, num_worker_per_gpu=int(degrades))
    roots = {key: f'{data}/{key}.lmdb' for key in ('gt', 'lq')}
    if train['type'].startswith('Raw'):
        prepare_databases([data / 'gt'], folder / 'raw', [scale], raw=True, progress=False)
        roots = {'gt': f'{folder}/raw/HR_raw.lmdb', 'lq': f'{folder}/raw/LR_bicubic_X{scale}_raw.lmdb'}
    train.update({f'dataroot_{key}': root for key, root in roots.items() if f'dataroot_{key}' in train})
    options['datasets'] = {'train': train}
    options.pop('val', None)
    options['train'].update(total_iter=2)
    if options['train'].get('perceptual_opt'):
        options['train']['perceptual_opt'] = None  # it needs the weights of VGG
    options['logger'].update(print_freq=1, save_checkpoint_freq=2, use_tb_logger=False)
    return {**options, 'num_gpu': 0, **({'queue_size': 2} if degrades else {})}
