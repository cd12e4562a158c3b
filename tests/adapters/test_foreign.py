"""Adapters of PEFT, kohya's scripts and LyCORIS: against PEFT's own merging, and against their formulas in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from others import LAYERS, SPAN_FACTORS, SPAN_LAYER, SPAN_STATE, pair, random, write
from safetensors.torch import load_file, save_file
from torch import nn

from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    extract_adapter,
    load_adapter,
    lora_layers,
    merge_adapter,
    merge_lora,
    mix_adapters,
    read_adapter,
)
from lora_sr.checkpoints import AdapterFile, Checkpoint
from lora_sr.errors import InputError

# What PEFT puts beside or in the place of plain LoRA.
PEFT_OPTIONS = {
    'plain': {'r': 4, 'lora_alpha': 6},
    'rank-stabilized': {'r': 4, 'lora_alpha': 6, 'use_rslora': True},
    'patterns': {
        'r': 4,
        'lora_alpha': 6,
        'rank_pattern': {'head': 2, r'body.[01]': 3, '^tail': 1, '^ine': 7},
        'alpha_pattern': {'2': 9, 'able': 5, 'line|volume': 0.5},
    },
    'DoRA': {'r': 4, 'lora_alpha': 6, 'use_dora': True},
    'biases of the layers': {'r': 2, 'bias': 'lora_only'},
    'all biases': {'r': 2, 'bias': 'all'},
    'whole modules': {'r': 2, 'modules_to_save': ['body.3']},
    'LoRA with biases': {'r': 2, 'lora_alpha': 5, 'lora_bias': True, 'target_modules': [*LAYERS[:-2], 'tail']},
    'biases both ways': {
        **{'r': 2, 'lora_alpha': 5, 'lora_bias': True, 'bias': 'lora_only'},
        'target_modules': [*LAYERS[:-2], 'tail'],
    },
    'beyond the full rank': {'r': 40, 'lora_alpha': 3},
}


def with_peft(base, **options):
    """``base`` under PEFT, with updates that have been somewhere."""
    peft = pytest.importorskip('peft')
    network = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{'target_modules': LAYERS, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if 'magnitude' in name:
                value.mul_(1 + noise.abs())
            elif 'lora_' in name:
                value.copy_(noise * 0.3)
            elif value.requires_grad:
                value.add_(noise * 0.1)
    return network.eval()


def difference(state, expected):
    """The largest one, as a share of the largest value of its tensor."""
    assert state.keys() == expected.keys()
    return max(
        ((value.double() - expected[key].double()).abs().max() / expected[key].abs().max().clamp(min=1e-9)).item()
        for key, value in state.items()
    )


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('options', PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
def test_an_adapter_of_peft_gives_what_peft_gives(base, tmp_path, options):
    network = with_peft(base, **options)
    network.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 6, 5)
    with torch.no_grad():
        outputs, before = network(x), base(x)
    merged = network.merge_and_unload().state_dict()
    state = base.state_dict()
    assert difference(merge_adapter(state, read_adapter(tmp_path, state)), merged) <= 1e-6
    assert difference(state, merged) > 0.01
    load_adapter(base, tmp_path / 'adapter_model.safetensors')
    with torch.no_grad():
        assert (base(x) - outputs).abs().max() <= 1e-5 * outputs.abs().max()
    assert (before - outputs).abs().max() > 0.01 * outputs.abs().max()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'options, part',
    [
        ({'use_dora': True}, 'lora_magnitude_vector'),
        ({'lora_bias': True, 'target_modules': [*LAYERS[:-2], 'tail']}, 'lora_B.bias'),
    ],
)
@pytest.mark.parametrize('layer', [None, 'body.1'])
def test_a_part_that_the_configuration_promises_is_missed(base, tmp_path, options, part, layer):
    with_peft(base, r=2, **options).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'adapter_model.safetensors')
    kept = {key: value for key, value in tensors.items() if part not in key or (layer and f'.{layer}.' not in key)}
    assert 0 < len(tensors) - len(kept) == (1 if layer else len(options.get('target_modules', LAYERS)))
    save_file(kept, tmp_path / 'adapter_model.safetensors')
    with pytest.raises(InputError, match=rf'cannot be used: it lacks {part} of the layer {layer or ""}'):
        read_adapter(tmp_path, base.state_dict())
    with pytest.raises(InputError, match=f'it lacks {part} of the layer'):
        AdapterFile.read(tmp_path)


@pytest.mark.filterwarnings('ignore')
def test_a_network_of_peft_is_read_as_its_adapter_is(base, tmp_path):
    """Its state dict has the base and the name of the adapter besides."""
    network = with_peft(base, r=4, lora_alpha=6, modules_to_save=['body.3'], bias='lora_only')
    network.save_pretrained(tmp_path)
    (tmp_path / 'adapter_model.safetensors').unlink()
    torch.save(network.state_dict(), tmp_path / 'adapter_model.bin')
    state = base.state_dict()
    adapter = AdapterFile.read(tmp_path).adapter_for(state, 'base')
    assert adapter.layers == LAYERS
    merged = network.merge_and_unload().state_dict()
    assert difference(merge_adapter(state, adapter), merged) <= 1e-6
    load_adapter(base, adapter)
    assert difference(merge_lora(base).state_dict(), merged) <= 1e-6
    for read in (read_adapter, lambda path: load_adapter(base, path)):
        with pytest.raises(InputError, match='read as a safetensors file: .*; lora_sr.checkpoints.AdapterFile reads'):
            read(tmp_path)


@pytest.mark.filterwarnings('ignore')
def test_groups_of_peft_are_taken_where_a_weight_in_groups_can_hold_them(tmp_path):
    """PEFT itself does not merge them: its outputs are the reference."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, stride=2, groups=8)).eval()
    network = with_peft(base, r=8, lora_alpha=4, target_modules=['0', '1'])
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match='2 of its 2 layers differ: 0 is in 2 groups, across which its update in PEFT'):
        read_adapter(tmp_path, base.state_dict())
    with torch.no_grad():
        for name, groups in (('0', 2), ('1', 8)):
            down = network.get_submodule(f'base_model.model.{name}.lora_A.default').weight
            of_group = torch.arange(down.shape[1]) * groups // down.shape[1]
            down.mul_((torch.arange(8)[:, None] * groups // 8 == of_group)[:, :, None, None])
    network.save_pretrained(tmp_path)
    x = torch.randn(1, 4, 9, 9)
    before = base(x)
    load_adapter(base, tmp_path)
    assert (base(x) - network(x)).abs().max() <= 1e-5 * network(x).abs().max() < 0.01 * (before - base(x)).abs().max()


@pytest.mark.filterwarnings('ignore')
def test_attention_of_peft_is_refused(tmp_path):
    """https://github.com/huggingface/peft/pull/3774: what it computes depends on its version."""
    base = nn.Sequential(nn.MultiheadAttention(8, 2))
    network = with_peft(base, target_modules=['0'])
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match='1 of its 2 layers differ: 0.out_proj counts once or twice in PEFT'):
        read_adapter(tmp_path, base.state_dict())
    nn.init.zeros_(network.base_model.model[0].base_layer.out_proj.lora_B['default'].weight)
    network.save_pretrained(tmp_path)
    state = base.state_dict()
    merged = network.merge_and_unload().state_dict()
    assert difference(merge_adapter(state, read_adapter(tmp_path, state)), merged) <= 1e-6 < difference(state, merged)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('use_dora', [False, True])
def test_matrices_that_are_stored_the_other_way_round(tmp_path, use_dora):
    """As those of GPT-2, whose layer is the one for which PEFT has `fan_in_fan_out`."""
    pytest.importorskip('peft')
    from transformers.pytorch_utils import Conv1D  # which comes with peft

    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(5, 8), Conv1D(5, 5)).eval()
    options = {'r': 2, 'lora_alpha': 3, 'use_dora': use_dora, 'fan_in_fan_out': True, 'target_modules': ['0', '1']}
    network = with_peft(base, **options)
    network.save_pretrained(tmp_path)
    state = base.state_dict()
    merged = network.merge_and_unload().state_dict()
    assert difference(merge_adapter(state, read_adapter(tmp_path, state)), merged) <= 1e-6 < difference(state, merged)


@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'renamed.safetensors'])
def test_a_kernel_stays_lora_of_the_same_rank(tmp_path, name):
    """By the definition, in float64; and our factors are values of theirs, to the bit."""
    path = write(tmp_path, SPAN_FACTORS, {'r': 4, 'lora_alpha': 6, 'use_rslora': True}, name)
    adapter = read_adapter(path, SPAN_STATE)
    assert adapter.layers == ['conv_2.eval_conv'] and adapter.rank_of('conv_2.eval_conv') == 4 and not adapter.deltas
    lora_A, lora_B, alpha = adapter.update_of('conv_2.eval_conv')
    assert (lora_A.shape, lora_B.shape) == ((12, 78), (78, 12))
    assert set(lora_A.flatten().tolist()) == set(SPAN_FACTORS[f'{SPAN_LAYER}lora_A.weight'].flatten().tolist())
    down, up = (value.double() for value in SPAN_FACTORS.values())
    update = 6 / math.sqrt(4) * torch.einsum('oj,jiyx->oiyx', up[:, :, 0, 0], down)
    merged = merge_adapter(SPAN_STATE, adapter)
    expected = {**SPAN_STATE, 'conv_2.eval_conv.weight': SPAN_STATE['conv_2.eval_conv.weight'].double() + update}
    assert difference(merged, expected) <= 1e-6


def test_without_its_configuration_a_file_is_shown_and_not_put_on(tmp_path):
    file = AdapterFile.read(write(tmp_path, SPAN_FACTORS))
    assert file.adapter.layers == ['conv_2.eval_conv'] and file.adapter.rank_of('conv_2.eval_conv') == 4
    assert math.isnan(file.adapter.alpha_of('conv_2.eval_conv'))
    with pytest.raises(InputError, match='its alpha is unknown without adapter_config.json beside it'):
        file.adapter_for(SPAN_STATE, 'base')
    assert Checkpoint.read(tmp_path / 'adapter_model.safetensors').form == 'adapter'


def test_an_adapter_of_peft_and_ours_mix(base, tmp_path):
    """Also where one has LoRA on a layer and the other, of DoRA, a delta of its weight."""
    state = base.state_dict()
    down, up, magnitude = random(2, 8), random(5, 2), random(5).abs()
    layer = 'base_model.model.tail.'
    tensors = {f'{layer}lora_A.weight': down, f'{layer}lora_B.weight': up, f'{layer}lora_magnitude_vector': magnitude}
    dora = read_adapter(write(tmp_path, tensors, {'r': 2, 'lora_alpha': 3, 'use_dora': True}), state)
    network = add_lora(copy.deepcopy(base), LoRAConfig(['tail', 'head'], rank=3, alpha=2))
    for value in (network.tail.lora_B, network.head.lora_B):
        nn.init.normal_(value)
    own = extract_adapter(network)
    mixed = mix_adapters([(dora, 0.7), (own, -0.2)])
    assert mixed.layers == ['head'] and list(mixed.deltas) == ['tail.weight']
    weight = state['tail.weight'].double()
    updated = weight + 1.5 * up.double() @ down.double()
    updated = updated * (magnitude.double() / updated.norm(dim=1))[:, None]
    product = own.tensors['tail.lora_B'].double() @ own.tensors['tail.lora_A'].double()
    expected = weight + 0.7 * (updated - weight) - 0.2 * 2 / 3 * product
    merged = merge_adapter(state, mixed)
    assert (merged['tail.weight'] - expected).abs().max() <= 1e-6 * expected.abs().max()
    load_adapter(base, mixed)
    assert [name for name, _ in lora_layers(base)] == ['head'] and (base.tail.weight - expected).abs().max() <= 1e-5


def numbers(parts):
    return {name: value.double().numpy() for name, value in parts.items()}


def low_rank(parts):
    return np.einsum('or,ri...->oi...', parts['up'].reshape(len(parts['up']), -1), parts['down'])


def tucker(parts):
    up, down = (parts[name].reshape(parts[name].shape[:2]) for name in ('up', 'down'))
    return np.einsum('or,rs...,si->oi...', up, parts['mid'], down)


def hadamard(parts):
    halves = []
    for a, b, t in (('hada_w1_a', 'hada_w1_b', 'hada_t1'), ('hada_w2_a', 'hada_w2_b', 'hada_t2')):
        if t in parts:
            halves.append(np.einsum('rs...,ro,si->oi...', parts[t], parts[a], parts[b]))
        else:
            halves.append((parts[a] @ parts[b]).reshape(8, 3, 3, 3))
    return halves[0] * halves[1]


def kronecker(parts):
    first = parts.get('lokr_w1')
    first = parts['lokr_w1_a'] @ parts['lokr_w1_b'] if first is None else first
    second = parts.get('lokr_w2')
    if 'lokr_t2' in parts:
        second = np.einsum('rs...,ro,si->oi...', parts['lokr_t2'], parts['lokr_w2_a'], parts['lokr_w2_b'])
    elif second is None:
        second = (parts['lokr_w2_a'] @ parts['lokr_w2_b']).reshape(4, 3, 3, 3)
    return np.stack([[np.kron(first, second[:, :, y, x]) for x in range(3)] for y in range(3)]).transpose(2, 3, 0, 1)


# Shapes of what a file has for head, a convolution 8x3x3x3, and alpha / rank.
KOHYA = {
    'LoRA': (low_rank, {'down': (2, 3, 3, 3), 'up': (8, 2, 1, 1)}, 3 / 2),
    'LoRA without alpha': (low_rank, {'down': (2, 3, 3, 3), 'up': (8, 2, 1, 1)}, 1),
    'LoRA with a core': (tucker, {'down': (2, 3, 1, 1), 'up': (8, 5, 1, 1), 'mid': (5, 2, 3, 3)}, 3 / 2),
    'LoHa': (hadamard, {f'hada_w{i}_{e}': (8, 2) if e == 'a' else (2, 27) for i in '12' for e in 'ab'}, 3 / 2),
    'LoHa with cores': (
        hadamard,
        {
            **{f'hada_w{i}_{e}': (2, 8) if e == 'a' else (2, 3) for i in '12' for e in 'ab'},
            **{f'hada_t{i}': (2, 2, 3, 3) for i in '12'},
        },
        3 / 2,
    ),
    'LoKr, whole': (kronecker, {'lokr_w1': (2, 1), 'lokr_w2': (4, 3, 3, 3)}, 1),  # whatever its alpha is
    'LoKr': (kronecker, {'lokr_w1': (2, 1), 'lokr_w2_a': (4, 2), 'lokr_w2_b': (2, 27)}, 3 / 2),
    'LoKr of two products': (
        kronecker,
        {'lokr_w1_a': (2, 2), 'lokr_w1_b': (2, 1), 'lokr_w2_a': (4, 2), 'lokr_w2_b': (2, 27)},
        3 / 2,
    ),
    'LoKr with a core': (
        kronecker,
        {'lokr_w1': (2, 1), 'lokr_w2_a': (2, 4), 'lokr_w2_b': (2, 3), 'lokr_t2': (2, 2, 3, 3)},
        3 / 2,
    ),
}


@pytest.mark.parametrize('by', ['', 'row', 'column'])
@pytest.mark.parametrize('kind', KOHYA)
def test_kohya_and_lycoris_by_their_formulas(base, tmp_path, kind, by):
    formula, shapes, scale = KOHYA[kind]
    parts = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    own_names = {'down': 'lora_down.weight', 'up': 'lora_up.weight', 'mid': 'lora_mid.weight'}
    tensors = {f'lora_unet_head.{own_names.get(name, name)}': value for name, value in parts.items()}
    if kind != 'LoRA without alpha':
        tensors['lora_unet_head.alpha'] = torch.tensor(3.0)
    state = base.state_dict()
    weight = state['head.weight'].double().numpy()
    expected = weight + scale * formula(numbers(parts))
    if by:
        axes = (1, 2, 3) if by == 'row' else (0, 2, 3)
        magnitude = random(8, 1, 1, 1).abs() if by == 'row' else random(1, 3, 1, 1).abs()
        tensors['lora_unet_head.dora_scale'] = magnitude
        norm = np.sqrt(np.square(expected).sum(axes, keepdims=True))
        expected = expected * magnitude.double().numpy() / norm
    path = write(tmp_path, tensors, name='a.safetensors')
    adapter = read_adapter(path, state)
    assert adapter.layers == (['head'] if formula is low_rank and not by else [])
    merged = merge_adapter(state, adapter)['head.weight'].double().numpy()
    assert np.abs(merged - expected).max() <= 1e-6 * np.abs(expected).max() < 0.01 * np.abs(expected - weight).max()


@pytest.mark.parametrize(
    'names',
    [
        ['tail', 'body.1', 'body.2'],
        ['lora_unet_tail', 'lora_unet_body_1', 'lora_unet_body_2'],
        ['lycoris_tail', 'lycoris_body_1', 'lycoris_body_2'],
        ['unet.tail', 'unet.body.1', 'unet.body.2'],
        ['net_g_mine_tail', 'net_g_mine_body_1', 'net_g_mine_body_2'],
    ],
)
def test_names_are_found_whatever_stands_before_them(base, tmp_path, names):
    shapes = [(5, 8), (12, 8), (8, 12)]  # of the last one the kernel is wider
    tensors = {key: value for name, shape in zip(names, shapes) for key, value in pair(name, *shape).items()}
    tensors[f'{names[2]}.lora_down.weight'] = random(2, 12, 1, 3)
    adapter = read_adapter(write(tmp_path, tensors), base.state_dict())
    assert sorted(adapter.layers) == ['body.1', 'body.2', 'tail']


def test_the_file_of_a_linear_layer_fits_a_kernel_of_one_pixel_and_the_other_way_round(base, tmp_path):
    tensors = {
        'body.1.lora_down.weight': random(2, 8),
        'body.1.lora_up.weight': random(12, 2),
        'tail.lora_down.weight': random(2, 8, 1, 1),
        'tail.lora_up.weight': random(5, 2, 1, 1),
    }
    state = base.state_dict()
    merged = merge_adapter(state, read_adapter(write(tmp_path, tensors), state))
    for name in ('body.1', 'tail'):
        down, up = (tensors[f'{name}.lora_{end}.weight'].double().flatten(1) for end in ('down', 'up'))
        expected = state[f'{name}.weight'].double() + (up @ down).reshape(state[f'{name}.weight'].shape)
        assert (merged[f'{name}.weight'] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_does_not_fit_is_told_by_layer(base, tmp_path):
    state = {**base.state_dict(), 'a.b_c.weight': random(4, 4), 'a_b.c.weight': random(4, 4)}
    tensors = {
        **pair('lora_unet_tail'),
        **pair('lora_unet_a_b_c', 4, 4),
        **pair('lora_unet_gone'),
        **pair('lora_unet_body_1'),
    }
    with pytest.raises(InputError) as raised:
        AdapterFile.read(write(tmp_path, tensors, name='a.safetensors')).adapter_for(state, 'base.pth')
    assert str(raised.value) == (
        f'The adapter {tmp_path / "a.safetensors"} does not fit the base base.pth: 3 of its 4 layers differ: '
        'lora_unet_a_b_c may be a.b_c or a_b.c; body.1 is 12x8x1x1 here, the adapter is for 5x8; lora_unet_gone is not '
        'there.'
    )


TWINS = {f'{name}.weight': random(4, 4) for name in ('net.conv1', 'conv1', 'conv2', 'conv3')}


@pytest.mark.parametrize('start', ['net.', 'net_', 'base_model.model.net.', 'lora_unet_net_'])
def test_a_name_that_fits_with_what_stands_before_it_and_without_is_refused(tmp_path, start):
    """By most names `net` stands before them, but the base has net.conv1 as well."""
    peft = start.startswith('base_model')
    tensors = {}
    for i in (1, 2, 3):
        for key, value in pair(f'{start}conv{i}', 4, 4).items():
            tensors[key.replace('down', 'A').replace('up', 'B') if peft else key] = value
    path = write(tmp_path, tensors, {'r': 2, 'lora_alpha': 2} if peft else None)
    with pytest.raises(InputError, match=r'1 of its 3 layers differ: \S*net[._]conv1 may be net.conv1 or conv1\.'):
        read_adapter(path, TWINS)
    # Where one of the two is there, or all names are those of the base, nothing is in doubt.
    for missing in ('net.conv1', 'conv1'):
        state = {key: value for key, value in TWINS.items() if key != f'{missing}.weight'}
        other = {'net.conv1': 'conv1', 'conv1': 'net.conv1'}[missing]
        assert sorted(read_adapter(path, state).layers) == sorted([other, 'conv2', 'conv3'])


def test_names_that_are_all_those_of_the_base_are_taken_as_they_are(tmp_path):
    tensors = {key: value for name in ('net.conv1', 'conv2') for key, value in pair(name, 4, 4).items()}
    assert read_adapter(write(tmp_path, tensors), TWINS).layers == ['conv2', 'net.conv1']
