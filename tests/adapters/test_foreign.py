"""Adapters of PEFT, kohya's scripts and LyCORIS: against PEFT's own merging, and against their formulas in float64."""

import copy
import json
import math
import os
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    extract_adapter,
    load_adapter,
    lora_layers,
    merge_adapter,
    mix_adapters,
    read_adapter,
)
from lora_sr.checkpoints import AdapterFile, Checkpoint
from lora_sr.errors import InputError


class Tiny(nn.Module):
    """Convolutions of one to three dimensions, with square, tall and flat kernels; linear layers and an embedding."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 8, (1, 3), padding=(0, 1)),
            nn.BatchNorm2d(8),
        )
        self.line, self.volume = nn.Conv1d(8, 6, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)
        self.table = nn.Embedding(7, 5)
        self.tail = nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(self.head(x))
        shift = self.line(x.flatten(2)).mean() + self.volume(x[:, :1, None]).mean() + self.table(torch.arange(7)).mean()
        return self.tail(x.permute(0, 2, 3, 1)) + shift


LAYERS = ['head', 'body.0', 'body.1', 'body.2', 'line', 'volume', 'table', 'tail']
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


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Tiny().eval()


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
def test_a_network_of_peft_is_read_as_its_adapter_is(base, tmp_path):
    """Its state dict has the base and the name of the adapter besides."""
    network = with_peft(base, r=4, lora_alpha=6, modules_to_save=['body.3'], bias='lora_only')
    network.save_pretrained(tmp_path)
    (tmp_path / 'adapter_model.safetensors').unlink()
    torch.save(network.state_dict(), tmp_path / 'adapter_model.bin')
    state = base.state_dict()
    adapter = AdapterFile.read(tmp_path).adapter_for(state, 'base')
    assert adapter.layers == LAYERS
    assert difference(merge_adapter(state, adapter), network.merge_and_unload().state_dict()) <= 1e-6


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


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(folder, tensors, config=None, name='adapter_model.safetensors'):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / 'adapter_config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / name


SPAN_LAYER = 'base_model.model.conv_2.eval_conv.'
SPAN_STATE = {'conv_2.eval_conv.weight': random(26, 26, 3, 3), 'conv_2.eval_conv.bias': random(26)}
SPAN_FACTORS = {f'{SPAN_LAYER}lora_A.weight': random(4, 26, 3, 3), f'{SPAN_LAYER}lora_B.weight': random(26, 4, 1, 1)}


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


def pair(name, out=5, inner=8, rank=2):
    return {f'{name}.lora_down.weight': random(rank, inner), f'{name}.lora_up.weight': random(out, rank)}


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


def test_adapters_of_others_are_told_apart(tmp_path):
    one = AdapterFile.read(write(tmp_path, pair('tail'), name='one.safetensors'))
    other = AdapterFile.read(write(tmp_path, pair('tail', rank=3), name='other.safetensors'))
    same = AdapterFile.read(write(tmp_path, pair('tail'), name='same.safetensors'))
    assert one.fingerprint == same.fingerprint != other.fingerprint


CONFIG = {'r': 4, 'lora_alpha': 8}
CONFIGS = {
    json.dumps(
        {'r': 10**9, 'lora_alpha': 8}
    ): 'must have the rank 4 for conv_2.eval_conv, as its tensors have, got 1000000',
    '{"r": 4, "lora_alpha": 1e999}': 'alpha of conv_2.eval_conv must be a number of at most .* other than 0, got inf',
    '{"r": 4, "lora_alpha": NaN}': 'other than 0, got nan',
    '{"r": 4, "lora_alpha": 0}': 'other than 0, got 0',
    '{"r": 4, "lora_alpha": "8"}': "other than 0, got '8'",
    '{"r": 4, "lora_alpha": true}': 'other than 0, got True',
    '[' * 200_000: 'adapter_config.json beside it must be a JSON object of at most 1,048,576 bytes',
    '{"a":' * 200_000: 'must be a JSON object',
    json.dumps({'a': 'x' * 2**20}): 'must be a JSON object',
    '[4]': 'must be a JSON object',
    '': 'must be a JSON object',
    json.dumps({'rank_pattern': {'(a+)+$': 4}}): r"The pattern '\(a\+\)\+\$' must be simpler",
    json.dumps({'rank_pattern': {'(': 4}}): r"the pattern '\(' is not a regular expression",
    json.dumps({'rank_pattern': [4]}): r'"rank_pattern" of adapter_config.json must map at most .* patterns, got \[4\]',
    json.dumps({'alpha_pattern': {'.*': []}}): r'other than 0, got \[\]',
}
REFUSED = {
    'peft_type': ('LOHA', '"peft_type" of adapter_config.json must be "LORA", got \'LOHA\''),
    'init_lora_weights': ('pissa_niter_4', "must leave the base as it is, got 'pissa_niter_4'"),
    'target_parameters': (['weight'], '"target_parameters" of adapter_config.json must not be set'),
    'use_qalora': (True, '"use_qalora" of adapter_config.json must not be set'),
}


@pytest.mark.parametrize('config', CONFIGS, ids=range(len(CONFIGS)))
def test_wrong_configurations_are_one_sentence(tmp_path, config):
    path = write(tmp_path, SPAN_FACTORS, config)
    with pytest.raises(InputError, match=CONFIGS[config]) as raised:
        read_adapter(path, SPAN_STATE)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize('key', REFUSED)
def test_what_is_more_than_lora_is_refused_by_name_and_shown(tmp_path, key):
    value, message = REFUSED[key]
    file = AdapterFile.read(write(tmp_path, SPAN_FACTORS, {**CONFIG, key: value}))
    assert file.adapter.layers == ['conv_2.eval_conv']
    with pytest.raises(InputError, match=message):
        file.adapter_for(SPAN_STATE, 'base')


def test_nothing_that_a_configuration_names_is_looked_at(tmp_path):
    """`base_model_name_or_path` would be downloaded by PEFT, `auto_mapping` imported."""
    mapping = {'base_model_class': 'system', 'parent_library': 'os'}
    config = {**CONFIG, 'base_model_name_or_path': '/nowhere', 'auto_mapping': mapping, 'a key to come': 1}
    assert read_adapter(write(tmp_path, SPAN_FACTORS, config), SPAN_STATE).alpha_of('conv_2.eval_conv') == 8


def test_a_configuration_that_is_no_file_is_not_waited_for(tmp_path):
    path = write(tmp_path, SPAN_FACTORS)
    os.mkfifo(tmp_path / 'adapter_config.json')
    with pytest.raises(InputError, match='adapter_config.json cannot be read: it must be a file, got a pipe'):
        read_adapter(path, SPAN_STATE)


def test_a_long_configuration_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path, SPAN_FACTORS, '{}')
    os.truncate(tmp_path / 'adapter_config.json', 2**38)  # on the disk it has some bytes, in memory it would have all
    with pytest.raises(InputError, match='must be a JSON object of at most 1,048,576 bytes'):
        read_adapter(path, SPAN_STATE)


def changed(**changes):
    parts = {f'{SPAN_LAYER}{name}.weight': value for name, value in changes.items()}
    return {key: value for key, value in {**SPAN_FACTORS, **parts}.items() if value is not None}


NAN = torch.full((26, 4, 1, 1), math.nan)
DAMAGED = {
    'another width': (changed(lora_A=random(4, 25, 3, 3)), 'is 26x26x3x3 here, the adapter is for 26x25x3x3'),
    'another kernel': (changed(lora_A=random(4, 26, 1, 1)), 'is 26x26x3x3 here, the adapter is for 26x26x1x1'),
    'ranks': (changed(lora_A=random(3, 26, 3, 3)), '3x26x3x3 and 26x4x1x1 do not go with each other'),
    'half': (changed(lora_B=None), 'it lacks lora_B of the layer conv_2.eval_conv'),
    'a number': (changed(lora_A=torch.tensor(1.0)), 'a number and 26x4x1x1 do not go'),
    'nothing': (changed(lora_A=torch.zeros(0, 26, 3, 3), lora_B=torch.zeros(26, 0, 1, 1)), '26x0x1x1 do not go'),
    'integers': (changed(lora_A=torch.ones(4, 26, 3, 3, dtype=torch.int64)), 'floating-point numbers, got torch.int64'),
    'whole integers': (
        {**changed(), 'base_model.model.conv_2.eval_conv.bias': torch.ones(26, dtype=torch.int32)},
        'conv_2.eval_conv.bias is of torch.float32 here, got torch.int32',
    ),
    'groups of kohya': (
        {'tail.lora_down.weight': random(4, 8), 'tail.lora_up.weight': random(5, 2)},
        '4x8 and 5x2 do not go with each other',
    ),
    'not finite': (changed(lora_B=NAN), 'has values that are not finite, in conv_2.eval_conv'),
    'two adapters': (
        {key.replace('.weight', f'.{name}.weight'): value + 1 for key, value in SPAN_FACTORS.items() for name in 'ab'},
        'it must hold one adapter, got a and b',
    ),
    'twice': (
        {**SPAN_FACTORS, **{key[len('base_model.model.') :]: value.clone() for key, value in SPAN_FACTORS.items()}},
        'it must have each name once, got two of conv_2.eval_conv.lora_A.weight',
    ),
    'one layer by two names': (
        {**pair('conv_2.eval_conv'), **pair('conv_2_eval_conv')},
        'conv_2.eval_conv and conv_2_eval_conv are both for conv_2.eval_conv',
    ),
    'OFT': ({'tail.oft_blocks': random(2, 2)}, 'must hold LoRA, LoHa or LoKr alone, got tail.oft_blocks, i.e. OFT'),
    'a weight besides': ({**pair('tail'), 'head.weight': random(3)}, 'LoRA, LoHa or LoKr alone, got head.weight'),
    'two kinds': ({**pair('tail'), 'tail.lokr_w1': random(2, 2)}, 'updates of several kinds for the layer tail'),
    'alphas': ({**pair('tail'), 'tail.alpha': random(3)}, 'alpha of tail must be a number, got torch.float32 of 3'),
    'half of LoHa': (
        {'tail.hada_w1_a': random(2, 2)},
        'it lacks hada_w1_b and hada_w2_a and hada_w2_b of the layer tail',
    ),
    'LoKr of numbers': ({'tail.lokr_w1': random(1), 'tail.lokr_w2': random(1)}, 'lokr_w1 of tail must be a matrix'),
    'long LoKr': (
        {'conv_2.eval_conv.lokr_w1': random(30_000, 1), 'conv_2.eval_conv.lokr_w2': random(30_000, 1)},
        'is 26x26x3x3 here, which its LoKr is not for',
    ),
    'magnitudes': (
        {**changed(), f'{SPAN_LAYER}lora_magnitude_vector': random(3)},
        'is 26x26x3x3 here, its magnitudes are 3',
    ),
    'names': ({f'{"é_" * 200}{key}': value for key, value in pair('x').items()}, '1 of its 1 layers differ: é_é_é_'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files_are_one_sentence(tmp_path, case):
    tensors, message = DAMAGED[case]
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        AdapterFile.read(write(tmp_path, tensors, CONFIG)).adapter_for(SPAN_STATE, 'base.pth')
    assert str(raised.value).endswith('.') and '\n' not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.skipif(not hasattr(torch, 'float8_e4m3fn'), reason='torch has no numbers of 8 bits')
def test_numbers_of_8_bits_are_told_where_the_reader_does_not_widen_them(tmp_path):
    path = write(tmp_path, changed(lora_A=random(4, 26, 3, 3).to(torch.float8_e4m3fn)), CONFIG)
    with pytest.raises(InputError, match='must be of floating-point numbers, got torch.float8_e4m3fn of 4x26x3x3'):
        read_adapter(path, SPAN_STATE)
    assert AdapterFile.read(path).adapter_for(SPAN_STATE, 'base').layers == ['conv_2.eval_conv']


def test_large_ranks_take_no_more_memory_than_the_weight(tmp_path):
    """As factors of our layout the update would have 117 million values."""
    rank = 50_000
    tensors = {
        f'conv_2.eval_conv.lora_{end}.weight': value
        for end, value in (('down', random(rank, 26, 3, 3) / rank), ('up', random(26, rank, 1, 1)))
    }
    adapter = read_adapter(write(tmp_path, tensors), SPAN_STATE)
    assert sum(value.numel() for value in adapter.tensors.values()) == 26 * 26 * 9
    down, up = (value.double().flatten(1) for value in tensors.values())
    assert torch.allclose(adapter.deltas['conv_2.eval_conv.weight'].flatten(1).double(), up @ down, atol=1e-6)


def test_thousands_of_layers_and_patterns_take_seconds(tmp_path):
    count = 4000
    state = {f'layers.{i}.conv.weight': torch.zeros(2, 2) for i in range(count)}
    tensors = {
        f'base_model.model.layers.{i}.conv.lora_{end}.weight': torch.ones(shape)
        for i in range(count)
        for end, shape in (('A', (1, 2)), ('B', (2, 1)))
    }
    patterns = {f'layers.{i}.conv': i + 1 for i in range(200)}
    path = write(tmp_path, tensors, {'r': 1, 'lora_alpha': 8, 'alpha_pattern': patterns})
    start = time.process_time()
    adapter = read_adapter(path, state)
    assert time.process_time() - start < 20
    assert [adapter.alpha_of(f'layers.{i}.conv') for i in (0, 199, 200)] == [1, 200, 8]
    write(tmp_path, tensors, {'r': 1, 'alpha_pattern': {f'.*{i}.*x.*': 1 for i in range(200)}})
    with pytest.raises(InputError, match='with so many names, and as long ones, it takes too long'):
        read_adapter(path, state)
