"""Networks as source files of their own: torch alone, the form that is run, sizes as defaults."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from string import Template

import torch
from torch import Tensor, nn

from lora_sr.archs.lkdn import LKDN, BSConvU_idt
from lora_sr.archs.span import NO_NORM, SPAN
from lora_sr.checkpoints.families import family_name

# What `select_model` of the organizers calls other things by.
BRANCH_NAMES = {'args', 'data_range', 'device', 'model', 'model_id', 'model_path', 'name', 'os', 'tile', 'torch'}

# What these files use is older than torch 1.13 and Python 3.9, with which the challenge of 2026 still ran them.
_SPAN_SOURCE = Template('''\
"""$title: ${upscale}x super-resolution of RGB images.

SPAN, the Swift Parameter-free Attention Network (arXiv:2311.12770), in the form that is run: what trains as several
branches is one 3x3 convolution here.
"""

import torch
from torch import nn
from torch.nn import functional as F


class SPAB(nn.Module):
    """Swift parameter-free attention block: the result o of three convolutions gates itself.

    Args:
        channels: Width C.
    """

    def __init__(self, channels):
        super().__init__()
        self.c1_r = nn.Conv2d(channels, channels, 3, padding=1)
        self.c2_r = nn.Conv2d(channels, channels, 3, padding=1)
        self.c3_r = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        """(N, C, H, W) -> the block's output and its first convolution after SiLU, both (N, C, H, W)."""
        first = F.silu(self.c1_r(x))
        o = self.c3_r(F.silu(self.c2_r(first)))
        return (o + x) * (torch.sigmoid(o) - 0.5), first


class $class_name(nn.Module):
    """SPAN for RGB images in [0, 1].

    Args:
        feature_channels: Width C.
        upscale: Scale factor.
    """

$constants    def __init__(self, feature_channels=$feature_channels, upscale=$upscale):
        super().__init__()
$mean        self.conv_1 = nn.Conv2d(3, feature_channels, 3, padding=1)
$blocks
        self.conv_2 = nn.Conv2d(feature_channels, feature_channels, 3, padding=1)
        self.conv_cat = nn.Conv2d(4 * feature_channels, feature_channels, 1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(feature_channels, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x):
        """(N, 3, H, W), RGB in [0, 1] -> (N, 3, upscale * H, upscale * W)."""
        shallow = self.conv_1($image)
$calls
        fused = self.conv_cat(torch.cat([shallow, self.conv_2(features), after_first_block, first_of_block], 1))
        return self.upsampler(fused)
''')

# Of a SPAN that normalizes images.
_NORM_CONSTANTS = """\
    rgb_mean = {0.rgb_mean}  # of DIV2K
    img_range = {0.img_range}  # the features live in the range of 8-bit images

"""
_NORM_MEAN = """\
        self.register_buffer('mean', torch.tensor(self.rgb_mean).view(1, 3, 1, 1), persistent=False)
"""

_LKDN_SOURCE = Template('''\
"""$title: ${upscale}x super-resolution of RGB images.

LKDN, the Large Kernel Distillation Network (CVPR Workshops 2023), in the form that is run: what trains as several
branches is one convolution here.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BSConvU(nn.Module):
    """Blueprint separable convolution (arXiv:2003.13549): 1x1 across channels, then 3x3 in each channel."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dw = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=out_channels)

    def forward(self, x):
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        return self.dw(self.pw(x))

$identity
class LargeKernelAttention(nn.Module):
    """x times a map made of it: 1x1, 5x5 in each channel, 5x5 of dilation 3 in each channel (together 17x17)."""

    def __init__(self, channels):
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.depthwise_dilated = nn.Conv2d(channels, channels, 5, padding=6, groups=channels, dilation=3)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * self.depthwise_dilated(self.depthwise(self.pointwise(x)))


class LKDB(nn.Module):
    """Large kernel distillation block: distill and refine three times, fuse, attend, normalize, and add the input.

    Args:
        channels: Width C, even.
        atten_channels: Channels of the attention.
    """

    def __init__(self, channels, atten_channels):
        super().__init__()
        half = channels // 2
        self.c1_d = nn.Conv2d(channels, half, 1)
        self.c1_r = $conv(channels, channels)
        self.c2_d = nn.Conv2d(channels, half, 1)
        self.c2_r = $conv(channels, channels)
        self.c3_d = nn.Conv2d(channels, half, 1)
        self.c3_r = $conv(channels, channels)
        self.c4 = BSConvU(channels, half)
        self.c5 = nn.Conv2d(half * 4, atten_channels, 1)
        self.atten = LargeKernelAttention(atten_channels)
        self.c6 = nn.Conv2d(atten_channels, channels, 1)
        self.pixel_norm = nn.LayerNorm(channels)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)."""
        refined_1 = F.gelu(self.c1_r(x))
        refined_2 = F.gelu(self.c2_r(refined_1))
        refined_3 = F.gelu(self.c3_r(refined_2))
        halves = [self.c1_d(x), self.c2_d(refined_1), self.c3_d(refined_2), self.c4(refined_3)]
        fused = self.c6(self.atten(self.c5(torch.cat([F.gelu(half) for half in halves], 1))))
        # The norm is over the channels of each pixel, and LayerNorm wants them last.
        return self.pixel_norm(fused.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


class $class_name(nn.Module):
    """LKDN for RGB images in [0, 1].

    Args:
        num_feat: Width C of the blocks, even.
        num_atten: Channels of the attention.
        num_block: Number of blocks.
        upscale: Scale factor.
        num_in: How many times the input is repeated.
    """

    def __init__(self, $sizes):
        super().__init__()
        self.num_in, self.num_block = num_in, num_block
        self.fea_conv = BSConvU(3 * num_in, num_feat)
        for i in range(num_block):
            setattr(self, f'B{i + 1}', LKDB(num_feat, num_atten))
        self.c1 = nn.Conv2d(num_feat * num_block, num_feat, 1)
        self.c2 = BSConvU(num_feat, num_feat)
        self.upsampler = nn.Sequential(nn.Conv2d(num_feat, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))

    def forward(self, x):
        """(N, 3, H, W), RGB in [0, 1] -> (N, 3, upscale * H, upscale * W)."""
        shallow = self.fea_conv(torch.cat([x] * self.num_in, 1))
        features = [shallow]
        for i in range(self.num_block):
            features.append(getattr(self, f'B{i + 1}')(features[-1]))
        fused = F.gelu(self.c1(torch.cat(features[1:], 1)))
        return self.upsampler(self.c2(fused) + shallow)
''')

_IDENTITY_SOURCE = '''
class BSConvU_idt(BSConvU):
    """BSConvU with an identity around it."""

    def forward(self, x):
        """(N, channels, H, W) -> (N, channels, H, W)."""
        return super().forward(x) + x

'''


def describe(network: nn.Module) -> str:
    """The network and its size in words."""
    if not isinstance(network, (SPAN, LKDN)):
        return family_name(network)
    if isinstance(network, SPAN):
        return f'SPAN with {network.feature_channels} channels'
    return f'{family_name(network)} with {network.num_block} blocks of {network.c1.out_channels} channels'


def class_name_for(source: str, name: str) -> str:
    """An identifier made of ``name`` that Python, the network's file and the branch do not use for something else.

    Args:
        source: That of the network's file, whatever its class is called there.
        name: Letters, digits and other characters of ASCII.
    """
    class_name = re.sub(r'\W', '_', name, flags=re.ASCII)
    if class_name[0].isdigit():
        class_name = f'_{class_name}'
    tree = ast.parse(source)
    taken = BRANCH_NAMES | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    taken |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.alias))}
    is_taken = class_name in taken or keyword.iskeyword(class_name) or hasattr(builtins, class_name)
    return f'{class_name}_' if is_taken else class_name


def write_source(network: SPAN | LKDN, title: str, class_name: str) -> str:
    """The source of a module that defines ``network`` by itself, with its sizes as defaults.

    Args:
        network: In deploy form: merged and folded.
        title: First words of the module's docstring.
        class_name: Name of the network's class, see :func:`class_name_for`.

    Returns:
        Python that imports torch alone. What :func:`submitted_state` gives loads strictly into its network.
    """
    names = {'title': title, 'class_name': class_name, 'upscale': network.upscale}
    if isinstance(network, SPAN):
        numbers = range(1, network.num_blocks + 1)
        calls = ['after_first_block, _ = self.block_1(shallow)']
        for i in numbers[1:]:
            first = 'first_of_block' if i == network.num_blocks else '_'
            features = 'after_first_block' if i == 2 else 'features'
            calls.append(f'features, {first} = self.block_{i}({features})')
        return _SPAN_SOURCE.substitute(
            names,
            feature_channels=network.feature_channels,
            constants=_NORM_CONSTANTS.format(network) if network.norm else '',
            mean=_NORM_MEAN if network.norm else '',
            image='(x - self.mean) * self.img_range' if network.norm else 'x',
            blocks='\n'.join(f'        self.block_{i} = SPAB(feature_channels)' for i in numbers),
            calls='\n'.join(f'        {call}' for call in calls),
        )
    sizes = {**network.sizes, 'upscale': network.upscale, 'num_in': network.num_in}
    has_identity = isinstance(network.B1.c1_r, BSConvU_idt)
    return _LKDN_SOURCE.substitute(
        names,
        sizes=', '.join(f'{key}={value}' for key, value in sizes.items()),
        conv='BSConvU_idt' if has_identity else 'BSConvU',
        identity=_IDENTITY_SOURCE if has_identity else '',
    )


def submitted_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of ``network``, in deploy form, under the names of :func:`write_source`: a plain dict, on the CPU."""
    return {
        key.replace('.eval_conv.', '.'): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in network.state_dict().items()
        if not key.endswith('.identity') and key != NO_NORM
    }
