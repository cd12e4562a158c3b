"""Two networks, adapters for them, and pairs of images to fit the weights of a mix to."""

import cv2
import numpy as np
import torch
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F
from trained import trained

from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
)
from lora_sr.cli.main import main


@ARCH_REGISTRY.register()
class OfOnesOwn(nn.Module):
    """A network that this package does not know."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mlps = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.last = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x):
        features = self.norm(self.first(x - 0.5))
        for mlp in self.mlps:
            features = features + mlp(F.gelu(features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(self.last(features) * 0.3, 2) + F.interpolate(x, scale_factor=2)


def adapt(base, config, seed):
    """``base`` with an adapter that changes its output by a few per cent."""
    return trained(add_lora(base, config), seed, 0.15)


def known():
    network = MSRResNet(num_feat=8, num_block=1, upscale=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # at first BasicSR's weights do next to nothing
    return network


ARCHS = {
    'known': (
        known,
        LoRAConfig(['body.*', 'conv_hr'], rank=2, alpha=3),
        LoRAConfig(['upconv1', 'conv_.*'], rank=3, also_train=['bias']),
    ),
    'unknown': (
        OfOnesOwn,
        LoRAConfig(['.*'], rank=2, alpha=3, also_train=['norm']),
        LoRAConfig(['last'], rank=3, also_train=['bias']),
    ),
}


def run(*arguments):
    return main(['adapter', *map(str, arguments)])


def load(network, path):
    network.load_state_dict(torch.load(path, weights_only=True)['params'], strict=True)
    return network.requires_grad_(False)


@torch.no_grad()
def write_pairs(folder, network, count=3, scale=2):
    """Smooth random LR images, and what ``network`` makes of them as originals."""
    generator = torch.Generator().manual_seed(1)
    for name in ('gt', 'lr'):
        (folder / name).mkdir()
    for i in range(count):
        small = F.interpolate(torch.rand(1, 3, 5, 6, generator=generator), size=(24, 28 + i), mode='bicubic')
        lr = (small * 0.6 + 0.2).mul(255).round().clamp(0, 255)
        output = network(lr / 255).mul(255).round().clamp(0, 255)
        for name, image in (('lr', lr), ('gt', output)):
            bgr = image[0].permute(1, 2, 0).numpy()[:, :, ::-1].astype(np.uint8)
            cv2.imwrite(str(folder / name / f'{i}.png'), bgr)
    return ['--fit', '--gt', folder / 'gt', '--lr', folder / 'lr', '--scale', scale]


def option_file(folder, base):
    section = (
        '{type: OfOnesOwn}' if type(base) is OfOnesOwn else '{type: MSRResNet, num_feat: 8, num_block: 1, upscale: 2}'
    )
    path = folder / 'options.yml'
    path.write_text(f'name: mine\nnetwork_g: {{type: AdaptSR, base: {section}, lora: {{groups: [all], rank: 2}}}}\n')
    return ['-opt', path]
