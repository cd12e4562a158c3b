"""The blocks that a network is made of: those that are compiled, or computed twice to save memory."""

import pytest
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.swinir_arch import SwinIR
from torch import nn

from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.layout import repeated_blocks
from lora_sr.archs.lkdn import LKDN, LKDN_S
from lora_sr.archs.span import SPAN


@pytest.mark.parametrize(
    ('make', 'count', 'kind'),
    [
        (lambda: SPAN(feature_channels=6), 6, 'SPAB'),
        (lambda: DSCLoRA(feature_channels=6), 6, 'SPAB'),
        (lambda: LKDN(num_feat=8, num_atten=8, num_block=3, upscale=2), 3, 'LKDB'),
        (lambda: LKDN_S(num_feat=6, num_atten=6, num_block=2, upscale=2), 2, 'LKDB'),
        (lambda: EDSR(3, 3, num_feat=4, num_block=8), 8, 'ResidualBlockNoBN'),
        (lambda: RRDBNet(3, 3, num_feat=4, num_block=2, num_grow_ch=2), 6, 'ResidualDenseBlock'),
        (lambda: RCAN(3, 3, num_feat=4, num_group=2, num_block=3, squeeze_factor=2), 6, 'RCAB'),
        (lambda: SwinIR(img_size=8, embed_dim=4, depths=[2, 2], num_heads=[2, 2], window_size=4), 4,
         'SwinTransformerBlock'),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), 0, None),
    ],
)  # fmt: skip
def test_blocks(make, count, kind):
    blocks = repeated_blocks(make())
    assert [type(block).__name__ for block in blocks] == [kind] * count
