"""Folding: each branched block against float64 references written here, its border, and what may not be folded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_sr.adapters import LoRAConfig, add_lora
from lora_sr.archs import fold, is_training_form
from lora_sr.archs.lkdn import BSConvU, BSConvU_rep, RepUpsampler
from lora_sr.archs.reparam import Foldable
from lora_sr.archs.span import Conv3XC
from lora_sr.errors import InputError

CHANNELS, OUT, SCALE = 5, 2, 2


def framed(x, bias):
    """``x`` in a frame, one pixel wide, of ``bias``: what the authors' code writes over the zeros it padded with."""
    frame = bias[:, None, None].expand(len(x), -1, x.shape[2] + 2, x.shape[3] + 2).clone()
    frame[:, :, 1:-1, 1:-1] = x
    return frame


def reference_bsconvu_rep(p, x):
    x = F.conv2d(x, p['pw.weight']) + x
    depthwise = F.conv2d(x, p['dw.weight'], p['dw.bias'], padding=1, groups=CHANNELS)
    return depthwise + x + F.conv2d(x, p['rep1x1.weight'], p['rep1x1.bias'], groups=CHANNELS)


def reference_rep_upsampler(p, x):
    wide = framed(F.conv2d(x, p['conv1x1.weight'], p['conv1x1.bias']), p['conv1x1.bias'])
    wide = F.conv2d(wide, p['conv3x3.weight'], p['conv3x3.bias'])
    three = F.conv2d(x, p['conv3.weight'], p['conv3.bias'], padding=1)
    return F.pixel_shuffle(wide + three + F.conv2d(x, p['conv1.weight'], p['conv1.bias']), SCALE)


def reference_conv3xc(p, x):
    inner = framed(F.conv2d(x, p['conv.0.weight'], p['conv.0.bias']), p['conv.0.bias'])
    inner = F.conv2d(inner, p['conv.1.weight'], p['conv.1.bias'])
    return F.conv2d(inner, p['conv.2.weight'], p['conv.2.bias']) + F.conv2d(x, p['sk.weight'], p['sk.bias'])


BLOCKS = {
    'BSConvU_rep': (lambda: BSConvU_rep(CHANNELS, CHANNELS), reference_bsconvu_rep),
    'RepUpsampler': (lambda: RepUpsampler(CHANNELS, OUT, SCALE), reference_rep_upsampler),
    'Conv3XC': (lambda: Conv3XC(CHANNELS, CHANNELS), reference_conv3xc),
}
each_block = pytest.mark.parametrize('name', BLOCKS)


def make_block(name, bias_factor=10.0):
    """A block with random weights and large biases, so that a border that is treated wrongly shows."""
    torch.manual_seed(0)
    block = BLOCKS[name][0]()
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            parameter.mul_(bias_factor if key.endswith('bias') else 1)
    return block


def border(x, width):
    inside = torch.zeros(x.shape[2:], dtype=torch.bool)
    inside[width:-width, width:-width] = True
    return x[:, :, ~inside]


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


@torch.no_grad()
@each_block
def test_folded_equals_the_reference_and_so_does_its_border(name):
    block = make_block(name)
    parameters = {key: value.double() for key, value in block.state_dict().items()}
    x = torch.rand(2, CHANNELS, 6, 9, dtype=torch.float64)
    expected = BLOCKS[name][1](parameters, x)
    folded = fold(copy.deepcopy(block)).double()
    width = SCALE if name == 'RepUpsampler' else 1
    # In float32 only the weights are rounded; in float64 nothing is.
    assert relative(expected, block.double().train()(x)) <= 1e-12
    assert relative(expected, block.eval()(x)) <= 1e-12
    assert relative(expected, folded(x)) <= 1e-6
    assert relative(border(expected, width), border(folded(x), width)) <= 1e-6
    assert relative(expected, fold(block)(x)) <= 1e-12


@each_block
@pytest.mark.parametrize('with_lora', [False, True])
@pytest.mark.parametrize('trains_folded', [True, False])
def test_gradients_of_training_are_those_of_the_reference(name, with_lora, trains_folded, monkeypatch):
    """By the folded kernels or branch by branch: what trains gets the same, also through LoRA on the branches."""
    monkeypatch.setattr(Foldable, 'trains_folded', trains_folded)
    block = make_block(name).double()
    if with_lora:
        block = add_lora(block, LoRAConfig([r'conv1x1|conv3x3|rep1x1|dw|conv\.1|sk'], rank=2)).double()
        with torch.no_grad():
            for layer in (value for key, value in block.named_parameters() if 'lora_B' in key):
                layer.normal_(std=0.1)
    x = torch.rand(2, CHANNELS, 6, 9, dtype=torch.float64, requires_grad=True)
    trained = {key: value for key, value in block.named_parameters() if value.requires_grad}
    layers = [(key, layer) for key, layer in block.named_modules() if isinstance(layer, nn.Conv2d)]
    weights = {f'{key}.{kind}': getattr(layer, kind) for key, layer in layers for kind in ('weight', 'bias')}
    expected = BLOCKS[name][1](weights, x)
    towards = torch.rand_like(expected)
    wanted = torch.autograd.grad((expected * towards).sum(), [x, *trained.values()])
    output = block(x)
    got = torch.autograd.grad((output * towards).sum(), [x, *trained.values()])
    for value, reference in zip((output, *got), (expected, *wanted)):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-11)


def first_layer(block):
    return next((name, module) for name, module in block.named_modules() if isinstance(module, nn.Conv2d))


@each_block
@pytest.mark.parametrize('kind', ['forward', 'forward_pre', 'full_backward'])
def test_a_hook_on_a_branch_is_called(name, kind):
    block = make_block(name)
    x = torch.rand(2, CHANNELS, 6, 9, requires_grad=True)
    expected = block(x)
    seen = []
    hook = getattr(first_layer(block)[1], f'register_{kind}_hook')(lambda *_: seen.append(kind))
    output = block(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.sum().backward()
    hook.remove()
    block(x).sum().backward()
    assert seen == [kind]


@each_block
def test_a_layer_of_another_library_computes_by_itself(name):
    class Scaled(nn.Conv2d):
        """Of which the weight alone does not tell what it computes, as of PEFT's."""

        def forward(self, x):
            return 2 * super().forward(x)

    block = make_block(name)
    first_layer(block)[1].__class__ = Scaled
    x = torch.rand(2, CHANNELS, 6, 9)
    torch.testing.assert_close(block(x), block.eval()(x), rtol=0, atol=0)


@each_block
@pytest.mark.parametrize(
    ('of_weights', 'of_images'),
    [
        (torch.contiguous_format, torch.contiguous_format),
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.channels_last),
    ],
)
def test_the_memory_format_is_that_of_branches(name, of_weights, of_images, monkeypatch):
    block = make_block(name).to(memory_format=of_weights)
    x = torch.rand(2, CHANNELS, 6, 9).contiguous(memory_format=of_images)
    strides = []
    for trains_folded in (True, False):
        monkeypatch.setattr(Foldable, 'trains_folded', trains_folded)
        strides.append(block(x).stride())
    assert strides[0] == strides[1]


@each_block
@pytest.mark.parametrize('with_lora', [False, True])
def test_replicas_of_data_parallel(name, with_lora):
    """They have their weights as attributes, and no parameters."""
    block = make_block(name)
    if with_lora:
        block = add_lora(block, LoRAConfig([r'conv3x3|dw|conv\.1'], rank=2))
    replica: nn.Module = block
    for path, module in block.named_modules():
        copied = module._replicate_for_data_parallel()
        for key, value in module._parameters.items():
            copied.__dict__[key if value is None or not hasattr(type(module), key) else f'_base_{key}'] = value
        if path == '':
            replica = copied
        else:
            parent, _, child = path.rpartition('.')
            replica.get_submodule(parent)._modules[child] = copied
    assert not list(replica.parameters())
    x = torch.rand(2, CHANNELS, 6, 9)
    assert torch.equal(replica(x), block(x))


@each_block
def test_shapes_are_told_without_data(name):
    x = torch.rand(2, CHANNELS, 6, 9)
    block = make_block(name)
    assert copy.deepcopy(block).to('meta')(x.to('meta')).shape == block(x).shape


@each_block
def test_mixed_precision_adds_the_branches_up_in_float32(name, monkeypatch):
    """To the bit; so its error is that of the folded form, and smaller than that of branches that each round."""
    block = make_block(name)
    x = torch.rand(2, CHANNELS, 6, 9)
    expected = BLOCKS[name][1](dict(block.state_dict()), x)
    errors = []
    for trains_folded in (True, False):
        monkeypatch.setattr(Foldable, 'trains_folded', trains_folded)
        with torch.autocast('cpu', torch.bfloat16):
            errors.append(relative(expected, block(x).float()))
    with torch.autocast('cpu', torch.bfloat16):
        of_folded = relative(expected, fold(copy.deepcopy(block))(x).float())
    assert errors[0] <= 1.01 * of_folded and errors[0] < errors[1]
    monkeypatch.setattr(Foldable, 'trains_folded', True)
    convolve, given = type(block).convolve, []
    monkeypatch.setattr(
        type(block), 'convolve', lambda self, x, *kernels: [given.append(kernels), convolve(self, x, *kernels)][1]
    )
    with torch.autocast('cpu', torch.bfloat16):
        block(x)
    assert all(torch.equal(kernel, exact) for kernel, exact in zip(given[0], block.kernels()))


@torch.no_grad()
@each_block
def test_impulses_give_the_folded_kernel(name):
    block = make_block(name).double()
    parameters = copy.deepcopy(block.state_dict())
    impulses = torch.zeros(CHANNELS, CHANNELS, 7, 7, dtype=torch.float64)
    impulses[range(CHANNELS), range(CHANNELS), 3, 3] = 1
    # The response to an impulse in channel i is column i of the kernel, mirrored; without one there is the bias alone.
    reference = BLOCKS[name][1]
    nothing = reference(parameters, torch.zeros_like(impulses))
    response = reference(parameters, impulses) - nothing
    if name == 'RepUpsampler':
        response, nothing = F.pixel_unshuffle(response, SCALE), F.pixel_unshuffle(nothing, SCALE)
    kernel = response[:, :, 2:5, 2:5].flip(2, 3).transpose(0, 1)
    assert border(response, 2).abs().max() <= 1e-12  # the kernel is 3x3, no larger
    assert (
        nothing - nothing[:1, :, 3:4, 3:4]
    ).abs().max() <= 1e-12  # as at the border, so one convolution can equal it

    folded = fold(block)
    if name == 'BSConvU_rep':
        weight = folded.dw.weight * folded.pw.weight[:, :, 0, 0][:, :, None, None]
        bias = folded.dw.bias
    else:
        layer = folded[0] if name == 'RepUpsampler' else folded.eval_conv
        weight, bias = layer.weight, layer.bias
    torch.testing.assert_close(weight, kernel, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias, nothing[0, :, 3, 3], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_zeros_around_the_inner_features_would_not_fold():
    """The border test above has teeth: with zeros padded between the two layers the border is far off."""
    block = make_block('RepUpsampler').double()
    x = torch.rand(1, CHANNELS, 6, 9, dtype=torch.float64)
    naive = F.conv2d(block.conv1x1(x), block.conv3x3.weight, block.conv3x3.bias, padding=1)
    naive = F.pixel_shuffle(naive + block.conv1(x) + block.conv3(x), SCALE)
    folded = fold(block)(x)
    assert relative(folded[:, :, SCALE:-SCALE, SCALE:-SCALE], naive[:, :, SCALE:-SCALE, SCALE:-SCALE]) <= 1e-12
    assert relative(border(folded, SCALE), border(naive, SCALE)) > 0.1


@torch.no_grad()
@each_block
def test_zero_weights_fold(name):
    block = BLOCKS[name][0]()
    for parameter in block.parameters():
        parameter.zero_()
    x = torch.rand(1, CHANNELS, 6, 9)
    expected = block(x)
    assert torch.equal(fold(block)(x), expected)


def network_of_all_blocks():
    torch.manual_seed(0)
    nested = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), BSConvU_rep(CHANNELS, CHANNELS), nn.GELU())
    return nn.Sequential(nested, Conv3XC(CHANNELS, CHANNELS), RepUpsampler(CHANNELS, OUT, SCALE)).eval()


@torch.no_grad()
def test_blocks_are_found_at_any_depth_and_replaced():
    network = network_of_all_blocks()
    x = torch.rand(1, 3, 8, 8)
    expected = network(x)
    assert is_training_form(network)
    assert fold(network) is network and not is_training_form(network)
    assert type(network[0][1]) is BSConvU and type(network[2]) is nn.Sequential
    assert not hasattr(network[1], 'sk') and not network[0][1].training
    assert relative(expected, network(x)) <= 1e-5
    state = copy.deepcopy(network.state_dict())
    assert fold(network).state_dict().keys() == state.keys()  # a second time there is nothing to do
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@torch.no_grad()
def test_a_block_that_stands_in_two_places_is_folded_in_both():
    block = make_block('BSConvU_rep')
    network = nn.Sequential(block, nn.GELU(), block)
    x = torch.rand(1, CHANNELS, 8, 8)
    expected = network(x)
    fold(network)
    assert network[0] is network[2] and type(network[0]) is BSConvU
    assert relative(expected, network(x)) <= 1e-5


def test_what_was_frozen_stays_frozen():
    network = network_of_all_blocks()
    network[0].requires_grad_(False)
    fold(network)
    trains = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trains == {'1.eval_conv.weight', '1.eval_conv.bias', '2.0.weight', '2.0.bias'}


@torch.no_grad()
@pytest.mark.parametrize(
    'values', [{'0.1.dw.weight': float('nan')}, {'2.conv1x1.weight': 1e30, '2.conv3x3.weight': 1e30}]
)
def test_what_float32_cannot_hold_is_refused_and_nothing_is_changed(values):
    network = network_of_all_blocks()
    for name, value in values.items():
        network.get_parameter(name).fill_(value)
    modules = list(network.modules())
    state = copy.deepcopy(network.state_dict())
    place = r'0\.1 \(BSConvU_rep\)' if '0.1.dw.weight' in values else r'2 \(RepUpsampler\)'
    with pytest.raises(InputError, match=f'The folded {place} differs .* too large for float32, or NaN'):
        fold(network)
    assert list(network.modules()) == modules
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_is_folded_in_float32_first(dtype):
    network = network_of_all_blocks().to(getattr(torch, dtype))
    modules = list(network.modules())
    with pytest.raises(
        InputError, match=rf'^0\.1 \(BSConvU_rep\) is in {dtype}, .*: fold the network in float32 first'
    ):
        fold(network)
    assert list(network.modules()) == modules
    assert not is_training_form(fold(network.float()))


@pytest.mark.parametrize(
    'target, message',
    [
        (r'0\.1\.rep1x1', r'0\.1 \(BSConvU_rep\)'),
        (r'1\.conv\.1', r'1 \(Conv3XC\)'),
        (r'2\.conv1x1', r'2 \(RepUpsampler\)'),
    ],
)
def test_lora_on_a_branch_has_to_be_merged_first(target, message):
    network = add_lora(network_of_all_blocks(), LoRAConfig([target], rank=2))
    modules = list(network.modules())
    with pytest.raises(InputError, match=f'A branch of {message} carries LoRA: merge the LoRA before'):
        fold(network)
    assert list(network.modules()) == modules


def test_a_folded_form_that_differs_is_refused():
    class Wrong(Foldable):
        in_channels = 1

        def branches(self, x):
            return x

        def folded(self):
            return nn.AvgPool2d(1, divisor_override=2)

    with pytest.raises(InputError, match='The folded Wrong differs from its branches by 5.0e-01'):
        fold(Wrong())
