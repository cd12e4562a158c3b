"""The folder of a finished adaptation, as `lora-sr adapt` leaves it, of a tiny network and without the training."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from lora_sr.adapters import LoRAConfig, add_lora, lora_layers
from lora_sr.archs.span import SPAN
from lora_sr.images.bicubic import bicubic_downscale

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
LORA_B = 1e-3  # of the update


def write_adaptation(folder: Path, has_gained: bool = True, held: int = 5, network: str = '/nets/SPAN_x2.pth') -> Path:
    """Write it, and give its folder.

    Args:
        folder: Where.
        has_gained: Whether there is a merged network; else the best one of the training shows what there was.
        held: Number of pairs held back.
        network: What the record calls the network.
    """
    (folder / 'experiments/adapt/models').mkdir(parents=True)
    for kind in ('HR', 'LR'):
        (folder / 'data/held' / kind).mkdir(parents=True)
    names = [f'{number:02d}' for number in range(held)]
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
        hr = cv2.resize(noise, (120, 90), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / 'data/held/HR' / f'{name}.png'), hr)
        cv2.imwrite(str(folder / 'data/held/LR' / f'{name}.png'), bicubic_downscale(hr[:90, :120], 2))
    torch.manual_seed(0)
    base = SPAN(deploy=True, feature_channels=6, upscale=2)
    torch.save({'params': base.state_dict()}, folder / 'base.pth')
    add_lora(base, LoRAConfig([r'block_\d\..*'], rank=1))
    for _, layer in lora_layers(base):
        torch.nn.init.constant_(layer.lora_B, LORA_B)
    torch.save({'params': base.state_dict()}, folder / 'experiments/adapt/models/net_g_best_held.pth')
    if has_gained:
        state = torch.load(folder / 'base.pth', weights_only=True)['params']
        for value in state.values():
            value *= 1.02
        torch.save({'params': state}, folder / 'merged.pth')
    (folder / 'adapt.json').write_text(json.dumps(record(names, has_gained, network)))
    return folder


def record(held, has_gained, network):
    """The content of ``adapt.json``."""
    used = [*held, 'train 1', 'train 2']
    gain = 1.25 if has_gained else 0.0125
    return {
        'request': {
            'network': {'checkpoint': network, 'options': None, 'imports': [], 'param_key': None},
            'hr': '/photos/HR',
            'lr': '/photos/LR',
            'teacher': None,
            'minutes': 2.0,
            'share': 0.05,
            'align': False,
            'from': None,
        },
        'seconds': 123.0,
        'steps': {
            'pairs': {
                'used': len(used),
                'left_out': {'/photos/HR/bad.png': '/photos/HR/bad.png is damaged or is not an image.'},
                'shift': [-0.3, 0.02],
                'color': 2.95,
                'notes': ['LR is shifted by (-0.3, 0.0) LR pixels, which the network would learn.'],
                'pairs': {name: {'shift': [-0.3, 0.02], 'color': 2.95, 'correlation': 0.9975} for name in used},
                'training': ['train 1', 'train 2'],
                'held': held,
                'lora': {'groups': ['all'], 'rank': 3, 'alpha': 3, 'also_train': ['bias']},
                'trained_parameters': 1234,
                'parameters': 12340,
                'batch': 2,
                'side': 24,
            },
            'start': {
                'start': {'camera': 23.0, 'clean': 31.5},
                'bicubic': {'camera': 22.5, 'clean': 27.25},
                'seconds': 1.0,
            },
            'rates': {
                'psnr': {'0.001': 23.1, '0.0025': 23.2, '0.006': 23.3, '0.015': None},
                'steps': 25,
                'step_seconds': 0.2,
                'best': 0.006,
                'top': 0.006,
            },
            'plan': {'iterations': 400, 'minutes': 1.4, 'rate': 0.003},
            'training': {'psnr': {'35': 23.4, '70': 24.25}, 'iterations': 99, 'ended': 'no_rise', 'best': 70},
            'strength': {f'{one:g}': {'camera': 23.0 + gain * one, 'clean': 31.5 - one} for one in STRENGTHS},
            'outcome': {
                'held': len(held),
                'strength': 1.25 if has_gained else 0.5,
                'gain': gain * 1.25,
                'has_gained': has_gained,
                'ended': 'no_rise',
                'sentence': 'Your camera: 23.00 -> 24.56 dB (bicubic 22.50).' if has_gained else 'Nothing was gained.',
            },
        },
    }
