"""Adapters of other programs, and a network that they are for."""

import json

import torch
from safetensors.torch import save_file
from torch import nn


class Tiny(nn.Module):
    """Convolutions of one to three dimensions, with square, tall and flat kernels; linear layers and an embedding."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 8, (1, 3), padding=(0, 1)),
            nn.BatchNorm2d(8),
        )
        self.line, self.volume = nn.Conv1d(8, 6, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)
        self.table = nn.Embedding(7, 5)
        self.tail = nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(self.head(x))
        shift = self.line(x.flatten(2)).mean() + self.volume(x[:, :1, None]).mean() + self.table(torch.arange(7)).mean()
        return self.tail(x.permute(0, 2, 3, 1)) + shift


LAYERS = ['head', 'body.0', 'body.1', 'body.2', 'line', 'volume', 'table', 'tail']


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(folder, tensors, config=None, name='adapter_model.safetensors'):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / 'adapter_config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / name


SPAN_LAYER = 'base_model.model.conv_2.eval_conv.'

SPAN_STATE = {'conv_2.eval_conv.weight': random(26, 26, 3, 3), 'conv_2.eval_conv.bias': random(26)}

SPAN_FACTORS = {f'{SPAN_LAYER}lora_A.weight': random(4, 26, 3, 3), f'{SPAN_LAYER}lora_B.weight': random(26, 4, 1, 1)}


def pair(name, out=5, inner=8, rank=2):
    return {f'{name}.lora_down.weight': random(rank, inner), f'{name}.lora_up.weight': random(out, rank)}
