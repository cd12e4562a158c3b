"""Small networks of every architecture of spandrel, built by its own classes: as few layers as its detection allows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SWIN = {'img_size': 16, 'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'window_size': 8, 'mlp_ratio': 2}
REAL_SWINIR = {**SWIN, 'upsampler': 'nearest+conv', 'upscale': 4}
UNET = {'nc': [4, 8, 12, 16], 'nb': 2}


@dataclass(frozen=True)
class Small:
    """A network of an architecture.

    Args:
        architecture: What spandrel calls it.
        kind: Its class, in that architecture's package.
        arguments: With which it is built.
        family: What it is called here, where a class of BasicSR or of ours is preferred to spandrel's.
        is_slow: Whether its tests take seconds.
        names: What its names are in files: expressions, and what stands for them there.
    """

    architecture: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
    is_slow: bool = False
    names: Sequence[tuple[str, str]] = ()

    def state(self) -> dict[str, torch.Tensor]:
        """Its state dict as files have it."""
        state = self.build().state_dict()
        for own, in_file in self.names:
            state = {re.sub(own, in_file, name): value for name, value in state.items()}
        return state

    def build(self) -> nn.Module:
        """The network in eval mode, with random weights everywhere: zeros and ones would hide mistakes."""
        package = __import__(f'spandrel.architectures.{self.architecture}', fromlist=[self.kind])
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        network: nn.Module = getattr(package, self.kind)(**self.arguments).eval()
        with torch.no_grad():
            for name, value in network.named_parameters():
                if 'sub_mean' not in name and 'add_mean' not in name:
                    value.add_(torch.randn(value.shape, generator=generator), alpha=0.02)
            for name, value in network.named_buffers():
                if name.endswith(('running_mean', 'running_var')):
                    value.add_(torch.rand(value.shape, generator=generator), alpha=0.1)
        return network


SMALL = {
    'ATD': Small(
        'ATD',
        'ATD',
        {
            **SWIN,
            'embed_dim': 16,
            'category_size': 256,
            'num_tokens': 8,
            'upsampler': 'pixelshuffledirect',
            'upscale': 2,
        },
    ),
    'AuraSR': Small(
        'AuraSR',
        'AuraSR',
        dict(
            dim=8,
            image_size=None,
            input_image_size=None,
            init_dim=8,
            style_network={'dim_in': 8, 'dim_out': 32, 'depth': 2},
            up_dim_mults=(1, 1, 1, 1, 1),
            down_dim_mults=(1, 1, 1),
            attn_depths=(1, 1, 1, 1, 1),
            mid_attn_depth=1,
            self_attn_dim_head=4,
            num_conv_kernels=2,
            skip_connect_scale=0.4,
        ),
        is_slow=True,
    ),
    'CRAFT': Small('CRAFT', 'CRAFT', dict(embed_dim=32, depths=[1], num_heads=[2], upscale=2)),
    'Compact-prelu': Small('Compact', 'Compact', dict(num_feat=8, num_conv=2, upscale=2), 'SRVGGNetCompact'),
    'DAT': Small(
        'DAT', 'DAT', dict(img_size=16, embed_dim=32, split_size=[2, 4], depth=[3], num_heads=[2], expansion_factor=2.0)
    ),
    'DAT-light': Small(
        'DAT',
        'DAT',
        dict(
            img_size=16,
            embed_dim=32,
            split_size=[4, 8],
            depth=[1],
            num_heads=[2],
            upsampler='pixelshuffledirect',
            upscale=3,
            resi_connection='3conv',
        ),
    ),
    'DCTLSA': Small('DCTLSA', 'DCTLSA', dict(nf=10, upscale=2)),
    'DITN': Small('DITN', 'DITN', dict(dim=8, ITL_blocks=1, SAL_blocks=1, UFONE_blocks=1, upscale=2)),
    'DRCT': Small(
        'DRCT',
        'DRCT',
        dict(embed_dim=12, depths=[1], num_heads=[2], window_size=16, upsampler='pixelshuffle', upscale=2, gc=4),
    ),
    'DRUNet': Small('DRUNet', 'DRUNet', {'in_nc': 4, 'out_nc': 3, **UNET}),
    'DnCNN': Small('DnCNN', 'DnCNN', dict(in_nc=3, out_nc=3, nc=8, nb=10, act_mode='R')),
    'DnCNN-batch-norm': Small('DnCNN', 'DnCNN', dict(in_nc=1, out_nc=1, nc=8, nb=5)),
    'FDnCNN': Small('DnCNN', 'DnCNN', dict(in_nc=4, out_nc=3, nc=8, nb=10, act_mode='R', mode='FDnCNN')),
    'ESRGAN-x1': Small('ESRGAN', 'ESRGAN', dict(num_filters=8, num_blocks=1, scale=1)),
    'ESRGAN-x2': Small('ESRGAN', 'ESRGAN', dict(num_filters=8, num_blocks=1, scale=2)),
    'ESRGAN-x8': Small('ESRGAN', 'ESRGAN', dict(num_filters=8, num_blocks=1, scale=8)),
    'ESRGAN+': Small('ESRGAN', 'ESRGAN', dict(num_filters=8, num_blocks=1, scale=4, plus=True)),
    'ESRGAN': Small('ESRGAN', 'ESRGAN', dict(num_filters=8, num_blocks=1, scale=4), 'RRDBNet'),
    'FBCNN': Small('FBCNN', 'FBCNN', dict(nc=[4, 4, 4, 512], nb=2), is_slow=True),
    'FDAT': Small('FDAT', 'FDAT', dict(embed_dim=16, num_groups=1, depth_per_group=2, num_heads=2, scale=2, mid_dim=8)),
    'FFTformer': Small('FFTformer', 'FFTformer', dict(dim=8, num_blocks=[1, 1, 1], num_refinement_blocks=1)),
    'GRL': Small(
        'GRL',
        'GRL',
        dict(
            embed_dim=8,
            depths=[2],
            num_heads_window=[2],
            num_heads_stripe=[2],
            upsampler='pixelshuffledirect',
            upscale=2,
            mlp_ratio=2,
        ),
        is_slow=True,
    ),
    'HAT': Small(
        'HAT',
        'HAT',
        {
            **SWIN,
            'depths': (2,),
            'num_heads': (2,),
            'compress_ratio': 2,
            'squeeze_factor': 4,
            'upscale': 2,
            'num_feat': 8,
        },
    ),
    'HVICIDNet': Small('HVICIDNet', 'HVICIDNet', dict(channels=[4, 4, 8, 8], heads=[1, 2, 2, 2])),
    'IPT': Small('IPT', 'IPT', dict(patch_size=12, n_feats=12, num_layers=1, scale=[2]), is_slow=True),
    'KBNet-s': Small('KBNet', 'KBNet_s', dict(width=4, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1])),
    'KBNet-l': Small(
        'KBNet', 'KBNet_l', dict(dim=24, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, heads=[1, 1, 1, 1])
    ),
    'MMRealSR': Small(
        'MMRealSR',
        'MMRealSR',
        dict(
            num_in_ch=3,
            num_out_ch=3,
            num_feat=8,
            num_block=1,
            num_grow_ch=4,
            num_feats=[8, 8],
            num_blocks=[1, 1],
            downscales=[2, 1],
        ),
    ),
    'MixDehazeNet': Small('MixDehazeNet', 'MixDehazeNet', dict(embed_dims=[8, 16, 32, 16, 8], depths=[1, 1, 1, 1, 1])),
    'MoESR': Small('MoESR', 'MoESR', dict(dim=16, n_blocks=1, n_block=1, scale=2)),
    'MoSR': Small('MoSR', 'MoSR', dict(dim=16, n_block=1, upscale=2)),
    'NAFNet': Small('NAFNet', 'NAFNet', dict(width=4, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])),
    'OmniSR': Small('OmniSR', 'OmniSR', dict(num_feat=8, up_scale=2)),
    'PLKSR': Small('PLKSR', 'PLKSR', dict(dim=16, n_blocks=1, upscaling_factor=2, kernel_size=5)),
    'RealPLKSR': Small('PLKSR', 'RealPLKSR', dict(dim=16, n_blocks=1, upscaling_factor=2, kernel_size=5)),
    'RealPLKSR-dysample': Small(
        'PLKSR',
        'RealPLKSR',
        dict(dim=16, n_blocks=1, upscaling_factor=2, kernel_size=5, dysample=True, layer_norm=True),
    ),
    'RCAN': Small('RCAN', 'RCAN', dict(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4)),
    'RGT': Small('RGT', 'RGT', dict(img_size=16, embed_dim=32, depth=[2], num_heads=[2], mlp_ratio=2.0, upscale=2)),
    'RealCUGAN-x2': Small('RealCUGAN', 'UpCunet2x', is_slow=True),
    'RealCUGAN-x3': Small('RealCUGAN', 'UpCunet3x', is_slow=True),
    'RealCUGAN-x4-pro': Small('RealCUGAN', 'UpCunet4x', dict(pro=True), is_slow=True),
    'RealCUGAN-x2-fast': Small('RealCUGAN', 'UpCunet2x_fast', is_slow=True),
    'RetinexFormer': Small('RetinexFormer', 'RetinexFormer', dict(n_feat=8, stage=1)),
    'SAFMN': Small('SAFMN', 'SAFMN', dict(dim=8, n_blocks=1, upscaling_factor=2)),
    'SAFMNBCIE': Small('SAFMNBCIE', 'SAFMNBCIE', dict(dim=8, n_blocks=1, num_layers=1)),
    'SCUNet': Small('SCUNet', 'SCUNet', dict(config=[1, 1, 1, 1, 1, 1, 1], dim=64), is_slow=True),
    'SPAN': Small('SPAN', 'SPAN', dict(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2), 'SPAN'),
    'SeemoRe': Small(
        'SeemoRe', 'SeemoRe', dict(scale=2, num_experts=2, num_layers=1, embedding_dim=16, lr_space='exp')
    ),
    'SwiftSRGAN': Small('SwiftSRGAN', 'SwiftSRGAN', dict(num_channels=8, num_blocks=1, upscale_factor=2)),
    'Swin2SR': Small('Swin2SR', 'Swin2SR', {**SWIN, 'upsampler': 'pixelshuffledirect', 'upscale': 2}),
    'SwinIR': Small('SwinIR', 'SwinIR', {**SWIN, 'upsampler': 'pixelshuffledirect', 'upscale': 2}, 'SwinIR'),
    'SwinIR-real-x4': Small('SwinIR', 'SwinIR', REAL_SWINIR, 'SwinIR'),
    'SwinIR-real-x2': Small('SwinIR', 'SwinIR', {**REAL_SWINIR, 'upscale': 2}),
    'SwinIR-unshuffle': Small(
        'SwinIR',
        'SwinIR',
        {**REAL_SWINIR, 'window_size': 2, 'start_unshuffle': 2},
        names=[('conv_first\\.', 'conv_first.1.')],
    ),
    'Uformer': Small(
        'Uformer', 'Uformer', dict(embed_dim=8, depths=[1] * 9, num_heads=[1] * 9, mlp_ratio=1.0), is_slow=True
    ),
}
