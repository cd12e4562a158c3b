"""What the tests of the exports share: small trained checkpoints, and images that no export has tried."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.adapters import LoRAConfig, add_lora, lora_layers
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.span import SPAN

SIZES = ((1, 19, 23), (3, 16, 31), (1, 52, 37))
TRAINED = {
    'SPAN': lambda: SPAN(feature_channels=8, upscale=3),
    'DSCLoRA': lambda: DSCLoRA(feature_channels=8, upscale=2, rank=2),
    'LKDN': lambda: LKDN(
        num_feat=6, num_atten=4, num_block=2, num_in=2, conv='BSConvU_rep', upsampler='pixelshuffle_rep'
    ),
}


def save_trained(build, path) -> nn.Module:
    """Write a network with its branches, LoRA and random weights to a checkpoint, and return it in float64."""
    torch.manual_seed(0)
    network = build().eval()
    if isinstance(network, LKDN):
        add_lora(network, LoRAConfig([r'B\d\.c[123]_d', 'c1'], rank=2, alpha=4))
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.05)
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    torch.save({'params': network.state_dict()}, path)
    return network.double()


def soft_images(channels: int = 3, multiple: int = 1) -> list[Tensor]:
    """Images of the sizes above, smooth, in [0, 1]; sides in multiples of a number."""
    generator = torch.Generator().manual_seed(1)
    return [
        F.interpolate(
            torch.rand(n, channels, 5, 6, generator=generator), size=(h * multiple, w * multiple), mode='bilinear'
        )
        for n, h, w in SIZES
    ]


def psnr(first: Tensor, second: Tensor) -> float:
    """In dB, for values in [0, 1]."""
    return -10 * (first.double() - second.double()).pow(2).mean().log10().item()


def skip_without_half(dtype: torch.dtype) -> None:
    """Skip where this torch has no convolution in ``dtype`` on the CPU, as before 2.1 in float16."""
    try:
        F.conv2d(torch.zeros(1, 1, 3, 3, dtype=dtype), torch.zeros(1, 1, 3, 3, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f'this torch convolves no {dtype} on the CPU: {error}')
