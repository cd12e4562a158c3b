"""BasicSR's own networks from a checkpoint alone: against the networks that BasicSR builds from their arguments."""

import numpy as np
import pytest
import torch
from basicsr.archs.ecbsr_arch import ECBSR
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.ridnet_arch import RIDNet
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, is_lora_key, lora_layers
from lora_sr.archs.complexity import count_multi_adds
from lora_sr.checkpoints.families import FAMILIES, family_of
from lora_sr.errors import InputError
from lora_sr.report.comparison import super_resolve

SWINIR = {
    'img_size': 16,
    'embed_dim': 12,
    'depths': [2, 1],
    'num_heads': [2, 3],
    'window_size': 8,
    'mlp_ratio': 2.0,
    'upscale': 2,
}
SWINIR_TABLE = 'residual_group.blocks.0.attn.relative_position_bias_table'


def swinir(**arguments):
    return SwinIR, {**SWINIR, **arguments}


def case(arch, **arguments):
    return arch, arguments


CASES = [
    swinir(upsampler='pixelshuffle', upscale=4),
    swinir(upsampler='pixelshuffle', upscale=3, qkv_bias=False, patch_norm=False, img_size=(16, 40)),
    swinir(upsampler='pixelshuffle', upscale=8, resi_connection='3conv', depths=[1, 2, 4], num_heads=[1, 6, 4]),
    swinir(upsampler='pixelshuffle', upscale=1, img_size=(40, 16)),
    swinir(upsampler='pixelshuffledirect', upscale=2, window_size=7, img_size=21, mlp_ratio=1.5),
    swinir(upsampler='pixelshuffledirect', upscale=3, window_size=4, in_chans=1),
    swinir(upsampler='pixelshuffledirect', upscale=4, img_size=8),
    swinir(upsampler='nearest+conv', upscale=4, resi_connection='3conv'),
    swinir(upsampler='nearest+conv', upscale=4, window_size=2, img_size=4, ape=True, in_chans=1),
    swinir(upsampler='', upscale=1, window_size=7, img_size=14, img_range=255.0),
    swinir(upsampler='', upscale=1, window_size=7, img_size=14, img_range=255.0, in_chans=1),
    swinir(upsampler='', upscale=1, ape=True),
    swinir(upsampler='', upscale=1, ape=True, img_size=(16, 24), in_chans=1),
    case(RRDBNet, num_in_ch=3, num_out_ch=3, scale=4, num_feat=8, num_block=3, num_grow_ch=4),
    case(RRDBNet, num_in_ch=3, num_out_ch=3, scale=2, num_feat=6, num_block=1, num_grow_ch=6),
    case(RRDBNet, num_in_ch=3, num_out_ch=3, scale=1, num_feat=8, num_block=2, num_grow_ch=2),
    case(RRDBNet, num_in_ch=1, num_out_ch=1, scale=4, num_feat=8, num_block=2, num_grow_ch=4),
    case(RRDBNet, num_in_ch=1, num_out_ch=1, scale=1, num_feat=8, num_block=2, num_grow_ch=4),
    *(case(EDSR, num_in_ch=3, num_out_ch=3, num_feat=8, num_block=2, upscale=upscale) for upscale in (2, 3, 4, 8)),
    case(EDSR, num_in_ch=3, num_out_ch=3, num_feat=256, num_block=1, upscale=2, res_scale=0.1),
    case(RCAN, num_in_ch=3, num_out_ch=3, num_feat=16, num_group=2, num_block=3, squeeze_factor=4, upscale=4),
    case(RCAN, num_in_ch=3, num_out_ch=3, num_feat=12, num_group=1, num_block=11, squeeze_factor=6, upscale=3),
    case(RCAN, num_in_ch=3, num_out_ch=3, num_feat=16, num_group=3, num_block=1, upscale=2),
    *(case(MSRResNet, num_feat=8, num_block=block, upscale=upscale) for upscale, block in ((2, 1), (3, 11), (4, 2))),
    case(MSRResNet, num_in_ch=1, num_out_ch=1, num_feat=6, num_block=2, upscale=4),
    *(case(SRVGGNetCompact, num_feat=8, num_conv=convs, upscale=x) for x, convs in ((1, 2), (2, 1), (3, 12), (4, 3))),
    case(SRVGGNetCompact, num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=2, upscale=4, act_type='relu'),
    case(RIDNet, in_channels=3, mid_channels=16, out_channels=3, num_block=2),
    case(RIDNet, in_channels=3, mid_channels=32, out_channels=3, num_block=1, img_range=1.0, rgb_mean=(0.5, 0.4, 0.3)),
    case(ECBSR, num_in_ch=3, num_out_ch=3, num_block=2, num_channel=8, with_idt=False, act_type='prelu', scale=4),
    case(ECBSR, num_in_ch=1, num_out_ch=1, num_block=1, num_channel=6, with_idt=False, act_type='relu', scale=3),
]


def name_of(value):
    return value.__name__ if isinstance(value, type) else ' '.join(f'{key}={item}' for key, item in value.items())


each_case = pytest.mark.parametrize('arch, arguments', CASES, ids=name_of)
# One of each network, for RGB images.
SMALL = [CASES[4], *(next(case for case in CASES if case[0] is arch) for arch in dict(CASES) if arch is not SwinIR)]
each_network = pytest.mark.parametrize('arch, arguments', SMALL, ids=lambda v: v.__name__ if type(v) is type else '')


def random_network(arch, arguments):
    """A network none of whose tensors has the value that it starts with."""
    torch.manual_seed(0)
    network = arch(**arguments).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.endswith('.mask'):  # ECBSR's Sobel and Laplace filters
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


def random_image(network, arguments):
    """An image that the stock network takes: for SwinIR of the size that it was built for."""
    size = arguments.get('img_size', (12, 20))
    height, width = size if isinstance(size, tuple) else (size, size)
    channels = arguments.get('in_chans', arguments.get('num_in_ch', 3))
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(1))


def hyperparameters(network):
    """What a network and each of its modules keeps of its arguments, and how they describe themselves."""
    plain = (bool, int, float, str, tuple, list)
    kept = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        for name, module in network.named_modules()
    }
    return kept, repr(network)


def load(state, folder):
    torch.save({'params': state}, folder / 'net.pth')
    return load_network(folder / 'net.pth')


@torch.no_grad()
@each_case
def test_a_checkpoint_tells_the_network(tmp_path, arch, arguments):
    network = random_network(arch, arguments)
    loaded = load(network.state_dict(), tmp_path)
    assert type(loaded) is arch and not loaded.training
    if arch is not RIDNet:  # whose range and mean are weights, so that any other do
        assert hyperparameters(loaded) == hyperparameters(network)
    image = random_image(network, arguments)
    expected = network(image)
    assert expected.std() > 1e-3 and torch.equal(loaded(image), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    'arguments',
    [
        {'img_size': 8, 'window_size': 16},  # becomes a window of 8, which is not shifted
        {'depths': [1, 1]},  # nothing is shifted: no mask tells of the size
        {'embed_dim': 22, 'num_heads': [2, 11], 'mlp_ratio': 0.7},  # 15 channels, which are not int(22 * (15 / 22))
        {'drop_path_rate': 0.5, 'drop_rate': 0.5, 'attn_drop_rate': 0.5},  # of training alone
        {'img_size': 32, 'patch_size': 2},
    ],
    ids=name_of,
)
def test_swinir_with_other_arguments_that_come_to_the_same(tmp_path, arguments):
    network = random_network(*swinir(upsampler='pixelshuffledirect', upscale=2, **arguments))
    loaded = load(network.state_dict(), tmp_path)
    for size in ((16, 16), (32, 8)):
        image = torch.rand(1, 3, *size)
        assert torch.equal(loaded(image), network(image))


@torch.no_grad()
@each_network
def test_an_adapted_checkpoint_tells_the_network_too(tmp_path, arch, arguments):
    network = random_network(arch, arguments)
    image = random_image(network, arguments)
    plain = network(image)
    also_train = ['bias', 'norm', 'position'] if arch is SwinIR else ['bias']
    add_lora(network, LoRAConfig(groups=['all'], rank=2, alpha=3, also_train=also_train))
    assert type(network).__name__ == arch.__name__
    for name, parameter in network.named_parameters():
        if is_lora_key(name):
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted = network(image)
    assert not torch.allclose(adapted, plain, rtol=1e-3)
    loaded = load(network.state_dict(), tmp_path)
    assert isinstance(loaded, arch) and torch.equal(loaded(image), adapted)
    assert [name for name, _ in lora_layers(loaded)] == [name for name, _ in lora_layers(network)]


@pytest.mark.parametrize(
    'arch, arguments, parameters',
    [
        (
            SwinIR,
            {
                'img_size': 64,
                'window_size': 8,
                'depths': [6] * 6,
                'embed_dim': 180,
                'num_heads': [6] * 6,
                'mlp_ratio': 2.0,
                'upsampler': 'pixelshuffle',
                'upscale': 4,
            },
            11_900_199,
        ),
        (RRDBNet, {'num_in_ch': 3, 'num_out_ch': 3}, 16_697_987),
    ],
    ids=['SwinIR classical x4', 'RRDBNet x4'],
)
def test_published_sizes(arch, arguments, parameters):
    network = arch(**arguments)
    state = network.state_dict()
    (build,) = [family.build for family in FAMILIES.values() if family.recognize(state)]
    built = build(state)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
    shapes = {key: value.shape for key, value in built.state_dict().items()}
    assert shapes == {key: value.shape for key, value in state.items()}
    assert hyperparameters(built) == hyperparameters(network)


@each_network
def test_it_runs_on_an_image_of_any_size_and_its_cost_is_counted(tmp_path, arch, arguments):
    network = load(random_network(arch, arguments).state_dict(), tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (23, 19, 3), dtype=np.uint8)
    scale = arguments.get('upscale', arguments.get('scale', 1))
    before = super_resolve(network, image)
    assert before.shape == (23 * scale, 19 * scale, 3)
    assert count_multi_adds(network, 23, 19) > 0
    np.testing.assert_array_equal(super_resolve(network, image), before)


@torch.no_grad()
@pytest.mark.parametrize('arch, arguments', SMALL[:-1], ids=lambda v: v.__name__ if type(v) is type else '')
def test_it_computes_in_float64_and_in_float32_again(tmp_path, arch, arguments):
    network = load(random_network(arch, arguments).state_dict(), tmp_path)
    image = random_image(network, arguments)
    single = network(image)
    double = network.double()(image.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)
    assert torch.equal(network.float()(image), single)


@each_network
def test_a_network_with_more_is_another(arch, arguments):
    state = random_network(arch, arguments).state_dict()
    assert family_of(state) == family_of({**state, 'conv_first.lora_A': torch.zeros(1)}) == arch.__name__
    key = next(key for key in state if key.endswith('weight'))
    for more in (f'{key}_orig', f'{key[: -len("weight")]}gamma', 'more.weight', 'layers.0.more.weight'):
        assert family_of({**state, more: torch.zeros(1)}) is None


@each_network
def test_an_incomplete_checkpoint_is_one_sentence(tmp_path, arch, arguments):
    state = random_network(arch, arguments).state_dict()
    messages = (
        'is incomplete: it lacks',
        f'does not fit {arch.__name__}: ',
        'belongs to no network known here: its first keys are ',
    )
    for key in list(state)[::5]:
        with pytest.raises(InputError) as error:
            load({name: value for name, value in state.items() if name != key}, tmp_path)
        assert any(message in str(error.value) for message in messages) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'arch, key, message',
    [
        (
            SwinIR,
            'layers.1.residual_group.blocks.0.attn.relative_position_bias_table',
            'is incomplete: it lacks {key}.',
        ),
        (SwinIR, 'conv_first.bias', 'does not fit SwinIR: 1 key is missing ({key})'),
        (RRDBNet, 'body.0.rdb2.conv3.weight', 'does not fit RRDBNet: 1 key is missing ({key})'),
        (ECBSR, 'backbone.3.conv3x3.weight', 'is incomplete: it lacks {key}.'),
    ],
)
def test_what_is_lacking_is_told(tmp_path, arch, key, message):
    state = random_network(arch, dict(SMALL)[arch]).state_dict()
    del state[key]
    with pytest.raises(InputError) as error:
        load(state, tmp_path)
    assert str(error.value).endswith(message.format(key=key))


@pytest.mark.parametrize(
    'arch, arguments, message',
    [
        (
            RRDBNet,
            {'num_in_ch': 3, 'num_out_ch': 1, 'num_feat': 8, 'num_block': 1},
            'cannot be used: it is no RRDBNet with as many channels in as out: conv_last gives 1, and conv_first takes '
            '3, which should be 1 for x4, 4 for x2, 16 for x1.',
        ),
        (
            RCAN,
            {'num_in_ch': 4, 'num_out_ch': 3, 'num_feat': 16, 'num_group': 1, 'num_block': 1},
            'cannot be used: it is no RCAN for RGB images: conv_first takes 4 channels, not 3.',
        ),
        (
            EDSR,
            {'num_in_ch': 1, 'num_out_ch': 1, 'num_feat': 8, 'num_block': 1},
            'cannot be used: it is no EDSR for RGB images: conv_first takes 1 channels, not 3.',
        ),
        (
            SRVGGNetCompact,
            {'num_in_ch': 3, 'num_out_ch': 1, 'num_feat': 8, 'num_conv': 1},
            'cannot be used: it is no SRVGGNetCompact with as many channels in as out: it takes 3, and its last '
            'convolution gives 16, which should be 3 times the square of a scale.',
        ),
    ],
)
def test_other_numbers_of_channels_are_refused(tmp_path, arch, arguments, message):
    with pytest.raises(InputError) as error:
        load(arch(**arguments).state_dict(), tmp_path)
    assert str(error.value).endswith(message)
