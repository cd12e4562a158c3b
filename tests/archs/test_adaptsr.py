"""AdaptSR: every network of the registry that takes an image and gives an image."""

import copy

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from lora_sr.adapters import GROUPS, adapted_modules, count_parameters, layer_groups, merge_lora, merge_state_dict
from lora_sr.errors import InputError

SWINIR = {'type': 'SwinIR', 'embed_dim': 12, 'depths': [2], 'num_heads': [2], 'window_size': 4, 'img_size': 8,
          'mlp_ratio': 2, 'upscale': 2, 'upsampler': 'pixelshuffledirect'}  # fmt: skip
SMALL = {
    'DISP': {'feature_channels': 8, 'upscale': 2, 'num_block': 2},
    'DSCFFused': {'feature_channels': 8, 'upscale': 2},
    'ECBSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 2, 'num_channel': 8, 'with_idt': True,
              'act_type': 'prelu', 'scale': 2},
    'EDSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2, 'upscale': 2},
    'HiFaceGAN': {'num_in_ch': 3, 'num_feat': 2, 'use_vae': False, 'z_dim': 8, 'crop_size': 64,
                  'norm_g': 'spectralspadesyncbatch3x3', 'is_train': False},
    'LKDN': {'num_feat': 8, 'num_atten': 8, 'num_block': 2, 'num_in': 2, 'upscale': 2},
    'LKDN_S': {'num_feat': 8, 'num_atten': 8, 'num_block': 2, 'num_in': 2, 'upscale': 2},
    'MSRResNet': {'num_feat': 8, 'num_block': 2, 'upscale': 4},
    'RCAN': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_group': 1, 'num_block': 2, 'squeeze_factor': 4,
             'upscale': 2},
    'RIDNet': {'in_channels': 3, 'mid_channels': 16, 'out_channels': 3, 'num_block': 1},
    'RRDBNet': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4},
    'SPAN': {'feature_channels': 8, 'upscale': 2, 'deploy': True},
    'SPANF': {'feature_channels': 8, 'upscale': 2, 'deploy': True},
    'SPANV2': {'feature_channels': 8, 'upscale': 2},
    'SRVGGNetCompact': {'num_feat': 8, 'num_conv': 2, 'upscale': 2},
    'SwinIR': SWINIR,
}  # fmt: skip
# What takes or gives anything but one image, or is no restoration network.
OTHERS = {'BasicVSR', 'BasicVSRPlusPlus', 'DFDNet', 'DUF', 'EDVR', 'IconVSR', 'TOFlow', 'SpyNet', 'StyleGAN2Generator',
          'StyleGAN2Discriminator', 'HiFaceGANDiscriminator', 'UNetDiscriminatorSN', 'VGGFeatureExtractor',
          'VGGStyleDiscriminator', 'AdaptSR', 'DSCLoRA', 'spandrel'}  # fmt: skip


def adapt(base: dict, **lora) -> nn.Module:
    return build_network({'type': 'AdaptSR', 'base': base, 'lora': {'groups': ['all'], 'rank': 2, **lora}})


def test_no_network_of_the_registry_is_left_out():
    names = {name for name, arch in ARCH_REGISTRY if arch.__module__.split('.')[0] in ('basicsr', 'lora_sr')}
    assert {name.replace('_basicsr', '') for name in names} == SMALL.keys() | OTHERS


@pytest.mark.parametrize('name', SMALL)
def test_one_step_moves_lora_alone_and_merging_keeps_the_output(name):
    torch.manual_seed(0)
    base_section = {'type': name, **SMALL[name]}
    network = adapt(base_section)
    base = build_network(base_section)
    base.load_state_dict({key: value for key, value in network.state_dict().items() if key in base.state_dict()})
    assert type(network) is type(base)
    size = 64 if name == 'HiFaceGAN' else 18  # SwinIR's windows are of 4, RRDBNet x4 takes any
    x, target = torch.rand(2, 3, size, size), None
    network.train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        output = network(x)
        target = torch.rand_like(output) if target is None else target
        optimizer.zero_grad()
        (output - target).abs().mean().backward()
        optimizer.step()
    after = network.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved and all('.lora_' in key for key in moved)
    if name != 'HiFaceGAN':  # which has layers that it does not use
        assert all(f'{layer}.lora_B' in moved for layer, _ in adapted_modules(network))

    with torch.no_grad():
        network.eval()
        adapted = network(x)
        merged = merge_lora(copy.deepcopy(network))
        assert (merged(x) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
        stock = build_network(base_section).eval()
        stock.load_state_dict(merge_state_dict(after))
        if name == 'SwinIR':  # which alone wants whole windows
            padded = nn.functional.pad(x, (0, 2, 0, 2), 'reflect')
            assert torch.equal(stock(padded)[:, :, : 2 * size, : 2 * size], merged(x))
        else:
            assert torch.equal(stock(x), merged(x))


SWINIR_CLASSICAL = {'type': 'SwinIR', 'upscale': 4, 'img_size': 64, 'window_size': 8, 'img_range': 1.0,
                    'depths': [6] * 6, 'embed_dim': 180, 'num_heads': [6] * 6, 'mlp_ratio': 2,
                    'upsampler': 'pixelshuffle', 'resi_connection': '1conv'}  # fmt: skip
RRDB = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 23, 'num_grow_ch': 32}


@pytest.mark.parametrize(
    ('base', 'rank', 'trainable', 'total'),
    [
        (SWINIR_CLASSICAL, 8, 885_168, 11_900_199),
        (RRDB, 8, 4_179_888, 16_697_987),
        (RRDB, 2, 1_044_972, 16_697_987),
    ],
)
def test_published_sizes(base, rank, trainable, total):
    count = count_parameters(adapt(base, rank=rank))
    assert (count.trainable, count.lora, count.total - count.lora) == (trainable, trainable, total)


@pytest.mark.parametrize('base', [SWINIR_CLASSICAL, RRDB], ids=['SwinIR', 'RRDBNet'])
def test_full_size_trains_lora_alone_and_merges(base):
    torch.manual_seed(0)
    network = adapt(base, rank=8)
    x = torch.rand(1, 3, 8, 8)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network(x).square().mean().backward()
    optimizer.step()
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.endswith('.lora_B') for key in moved)  # lora_A follows, since B was zero
    with torch.no_grad():
        adapted = network.eval()(x)
        assert (merge_lora(network)(x) - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def groups_of(name: str, **changes) -> dict:
    """Group -> layers."""
    groups = layer_groups(build_network({'type': name, **SMALL[name], **changes}))
    return {group: [layer for layer, its in groups.items() if its == group] for group in GROUPS}


def test_groups_of_swinir():
    groups = groups_of('SwinIR', upsampler='pixelshuffle')
    block = 'layers.0.residual_group.blocks.{}'
    assert groups == {
        'conv': ['conv_first', 'layers.0.conv', 'conv_after_body'],
        'attention': [f'{block.format(i)}.attn.{layer}' for i in range(2) for layer in ('qkv', 'proj')],
        'mlp': [f'{block.format(i)}.mlp.{layer}' for i in range(2) for layer in ('fc1', 'fc2')],
        'upsampler': ['conv_before_upsample.0', 'upsample.0', 'conv_last'],
    }
    assert groups_of('SwinIR', upsampler='pixelshuffledirect')['upsampler'] == ['upsample.0']
    nearest = groups_of('SwinIR', upsampler='nearest+conv', upscale=4)['upsampler']
    assert nearest == ['conv_before_upsample.0', 'conv_up1', 'conv_up2', 'conv_hr', 'conv_last']


@pytest.mark.parametrize(
    ('name', 'attention', 'upsampler'),
    [
        ('EDSR', [], ['upsample.0', 'conv_last']),
        ('ECBSR', [], ['backbone.3.conv3x3']),
        ('LKDN', ['B1.atten.pointwise', 'B1.atten.depthwise', 'B1.atten.depthwise_dilated',
                  'B2.atten.pointwise', 'B2.atten.depthwise', 'B2.atten.depthwise_dilated'], ['upsampler.0']),
        ('MSRResNet', [], ['upconv1', 'upconv2', 'conv_hr', 'conv_last']),
        ('RCAN', [f'body.0.residual_group.{i}.rcab.3.attention.{j}' for i in range(2) for j in (1, 3)],
         ['upsample.0', 'conv_last']),
        ('RRDBNet', [], ['conv_up1', 'conv_up2', 'conv_hr', 'conv_last']),
        ('SPAN', [], ['upsampler.0']),
        ('SRVGGNetCompact', [], ['body.6']),
    ],
)  # fmt: skip
def test_groups_of_convolutional_networks(name, attention, upsampler):
    groups = groups_of(name)
    assert (groups['attention'], groups['mlp'], groups['upsampler']) == (attention, [], upsampler)
    assert groups['conv'] and not set(groups['conv']) & {*attention, *upsampler}


def test_images_of_any_size():
    network, plain = adapt(SWINIR).eval(), build_network(SWINIR).eval()
    plain.load_state_dict({key: value for key, value in network.state_dict().items() if '.lora_' not in key})
    x = torch.rand(1, 3, 9, 14)
    padded = nn.functional.pad(x, (0, 2, 0, 3), 'reflect')
    with torch.no_grad():
        assert torch.equal(network(x), plain(padded)[:, :, :18, :28])


def test_published_files_of_the_base_load_strictly(shared):
    for folder, section in (
        ('LKDN/LKDN_x4.pth', {'type': 'LKDN', 'upscale': 4}),
        ('SPAN/span_ch28_x4.pth', {'type': 'SPAN', 'feature_channels': 28, 'upscale': 4, 'deploy': True}),
    ):
        path = next((shared / 'weights').rglob(folder.rpartition('/')[2]))
        content = torch.load(path, map_location='cpu', weights_only=True)
        network = adapt(section)
        network.load_state_dict(content.get('params_ema', content.get('params', content)))


class WritesItself(nn.Module):
    """As SPAN's authors have it: in eval mode a frozen layer is written from the branch that trains."""

    def __init__(self):
        super().__init__()
        self.sk = nn.Conv2d(3, 3, 3, padding=1)
        self.eval_conv = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)

    def forward(self, x):
        if self.training:
            return self.sk(x)
        self.eval_conv.weight.data, self.eval_conv.bias.data = self.sk.weight.data, self.sk.bias.data
        return self.eval_conv(x)


@torch.no_grad()
def test_layers_that_the_base_freezes_and_writes_itself_stay_its_own():
    ARCH_REGISTRY.register(WritesItself)
    try:
        network = adapt({'type': 'WritesItself'})
    finally:
        del ARCH_REGISTRY._obj_map['WritesItself']
    assert [name for name, _ in adapted_modules(network)] == ['sk']
    network.sk.lora_B.normal_()
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(network.eval()(x), network.train()(x))


@pytest.mark.parametrize('base', [None, 'SwinIR', {}, {'type': 'Swin'}])
def test_base_that_is_no_network(base):
    with pytest.raises(InputError, match='"base" of AdaptSR has to be the section of a registered network'):
        adapt(base)
