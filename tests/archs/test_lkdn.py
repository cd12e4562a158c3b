"""LKDN: against the authors' outputs and weights, in all its forms, with LoRA and without."""

import copy
import json

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from lora_sr import load_network
from lora_sr.adapters import LoRAConfig, add_lora, count_parameters, lora_layers, mark_trainable, merge_lora
from lora_sr.archs import fold, is_training_form
from lora_sr.archs.lkdn import CONVS, LKDN, UPSAMPLERS, BSConvU, BSConvU_idt
from lora_sr.archs.reparam import Foldable
from lora_sr.checkpoints import Checkpoint
from lora_sr.errors import InputError

OFFICIAL = ['LKDN_x4', 'LKDN-S_x4', 'LKDN-S_del_rep_x4']
SMALL_GOLDENS = [
    ('BSConvU', 'pixelshuffledirect'),
    ('BSConvU_idt', 'pixelshuffledirect'),
    ('BSConvU_rep', 'pixelshuffle_rep'),
]
REP = {'conv': 'BSConvU_rep', 'upsampler': 'pixelshuffle_rep'}
each_form = pytest.mark.parametrize('conv, upsampler', [(c, u) for c in CONVS for u in UPSAMPLERS])
each_depth = pytest.mark.parametrize('num_block', [1, 5, 8])


def golden(shared, name):
    return {key: torch.from_numpy(value) for key, value in np.load(shared / f'golden/networks/{name}.npz').items()}


def small(seed=0, **arguments):
    torch.manual_seed(seed)
    return LKDN(**{'num_feat': 6, 'num_atten': 4, 'num_block': 2, 'num_in': 2, 'upscale': 2, **arguments}).eval()


def with_lora(network, seed=0):
    """LoRA on every convolution of ``network``, with an update that is not zero any more."""
    torch.manual_seed(seed)
    add_lora(network, LoRAConfig(['.*'], rank=2, alpha=4, rank_pattern={'fea_conv.*': 3}))
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.1)
    return network


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize('name', OFFICIAL)
def test_official_weights_give_the_authors_output(shared, name):
    network, truth = load_network(shared / f'weights/LKDN/{name}.pth'), golden(shared, name)
    assert type(network) is LKDN and is_training_form(network) == (name == 'LKDN-S_x4')
    assert (network(truth['lr']) - truth['sr']).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize('conv, upsampler', SMALL_GOLDENS)
def test_every_kind_of_block_gives_the_authors_output(shared, conv, upsampler):
    name = f'lkdns_{conv}_{upsampler}_f12a10_x3'
    network = LKDN(num_feat=12, num_atten=10, num_in=2, num_block=5, upscale=3, conv=conv, upsampler=upsampler)
    network.load_state_dict(Checkpoint.read(shared / f'golden/networks/{name}.pth').state, strict=True)
    truth = golden(shared, name)
    assert (network(truth['lr']) - truth['sr']).abs().max() <= 1e-4
    assert (fold(network)(truth['lr']) - truth['sr']).abs().max() <= 1e-4


@torch.no_grad()
def test_folding_the_official_training_form_gives_the_official_deploy_form(shared):
    network, truth = load_network(shared / 'weights/LKDN/LKDN-S_x4.pth'), golden(shared, 'LKDN-S_del_rep_x4')
    fold(network)
    official = Checkpoint.read(shared / 'weights/LKDN/LKDN-S_del_rep_x4.pth').state
    assert network.state_dict().keys() == official.keys()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, official[key], rtol=1e-4, atol=1e-5)
    assert (network(truth['lr']) - truth['sr']).abs().max() <= 1e-4


def test_parameter_counts_are_the_published_ones(shared):
    published = json.loads((shared / 'reference.json').read_text())['measured_with_official_code']
    for name in OFFICIAL:
        network = load_network(shared / published[name]['weights'])
        assert count_parameters(network).total == published[name]['params']
    folded = fold(load_network(shared / published['LKDN-S_x4']['weights']))
    assert count_parameters(folded).total == published['LKDN-S_del_rep_x4']['params']


def test_presets_are_the_published_networks(shared):
    reference = json.loads((shared / 'reference.json').read_text())
    table = reference['published']['LKDN paper, Table 5 (psnr/ssim on Y)']
    for scale in (2, 3, 4):
        network = build_network({'type': 'LKDN', 'upscale': scale})
        assert round(count_parameters(network).total / 1e3) == table[f'LKDN x{scale}']['params_k']
    official = reference['measured_with_official_code']
    for name, options in (('LKDN-S_x4', REP), ('LKDN-S_del_rep_x4', {})):
        network = build_network({'type': 'LKDN_S', **options})
        assert type(network) is LKDN and network.num_block == 5 and network.c1.weight.shape == (42, 210, 1, 1)
        assert network.B5.atten.pointwise.weight.shape == (42, 42, 1, 1)
        assert count_parameters(network).total == official[name]['params']
    assert 'LKDN_S' in ARCH_REGISTRY


@each_form
@each_depth
def test_training_reaches_every_parameter(conv, upsampler, num_block):
    network = small(num_block=num_block, conv=conv, upsampler=upsampler).train()
    before = copy.deepcopy(network.state_dict())
    output = network(torch.rand(2, 3, 9, 10))
    assert output.shape == (2, 3, 18, 20)
    (output - torch.rand_like(output)).abs().mean().backward()
    torch.optim.SGD(network.parameters(), lr=1.0).step()
    assert not [name for name, p in network.named_parameters() if torch.equal(p, before[name])]


def after_a_step(network):
    """``network`` after a step of training, so that no norm and no bias has the value it starts with."""
    start = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    with torch.enable_grad():
        (network(torch.rand(2, 3, 9, 10)) - 1).abs().mean().backward()
    optimizer.step()
    assert not [name for name, p in network.named_parameters() if torch.equal(p, start[name])]
    return network


@torch.no_grad()
@each_form
@each_depth
def test_folded_is_the_plain_network_with_the_same_output(conv, upsampler, num_block):
    network = after_a_step(small(num_block=num_block, conv=conv, upsampler=upsampler, upscale=3))
    branched = copy.deepcopy(network).double()
    assert is_training_form(network) == (conv == 'BSConvU_rep' or upsampler == 'pixelshuffle_rep')
    assert fold(network) is network
    assert not is_training_form(network)
    assert not any(isinstance(module, Foldable) for module in network.modules())
    refine = BSConvU_idt if conv == 'BSConvU_idt' else BSConvU
    assert all(type(getattr(network, f'B{i + 1}').c2_r) is refine for i in range(num_block))
    plain = small(num_block=num_block, conv=refine.__name__, upscale=3)
    plain.load_state_dict(network.state_dict(), strict=True)

    x = torch.rand(2, 3, 11, 8, dtype=torch.float64)
    expected = branched(x)
    assert relative(expected, plain.double()(x)) <= 1e-5
    assert relative(expected, fold(branched)(x)) <= 1e-12  # without rounding to float32


@torch.no_grad()
@each_form
@pytest.mark.parametrize(
    'sizes',
    [
        {'upscale': 2},
        {'upscale': 3, 'num_feat': 10, 'num_atten': 12, 'num_block': 3},
        {'upscale': 4, 'num_in': 1, 'num_block': 11},
    ],
)
def test_a_checkpoint_tells_size_scale_and_form(tmp_path, conv, upsampler, sizes):
    network = small(seed=1, conv=conv, upsampler=upsampler, **sizes)
    x = torch.rand(1, 3, 9, 11)
    plain = network(x)
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    assert torch.equal(loaded(x), plain) and plain.shape == (1, 3, 9 * sizes['upscale'], 11 * sizes['upscale'])

    with_lora(network)
    torch.save({'params_ema': network.state_dict(), 'params': loaded.state_dict()}, tmp_path / 'adapted.pth')
    adapted = load_network(tmp_path / 'adapted.pth')
    assert torch.equal(adapted(x), network(x)) and not torch.equal(adapted(x), plain)
    ranks = {name: layer.rank for name, layer in lora_layers(network)}
    assert {name: layer.rank for name, layer in lora_layers(adapted)} == ranks


@torch.no_grad()
def test_the_identity_is_remembered_in_our_checkpoints(tmp_path):
    network = small(conv='BSConvU_idt')
    state = network.state_dict()
    authors = {key: value for key, value in state.items() if not key.endswith('.identity')}
    assert authors.keys() == small().state_dict().keys()  # their file does not tell the one from the other
    x = torch.rand(1, 3, 8, 8)
    again = small(seed=1, conv='BSConvU_idt')
    again.load_state_dict(authors, strict=True)
    assert torch.equal(again(x), network(x))
    # So neither is one of ours with BSConvU refused here. Only the other way round a checkpoint of ours is told apart.
    again.load_state_dict(small().state_dict(), strict=True)
    with pytest.raises(RuntimeError, match='Unexpected key.*B1.c1_r.identity'):
        small().load_state_dict(state)
    torch.save(state, tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    assert type(loaded.B2.c3_r) is BSConvU_idt and torch.equal(loaded(x), network(x))


@pytest.mark.parametrize('arguments', [REP, {}, {'conv': 'BSConvU_idt'}], ids=['training form', 'deploy form', 'idt'])
def test_lora_on_every_convolution(arguments):
    network = small(**arguments)
    x = torch.rand(2, 3, 9, 11)
    with torch.no_grad():
        start = network(x)
    base = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    add_lora(network, LoRAConfig(['.*'], rank=2, alpha=4))
    mark_trainable(network)
    assert {name for name, _ in lora_layers(network)} == base
    kinds = {
        (layer.kernel_size, layer.groups > 1, layer.dilation, layer.bias is not None)
        for _, layer in lora_layers(network)
    }
    assert {
        ((1, 1), False, (1, 1), False),  # pw
        ((3, 3), True, (1, 1), True),  # dw
        ((5, 5), True, (3, 3), True),  # depthwise_dilated
        ((1, 1), False, (1, 1), True),  # c1_d
        ((3, 3), False, (1, 1), True),  # upsampler
    } <= kinds
    with torch.no_grad():
        assert torch.equal(network(x), start)

    frozen = {name: p.clone() for name, p in network.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):  # lora_A moves from the second step on, lora_B starts as zero
        optimizer.zero_grad()
        (network(x) - 1).abs().mean().backward()
        optimizer.step()
    assert all(layer.lora_A.grad.any() and layer.lora_B.any() for _, layer in lora_layers(network))
    assert all(torch.equal(dict(network.named_parameters())[name], value) for name, value in frozen.items())

    with torch.no_grad():
        adapted, exact = network(x), copy.deepcopy(network).double()
        assert not torch.equal(adapted, start)
        merge_lora(network)
        assert not any(True for _ in lora_layers(network)) and torch.equal(network(x), adapted)
        fold(network)
        assert not is_training_form(network)
        assert relative(exact(x.double()), network.double()(x.double())) <= 1e-5


def test_lora_on_a_branch_cannot_be_folded_away():
    network = add_lora(small(**REP), LoRAConfig([r'B2\.c3_r\.rep1x1'], rank=1))
    with pytest.raises(InputError, match=r'A branch of B2\.c3_r \(BSConvU_rep\) carries LoRA'):
        fold(network)
    # On a layer that does not fold it may stay.
    network = add_lora(small(**REP), LoRAConfig(['c1', r'.*\.c4\.pw'], rank=1))
    assert not is_training_form(fold(network)) and len(list(lora_layers(network))) == 3


@torch.no_grad()
def test_a_network_inside_another_folds():
    inner = small(**REP)
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(inner), nn.AvgPool2d(2)).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    expected = outer(x)
    assert fold(outer) is outer and outer[1][0] is inner and not is_training_form(outer)
    assert relative(expected, outer(x)) <= 1e-12


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'num_feat': 7}, '"num_feat" of LKDN is 7: it must be even'),
        ({'num_feat': 56.0}, '"num_feat" of LKDN is 56.0: it must be an integer of at least 1'),
        ({'num_block': 0}, '"num_block" of LKDN is 0: it must be an integer of at least 1'),
        ({'upscale': -1}, '"upscale" of LKDN is -1'),
        ({'num_in': 0}, '"num_in" of LKDN is 0'),
        ({'num_in': True}, '"num_in" of LKDN is True: it must be an integer of at least 1'),
        ({'conv': 'BSConv'}, '"conv" of LKDN is \'BSConv\': it must be one of BSConvU, BSConvU_idt, BSConvU_rep'),
        ({'upsampler': 'nearest'}, '"upsampler" of LKDN is \'nearest\': it must be one of pixelshuffledirect, pixel'),
    ],
)
def test_wrong_arguments(arguments, message):
    for name in ('LKDN', 'LKDN_S'):
        with pytest.raises(InputError, match=message):
            ARCH_REGISTRY.get(name)(**arguments)


def test_checkpoints_that_cannot_be_used(tmp_path):
    def message_for(state):
        torch.save(state, tmp_path / 'net.pth')
        with pytest.raises(InputError) as error:
            load_network(tmp_path / 'net.pth')
        return str(error.value)

    state = small().state_dict()
    without_upsampler = {key: value for key, value in state.items() if not key.startswith('upsampler')}
    assert 'belongs to no network known here' in message_for(without_upsampler)
    without_block = {key: value for key, value in state.items() if not key.startswith('B2.c4')}
    assert 'does not fit LKDN: 3 keys are missing (the first is B2.c4.pw.weight)' in message_for(without_block)
    odd = {**state, 'c1.weight': torch.zeros(7, 14, 1, 1)}
    assert 'cannot be used: "num_feat" of LKDN is 7' in message_for(odd)


@pytest.mark.parametrize(
    'arguments, inputs, outputs',
    [
        ({'num_in_ch': 1, 'num_out_ch': 1}, 2, 4),
        ({'num_in_ch': 1, 'num_out_ch': 1, 'num_in': 3}, 3, 4),
        ({'num_in_ch': 1}, 2, 12),
        ({'num_out_ch': 1, 'upscale': 3}, 6, 9),
        ({'num_out_ch': 1, 'upscale': 3, 'upsampler': 'pixelshuffle_rep'}, 6, 9),
        ({'num_out_ch': 2, 'upscale': 3}, 6, 18),
    ],
)
def test_a_network_for_other_images_than_rgb_is_refused(tmp_path, arguments, inputs, outputs):
    torch.save(small(**arguments).state_dict(), tmp_path / 'gray.pth')
    message = f'gray.pth cannot be used: it is no LKDN for RGB images, .* takes {inputs}, .* convolves to {outputs}, '
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / 'gray.pth')
