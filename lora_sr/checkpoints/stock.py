"""The networks of BasicSR that take an image and give an image, from their state dicts.

A state dict belongs to one of them if it has all the keys that its builder reads, and no key that the network has not:
many networks of others are one of these with something besides, and those are not known here. What LoRA adds to a state
dict is left out of account.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lora_sr.adapters import is_lora_key
from lora_sr.errors import InputError, import_basicsr

State = Mapping[str, Tensor]
Arguments = dict[str, Any]
LARGEST_WINDOW, LARGEST_SIDE, LARGEST_MASK = 64, 512, 2**25  # of SwinIR


def _swinir(state: State) -> Arguments:
    """SwinIR with any upsampler. ``img_range`` is 255 for windows of 7 without an upsampler, else 1."""
    width, channels = state['conv_first.weight'].shape[:2]
    depths = _swinir_depths(state)
    first_blocks = [f'layers.{i}.residual_group.blocks.0' for i in range(len(depths))]
    tables = [state[f'{block}.attn.relative_position_bias_table'] for block in first_blocks]
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    size = _swinir_size(state, window)
    check_swinir(window, *size)
    hidden = state['layers.0.residual_group.blocks.0.mlp.fc1.weight'].shape[0]
    mlp_ratio = hidden / width
    if int(width * mlp_ratio) != hidden:  # as the network rounds it
        mlp_ratio = (hidden + 0.5) / width
    upsampler, upscale = '', 1
    if 'conv_up1.weight' in state:
        upsampler, upscale = 'nearest+conv', 4
    elif 'conv_before_upsample.0.weight' in state:
        upsampler, upscale = 'pixelshuffle', _upscale_of_steps(state)
    elif 'upsample.0.weight' in state:
        upsampler, upscale = 'pixelshuffledirect', math.isqrt(state['upsample.0.weight'].shape[0] // channels)
    return dict(
        img_size=size,
        in_chans=channels,
        embed_dim=width,
        depths=depths,
        num_heads=[table.shape[1] for table in tables],
        window_size=window,
        mlp_ratio=mlp_ratio,
        qkv_bias='layers.0.residual_group.blocks.0.attn.qkv.bias' in state,
        ape='absolute_pos_embed' in state,
        patch_norm='patch_embed.norm.weight' in state,
        upscale=upscale,
        img_range=255.0 if window == 7 and not upsampler else 1.0,
        upsampler=upsampler,
        resi_connection='3conv' if 'layers.0.conv.0.weight' in state else '1conv',
    )


def check_swinir(window: int, height: int, width: int) -> None:
    """Check the sizes of a SwinIR before it is built: it works out an index and masks, which follow from them alone.

    Raises:
        InputError: They take too much memory, or too much time when it is run with an image of its size.
    """
    if window > LARGEST_WINDOW:  # its index has window**4 values
        raise InputError(f'it is no SwinIR: its windows must be of at most {LARGEST_WINDOW} pixels, got {window}.')
    if height * width > LARGEST_SIDE**2:
        raise InputError(
            f'it is no SwinIR: its images must be of at most {LARGEST_SIDE}x{LARGEST_SIDE} pixels, got '
            f'{height}x{width}.'
        )
    if height * width * window**2 > LARGEST_MASK:
        raise InputError(
            f'it is no SwinIR: its masks must have at most {LARGEST_MASK:,} values, got {height}x{width} pixels in '
            f'windows of {window}.'
        )


def _swinir_depths(state: State) -> list[int]:
    """The number of blocks in each layer."""
    layers: dict[str, set[str]] = {}
    for key in state:
        match = re.match(r'(layers\.\d+)\.(residual_group\.blocks\.\d+\.)?', key)
        if match:
            layers.setdefault(match[1], set()).update(filter(None, [match[2]]))
    return [len(layers.get(f'layers.{i}', ())) for i in range(len(layers))]


def _swinir_size(state: State, window: int) -> tuple[int, int]:
    """Height and width of the images that SwinIR was built for, of which only its buffers tell."""
    mask = next((value for key, value in state.items() if key.endswith('.attn_mask')), None)
    if mask is not None:
        # Of the first row of windows only the last has pixels of both sides of the image, which its mask separates.
        columns = int(mask.flatten(1).any(1).nonzero()[0]) + 1
        return mask.shape[0] // columns * window, columns * window
    pixels = state['absolute_pos_embed'].shape[1] if 'absolute_pos_embed' in state else window**2
    side = math.isqrt(pixels)
    return (side, side) if side**2 == pixels else (window, pixels // window)


def _rrdbnet(state: State) -> Arguments:
    """RRDBNet for x4, for x2 and for x1, which unshuffle the pixels of the image."""
    inputs, outputs = state['conv_first.weight'].shape[1], state['conv_last.weight'].shape[0]
    scales = {outputs: 4, 4 * outputs: 2, 16 * outputs: 1}
    if inputs not in scales:
        raise InputError(
            f'it is no RRDBNet with as many channels in as out: conv_last gives {outputs}, and conv_first takes '
            f'{inputs}, which should be {", ".join(f"{key} for x{scale}" for key, scale in scales.items())}.'
        )
    return dict(
        num_in_ch=outputs,
        num_out_ch=outputs,
        scale=scales[inputs],
        num_feat=state['conv_first.weight'].shape[0],
        num_block=_count(state, r'body\.\d+\.'),
        num_grow_ch=state['body.0.rdb1.conv1.weight'].shape[0],
    )


def _edsr(state: State) -> Arguments:
    """EDSR for RGB images; ``res_scale`` is 0.1 from 256 channels on, else 1."""
    width = _width_for_rgb('EDSR', state)
    return dict(
        num_in_ch=3,
        num_out_ch=state['conv_last.weight'].shape[0],
        num_feat=width,
        num_block=_count(state, r'body\.\d+\.'),
        upscale=_upscale_of_steps(state),
        res_scale=0.1 if width >= 256 else 1,
    )


def _rcan(state: State) -> Arguments:
    """RCAN for RGB images, with a ``res_scale`` of 1."""
    width = _width_for_rgb('RCAN', state)
    squeezed = state['body.0.residual_group.0.rcab.3.attention.1.weight'].shape[0]
    return dict(
        num_in_ch=3,
        num_out_ch=state['conv_last.weight'].shape[0],
        num_feat=width,
        num_group=_count(state, r'body\.\d+\.'),
        num_block=_count(state, r'body\.0\.residual_group\.\d+\.'),
        squeeze_factor=width // squeezed,
        upscale=_upscale_of_steps(state),
    )


def _msrresnet(state: State) -> Arguments:
    """MSRResNet for x2, x3 and x4."""
    width, channels = state['conv_first.weight'].shape[:2]
    return dict(
        num_in_ch=channels,
        num_out_ch=state['conv_last.weight'].shape[0],
        num_feat=width,
        num_block=_count(state, r'body\.\d+\.'),
        upscale=4 if 'upconv2.weight' in state else math.isqrt(state['upconv1.weight'].shape[0] // width),
    )


def _srvggnet(state: State) -> Arguments:
    """SRVGGNetCompact with as many channels in as out; ``act_type`` is relu where the activations have no weights."""
    width, channels = state['body.0.weight'].shape[:2]
    last = max(int(key.split('.')[1]) for key in state)
    outputs = state[f'body.{last}.weight'].shape[0]
    return dict(
        num_in_ch=channels,
        num_out_ch=channels,
        num_feat=width,
        num_conv=last // 2 - 1,
        upscale=_upscale_of_shuffle('SRVGGNetCompact', channels, outputs),
        act_type='prelu' if 'body.1.weight' in state else 'relu',
    )


def _ridnet(state: State) -> Arguments:
    """RIDNet; mean and range of the images are among the weights."""
    width, channels = state['head.weight'].shape[:2]
    return dict(
        in_channels=channels,
        mid_channels=width,
        out_channels=state['tail.weight'].shape[0],
        num_block=_count(state, r'body\.\d+\.'),
    )


def _ecbsr(state: State) -> Arguments:
    """ECBSR with as many channels in as out, without identities; ``act_type`` is relu where there are no weights."""
    width, channels = state['backbone.0.conv3x3.weight'].shape[:2]
    blocks = _count(state, r'backbone\.\d+\.')
    outputs = state[f'backbone.{blocks - 1}.conv3x3.weight'].shape[0]
    return dict(
        num_in_ch=channels,
        num_out_ch=channels,
        num_block=blocks - 2,
        num_channel=width,
        with_idt=False,
        act_type='prelu' if 'backbone.0.act.weight' in state else 'relu',
        scale=_upscale_of_shuffle('ECBSR', channels, outputs),
    )


def _count(state: State, prefix: str) -> int:
    """How many different beginnings of keys match."""
    return len({match.group() for match in (re.match(prefix, key) for key in state) if match})


def _upscale_of_steps(state: State) -> int:
    """The factor of BasicSR's ``Upsample``: one step of 3, or steps of 2."""
    steps = [value for key, value in state.items() if re.fullmatch(r'upsample\.\d+\.weight', key)]
    return 3 if steps and steps[0].shape[0] == 9 * steps[0].shape[1] else 2 ** len(steps)


def _upscale_of_shuffle(name: str, channels: int, outputs: int) -> int:
    """The factor of one ``PixelShuffle`` that makes ``channels`` of ``outputs``."""
    upscale = math.isqrt(outputs // channels)
    if outputs != channels * upscale**2:
        raise InputError(
            f'it is no {name} with as many channels in as out: it takes {channels}, and its last convolution gives '
            f'{outputs}, which should be {channels} times the square of a scale.'
        )
    return upscale


def _width_for_rgb(name: str, state: State) -> int:
    width, channels = state['conv_first.weight'].shape[:2]
    if channels != 3:
        raise InputError(f'it is no {name} for RGB images: conv_first takes {channels} channels, not 3.')
    return width


@dataclass(frozen=True)
class StockNetwork:
    """How one network is told from its state dict, and built from it, with or without LoRA.

    Args:
        name: Its class.
        module: The module of BasicSR that has the class, below ``basicsr.archs``.
        arguments: From a state dict to the arguments of the class, read from names and shapes. It raises InputError
            where numbers of channels cannot be told.
        needed: Keys that are read, which every state dict of the network has.
        layers: An expression for the names of all its layers with ``weight`` and ``bias``.
        tensors: An expression for the keys of all its other tensors.
        together: Keys of which a state dict has all or none.
    """

    name: str
    module: str
    arguments: Callable[[State], Arguments]
    needed: tuple[str, ...]
    layers: str
    tensors: str = ''
    together: tuple[str, ...] = ()

    def recognize(self, state: State) -> bool:
        """Whether ``state`` is a state dict of this network, of any size."""
        keys = {key for key in state if not is_lora_key(key)}
        has_all = keys >= set(self.needed) and len(keys & set(self.together)) in (0, len(self.together))
        return has_all and all(map(self.has_name, keys))

    def has_name(self, key: str) -> bool:
        """Whether a tensor of this network, of any size, may have that name."""
        return re.fullmatch(rf'({self.layers})\.(weight|bias)|{self.tensors}', key) is not None

    def construct(self, **arguments: Any) -> nn.Module:
        """The network with these arguments.

        Raises:
            InputError: BasicSR is not installed.
        """
        import_basicsr(f'{self.name}, a network of BasicSR,')
        network: nn.Module = getattr(import_module(f'basicsr.archs.{self.module}'), self.name)(**arguments)
        return network


SWINIR_BLOCK = r'layers\.\d+\.residual_group\.blocks\.\d+'
STOCK_NETWORKS = (
    StockNetwork(
        'SwinIR',
        'swinir_arch',
        _swinir,
        (
            'conv_first.weight',
            'layers.0.residual_group.blocks.0.attn.relative_position_bias_table',
            'layers.0.residual_group.blocks.0.mlp.fc1.weight',
        ),
        rf'conv_first|patch_embed\.norm|{SWINIR_BLOCK}\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])|'
        r'layers\.\d+\.conv(\.[024])?|norm|conv_after_body(\.[024])?|'
        r'conv_before_upsample\.0|upsample\.[0246]|conv_up[12]|conv_hr|conv_last',
        rf'absolute_pos_embed|{SWINIR_BLOCK}\.(attn_mask|attn\.relative_position_(bias_table|index))',
        ('conv_up1.weight', 'conv_up2.weight'),  # without the latter it is x2, which BasicSR does not have
    ),
    StockNetwork(
        'RRDBNet',
        'rrdbnet_arch',
        _rrdbnet,
        ('conv_first.weight', 'body.0.rdb1.conv1.weight', 'conv_last.weight'),
        r'conv_first|body\.\d+\.rdb[123]\.conv[1-5]|conv_body|conv_up[12]|conv_hr|conv_last',
        together=('conv_up1.weight', 'conv_up2.weight'),
    ),
    StockNetwork(
        'EDSR',
        'edsr_arch',
        _edsr,
        ('conv_first.weight', 'body.0.conv1.weight', 'conv_after_body.weight', 'conv_last.weight'),
        r'conv_first|body\.\d+\.conv[12]|conv_after_body|upsample\.[0246]|conv_last',
    ),
    StockNetwork(
        'RCAN',
        'rcan_arch',
        _rcan,
        ('conv_first.weight', 'body.0.residual_group.0.rcab.3.attention.1.weight', 'conv_last.weight'),
        r'conv_first|body\.\d+\.(conv|residual_group\.\d+\.rcab\.([02]|3\.attention\.[13]))|'
        r'conv_after_body|upsample\.[0246]|conv_last',
    ),
    StockNetwork(
        'MSRResNet',
        'srresnet_arch',
        _msrresnet,
        ('conv_first.weight', 'body.0.conv1.weight', 'upconv1.weight', 'conv_last.weight'),
        r'conv_first|body\.\d+\.conv[12]|upconv[12]|conv_hr|conv_last',
    ),
    StockNetwork(
        'SRVGGNetCompact', 'srvgg_arch', _srvggnet, ('body.0.weight', 'body.0.bias', 'body.2.weight'), r'body\.\d+'
    ),
    StockNetwork(
        'RIDNet',
        'ridnet_arch',
        _ridnet,
        ('sub_mean.weight', 'head.weight', 'body.0.merge.aggregation.0.weight', 'tail.weight'),
        r'sub_mean|add_mean|head|tail|body\.\d+\.(merge\.(dilation[12]\.[02]|aggregation\.0)|'
        r'block1\.conv[12]|block2\.body\.[024]|ca\.attention\.[13])',
    ),
    StockNetwork(
        'ECBSR',
        'ecbsr_arch',
        _ecbsr,
        ('backbone.0.conv3x3.weight', 'backbone.1.conv3x3.weight', 'backbone.0.conv1x1_3x3.k0'),
        r'backbone\.\d+\.conv3x3',
        r'backbone\.\d+\.(act\.weight|conv1x1_3x3\.[kb][01]|conv1x1_(sbx|sby|lpl)\.(k0|b0|scale|bias|mask))',
    ),
)
