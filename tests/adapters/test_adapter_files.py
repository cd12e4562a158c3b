"""Adapters by themselves: taken out, mixed, written, read and put in, against sums of updates in float64."""

import copy
import errno
import itertools
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from trained import trained

from lora_sr.adapters import (
    Adapter,
    LoRAConfig,
    add_lora,
    apply_adapter,
    describe_lora,
    describe_misfit,
    extract_adapter,
    load_adapter,
    lora_layers,
    mark_trainable,
    merge_adapter,
    merge_lora,
    merge_state_dict,
    mix_adapters,
    read_adapter,
    save_adapter,
    set_lora_scale,
)
from lora_sr.checkpoints import AdapterFile
from lora_sr.errors import InputError
from lora_sr.files import check_output, write_whole


class Tiny(nn.Module):
    """Plain, depth-wise, grouped and (1, 3) convolutions, a linear layer, a normalization, a table of positions."""

    def __init__(self, width=8):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            nn.Conv2d(width, 12, (1, 3), padding=(0, 1), groups=4, bias=False),
            nn.BatchNorm2d(12),
            nn.Conv2d(12, 6, (3, 1), groups=2),
        )
        self.tail = nn.Linear(6, 5)
        self.relative_position_bias_table = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return self.tail(self.body(self.head(x)).permute(0, 2, 3, 1)) + self.relative_position_bias_table


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Tiny().eval()


def adapted(base, config, seed=0):
    """A copy of ``base`` with an adapter that has been somewhere."""
    return trained(add_lora(copy.deepcopy(base), config), seed)


CONFIGS = [
    LoRAConfig(['.*'], rank=3, alpha=5, rank_pattern={'tail': 2}, also_train=['bias', 'norm']),
    LoRAConfig(['head', r'body\.[01]'], rank=2, alpha=-1.5, alpha_pattern={'head': 4}),
    LoRAConfig([r'body\..*', 'tail'], rank=4, also_train=['bias', 'position']),
]


@pytest.fixture
def adapters(base):
    return [extract_adapter(adapted(base, config, seed)) for seed, config in enumerate(CONFIGS)]


def same_state(network, before):
    after = network.state_dict()
    return after.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in after.items())


def updates_in_float64(adapter, base):
    """Name of a parameter -> what the adapter adds to it, by the definition."""
    tensors = {key: value.double().numpy() for key, value in adapter.tensors.items()}
    updates = {}
    for key, value in tensors.items():
        name, _, last = key.rpartition('.')
        if last == 'lora_A':
            weight = base[f'{name}.weight']
            product = np.einsum('ok,ki->oi', tensors[f'{name}.lora_B'], value).reshape(weight.shape)
            rank = adapter.config.rank_of(name)
            updates[f'{name}.weight'] = tensors[f'{name}.lora_alpha'] / rank * product
        elif last.startswith('lora_shift_'):
            updates[f'{name}.{last[11:]}'.lstrip('.')] = value
    return updates


def check_sum(state, base, parts):
    """That every tensor of ``state`` is the base's plus the weighted sum of the updates."""
    assert state.keys() == base.keys()
    updates = [(updates_in_float64(adapter, base), weight) for adapter, weight in parts if weight]
    changed = set()
    for key, value in state.items():
        expected = base[key].double().numpy()
        for update, weight in updates:
            if key in update:
                expected = expected + weight * update[key]
                changed.add(key)
        assert np.abs(value.double().numpy() - expected).max() <= 1e-5, key
    for key in base.keys() - changed:
        assert torch.equal(state[key], base[key])
    return changed


@pytest.mark.parametrize('weights', [(1, 1, 1), (0.7, -0.2, 0.5), (1.5, 0, -2), (0, 0, 0.25), (0, 3, 0)])
def test_a_mix_is_the_weighted_sum_of_the_updates(base, adapters, weights):
    state = base.state_dict()
    parts = list(zip(adapters, weights))
    merged = merge_adapter(state, mix_adapters(parts))
    changed = check_sum(merged, state, parts)
    assert ('relative_position_bias_table' in changed) == bool(weights[2])
    assert ('body.2.weight' in changed) == bool(weights[0])


def test_a_mix_is_an_ordinary_adapter(base, adapters, tmp_path):
    mixed = mix_adapters(zip(adapters, (0.7, -0.2, 0.5)))
    ranks = {name: mixed.rank_of(name) for name in mixed.layers}
    assert ranks == {'head': 3 + 2, 'body.0': 3 + 2 + 4, 'body.1': 3 + 2 + 4, 'body.3': 3 + 4, 'tail': 2 + 4}
    save_adapter(mixed, tmp_path / 'mix.safetensors')
    read = read_adapter(tmp_path / 'mix.safetensors')
    assert read.config == mixed.config
    load_adapter(base, read)
    assert {name: layer.rank for name, layer in lora_layers(base)} == ranks
    assert all(layer.lora_alpha.item() == layer.rank for _, layer in lora_layers(base))
    assert describe_lora(base) == mixed.config
    again = mix_adapters([(read, 0.5), (read, 0.5)])
    original = {key: value for key, value in base.state_dict().items() if 'lora_' not in key}
    check_sum(merge_adapter(original, again), original, zip(adapters, (0.7, -0.2, 0.5)))


def test_a_layer_of_one_adapter_keeps_its_tensors(base, adapters):
    alone = mix_adapters([(adapters[0], 1), (adapters[1], 0)])
    assert alone.config == adapters[0].config and alone.tensors.keys() == adapters[0].tensors.keys()
    assert all(torch.equal(value, adapters[0].tensors[key]) for key, value in alone.tensors.items())
    half = mix_adapters([(adapters[0], 0.5)])
    assert half.rank_of('head') == 3 and half.alpha_of('head') == 2.5
    assert torch.equal(half.tensors['head.lora_B'], adapters[0].tensors['head.lora_B'])


def test_mixing_is_linear_on_a_network(base, adapters):
    """With one adapter on the last layer alone the output is linear in the weights too."""
    x = torch.randn(1, 3, 9, 7)
    first, second = (extract_adapter(adapted(base, LoRAConfig(['tail'], rank=2), seed)) for seed in (5, 6))
    outputs = {}
    for weights in itertools.product((0, 1), repeat=2):
        network = copy.deepcopy(base)
        load_adapter(network, mix_adapters(zip((first, second), weights)))
        outputs[weights] = network(x)
    assert torch.equal(outputs[0, 0], base(x))
    load_adapter(base, mix_adapters([(first, 0.3), (second, -1.7)]))
    zero = outputs[0, 0]
    torch.testing.assert_close(
        base(x), zero + 0.3 * (outputs[1, 0] - zero) - 1.7 * (outputs[0, 1] - zero), rtol=0, atol=1e-5
    )


def test_scale_0_is_the_base_to_the_bit(base, adapters):
    state = base.state_dict()
    state['head.weight'][0, 0, 0, 0] = -0.0  # plus 0 would be another bit
    damaged = Adapter(adapters[1].config, {k: v * float('inf') for k, v in adapters[1].tensors.items()})
    for mixed in (mix_adapters([(adapters[0], 0), (damaged, 0.0)]), mix_adapters([])):
        for result in (apply_adapter(state, mixed), merge_adapter(state, mixed)):
            assert result.keys() == state.keys()
            assert all(value.numpy().tobytes() == state[key].numpy().tobytes() for key, value in result.items())
    x = torch.randn(1, 3, 9, 7)
    expected = base(x)
    load_adapter(base, adapters[0])
    assert not torch.equal(base(x), expected)
    set_lora_scale(base, 0)
    assert torch.equal(base(x), expected)
    load_adapter(base, mixed)
    assert torch.equal(base(x), expected) and type(base.head) is nn.Conv2d


@torch.no_grad()
def test_extract_apply_merge_give_equal_outputs(base, tmp_path):
    network = adapted(base, CONFIGS[0])
    adapter = extract_adapter(network.state_dict())
    save_adapter(adapter, tmp_path / 'a.safetensors')
    read = read_adapter(tmp_path / 'a.safetensors')
    state = apply_adapter(base.state_dict(), read)
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())

    x = torch.randn(2, 3, 9, 7)
    live = copy.deepcopy(base)
    load_adapter(live, tmp_path / 'a.safetensors')
    plain = copy.deepcopy(base)
    plain.load_state_dict(merge_state_dict(state))
    assert same_state(merge_lora(copy.deepcopy(live)), plain.state_dict())
    for other in (live, plain, merge_lora(live)):
        other.requires_grad_(False)  # for a weight that requires gradients torch takes another kernel
        assert torch.equal(other(x), network(x))
    assert not torch.allclose(base(x), network(x), atol=0.1)


def test_an_extracted_adapter_is_a_copy(base):
    network = adapted(base, CONFIGS[1])
    adapter = extract_adapter(network)
    before = adapter.tensors['head.lora_A'].clone()
    nn.init.zeros_(network.head.lora_A)
    assert torch.equal(adapter.tensors['head.lora_A'], before)


def test_file_holds_tensors_and_configuration_and_nothing_is_overwritten(base, tmp_path, monkeypatch):
    network = adapted(base, CONFIGS[0])
    path = tmp_path / 'a.safetensors'
    save_adapter(network, path)
    with safe_open(path, framework='np') as file:
        assert set(file.keys()) == {key for key in network.state_dict() if 'lora_' in key}
        config = LoRAConfig.from_json(file.metadata()['lora_config'])
    assert config == describe_lora(network)
    assert config.target_parameters == [
        *(r'body\.0\.bias', r'body\.2\.bias', r'body\.2\.weight', r'body\.3\.bias', r'head\.bias', r'tail\.bias')
    ]
    assert config.rank_of('tail') == 2 and config.rank_of('head') == 3 and config.alpha_of('head') == 5

    content = path.read_bytes()
    other = adapted(base, CONFIGS[1])
    with pytest.raises(InputError, match='a.safetensors exists: choose another name'):
        save_adapter(other, path)

    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched, pytest.raises(InputError, match='cannot be written: No space left'):
        patched.setattr(os, 'replace', fail)
        save_adapter(other, path, overwrite=True)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ['a.safetensors']
    save_adapter(other, path, overwrite=True)
    assert read_adapter(path).layers == ['head', 'body.0', 'body.1']
    for wrong, message in ((tmp_path / 'a.pth', 'must end in .safetensors'), (tmp_path / 'b' / path.name, 'folder')):
        with pytest.raises(InputError, match=message):
            save_adapter(other, wrong)


def read_only(*arguments, **keywords):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_read_only_folder_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / 'a.safetensors'
    sentence = 'a.safetensors cannot be written: Read-only'
    with monkeypatch.context() as patched, pytest.raises(InputError, match=sentence):
        patched.setattr(Path, 'write_bytes', read_only)
        patched.setattr(Path, 'unlink', read_only)
        write_whole(path, b'data')
    monkeypatch.setattr(tempfile, 'TemporaryFile', read_only)
    with pytest.raises(InputError, match=sentence):
        check_output(path, ('.safetensors',), False)
    assert not list(tmp_path.iterdir())


def test_another_adapter_replaces_the_one_that_is_there(base, adapters):
    """Other layers, other ranks, other deltas; the base, its device of gradients and its mode stay."""
    network = copy.deepcopy(base)
    load_adapter(network, adapters[0])
    mark_trainable(network)
    set_lora_scale(network, 0.5)
    weight = network.head.base_parameter('weight')
    load_adapter(network, adapters[2])
    assert network.head.weight is weight and not weight.requires_grad and type(network.head) is nn.Conv2d
    assert not network.training and type(network.body[2]) is nn.BatchNorm2d
    mark_trainable(network)
    trains = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trains == {key for key in adapters[2].tensors if not key.endswith('alpha')}
    x = torch.randn(1, 3, 9, 7)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, adapters[2])
    assert torch.equal(network(x), fresh(x)) and not torch.equal(network(x), base(x))


def test_what_a_mix_does_not_change_stays(base):
    """One adapter changes a bias, another adapts a layer with a bias: together they change one bias."""
    first = extract_adapter(adapted(base, LoRAConfig(['head'], also_train=['bias'])))
    second = extract_adapter(adapted(base, LoRAConfig(['tail'])))
    mixed = mix_adapters([(first, 1), (second, 2)])
    assert list(mixed.deltas) == ['head.bias']
    x = torch.randn(1, 3, 9, 7)
    plain = copy.deepcopy(base)
    plain.load_state_dict(merge_adapter(base.state_dict(), mixed))
    load_adapter(base, mixed)
    assert torch.equal(base(x), plain(x))
    assert extract_adapter(base).tensors.keys() == mixed.tensors.keys()


def test_half_precision_base_takes_an_adapter_in_float32(base, adapters):
    half = copy.deepcopy(base).half()
    live = copy.deepcopy(half)
    load_adapter(live, adapters[0])
    state = apply_adapter(half.state_dict(), adapters[0])
    assert all(value.dtype == state[key].dtype for key, value in live.state_dict().items())
    assert {value.dtype for key, value in state.items() if 'batches' not in key} == {torch.float16}
    merged = merge_adapter(half.state_dict(), adapters[0])
    assert all(torch.equal(value, merged[key]) for key, value in merge_lora(live).state_dict().items())


def test_module_that_stands_twice_is_extracted_and_loaded_twice(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    base = nn.Sequential(conv, nn.ReLU(), conv)
    network = adapted(base, LoRAConfig(['0'], rank=2))
    save_adapter(network, tmp_path / 'a.safetensors')
    live = copy.deepcopy(base)
    load_adapter(live, tmp_path / 'a.safetensors')
    x = torch.randn(1, 4, 6, 6)
    assert live[0] is live[2] and torch.equal(live(x), network(x))


@pytest.mark.parametrize('was_adapted', [False, True])
def test_adapter_of_another_base_names_layers_and_shapes_and_changes_nothing(base, tmp_path, was_adapted):
    network = adapted(base, CONFIGS[2]) if was_adapted else base
    modules, before = dict(network.named_modules()), copy.deepcopy(network.state_dict())
    save_adapter(adapted(Tiny(width=16), CONFIGS[0]), tmp_path / 'wide.safetensors')
    with pytest.raises(InputError) as raised:
        load_adapter(network, tmp_path / 'wide.safetensors')
    assert str(raised.value) == (
        f'The adapter {tmp_path / "wide.safetensors"} does not fit Tiny: 3 of its 6 layers differ: head is 8x3x3x3 '
        'here, the adapter is for 16x3x3x3; body.0 is 8x1x5x5 here, the adapter is for 16x1x5x5; body.1 is 12x2x1x3 '
        'here, the adapter is for 3x16x1x3.'
    )
    assert same_state(network, before) and dict(network.named_modules()) == modules


def adapter_of(rank=2, shape_a=(2, 8), shape_b=(12, 2), name='layer'):
    tensors = {'lora_A': torch.ones(shape_a), 'lora_B': torch.ones(shape_b), 'lora_alpha': torch.tensor(2.0)}
    return Adapter(LoRAConfig([name], rank=rank), {f'{name}.{key}': value for key, value in tensors.items()})


@pytest.mark.parametrize(
    'weight, shapes, misfit',
    [
        ((12, 8), ((2, 8), (12, 2)), None),
        ((180, 60), ((2, 120), (360, 2)), 'layer is 180x60 here, the adapter is for 360x120'),
        ((12, 8), ((2, 12), (8, 2)), 'layer is 12x8 here, the adapter is for 8x12'),  # as many values
        ((12, 8, 3, 3), ((6, 24), (36, 6)), None),
        ((12, 2, 3, 3), ((6, 24), (9, 6)), None),  # four groups
        ((8, 1, 3, 3), ((6, 24), (3, 6)), None),  # depth-wise
        ((12, 8, 1, 1), ((6, 24), (36, 6)), 'layer is 12x8x1x1 here, the adapter is for 12x8x3x3'),
        ((12, 8, 3, 3), ((2, 8), (12, 2)), 'layer is 12x8x3x3 here, the adapter is for 12x8x1x1'),
        ((12, 8), ((6, 24), (36, 6)), 'layer is 12x8 here, the adapter is for 12x8x3x3'),
        ((12, 8, 1, 3), ((2, 24), (12, 2)), None),
        ((12, 8, 3, 1), ((6, 8), (36, 6)), None),
        ((24, 4, 3, 3), ((6, 24), (36, 6)), None),  # two groups
        ((24, 8, 3, 3), ((6, 24), (36, 6)), 'layer is 24x8x3x3 here, the adapter is for 12x8x3x3'),
        ((12,), ((2, 8), (12, 2)), 'layer is 12 here, the adapter is for 12x8'),
        (None, ((2, 8), (12, 2)), 'layer is not there'),
    ],
)
def test_fit_is_told_from_shapes(weight, shapes, misfit):
    state = {} if weight is None else {'layer.weight': torch.zeros(weight)}
    adapter = adapter_of(2, *shapes)
    expected = misfit and f'1 of its 1 layers differ: {misfit}'
    assert describe_misfit(adapter, state) == expected
    if misfit:
        with pytest.raises(InputError, match=misfit):
            apply_adapter(state, adapter)
    else:
        assert merge_adapter(state, adapter)['layer.weight'].unique().tolist() == [shapes[0][0]]


def test_a_layer_that_cannot_carry_lora_is_refused_before_anything_changes(base, adapters):
    """A subclass whose shape fits, and a parameter of a layer without updates: only the network tells."""

    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4, 4, 3))
    load_adapter(network, adapter_of(2, (2, 3), (4, 2), '0'))
    modules, before = dict(network.named_modules()), copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match='does not fit Sequential: .*an? Own, which cannot carry LoRA'):
        load_adapter(network, adapter_of(2, (6, 12), (12, 6), '1'))
    assert same_state(network, before) and dict(network.named_modules()) == modules

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 8, 3)
            self.rel_pos, self.memory = nn.Parameter(torch.ones(5)), nn.GRUCell(5, 1)

    network = Odd()
    deltas = {'lora_shift_rel_pos': torch.ones(5), 'memory.lora_shift_bias_hh': torch.ones(3)}
    head = {key: value for key, value in adapters[1].tensors.items() if key.startswith('head.')}
    with pytest.raises(InputError, match=r'does not fit Odd: .*"memory\\.bias_hh" matches no parameter that can carry'):
        load_adapter(network, Adapter(adapters[1].config, {**head, **deltas}))
    assert type(network) is Odd and not any('lora_' in key for key in network.state_dict())


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('tail.lora_B', math.nan, 'it has values that are not finite, in tail.lora_B'),
        ('head.lora_shift_bias', math.inf, 'it has values that are not finite, in head.lora_shift_bias'),
        ('tail.lora_alpha', math.inf, 'tail.lora_alpha must be a number of at most 1e+30 other than 0, got inf'),
        ('tail.lora_alpha', 0.0, 'tail.lora_alpha must be a number of at most 1e+30 other than 0, got 0'),
        ('tail.lora_alpha', -1e31, 'tail.lora_alpha must be a number of at most 1e+30 other than 0, got -1e+31'),
    ],
)
def test_values_that_cannot_be_used_are_told_by_every_reader(base, adapters, tmp_path, key, value, message):
    tensors = {name: tensor.clone() for name, tensor in adapters[0].tensors.items()}
    tensors[key].view(-1)[-1] = value
    path, before = tmp_path / 'a.safetensors', copy.deepcopy(base.state_dict())
    save_adapter(Adapter(adapters[0].config, tensors), path)
    for read in (
        read_adapter,
        lambda path: read_adapter(path, before),
        lambda path: load_adapter(base, path),
        lambda path: AdapterFile.read(path).adapter_for(before, 'the base'),
    ):
        with pytest.raises(InputError) as raised:
            read(path)
        assert str(raised.value) == f'The adapter {path} cannot be used: {message}.'
    assert same_state(base, before)


def test_an_adapter_is_held_against_the_base_that_it_is_read_with(base, tmp_path):
    save_adapter(adapted(Tiny(width=16), CONFIGS[0]), tmp_path / 'wide.safetensors')
    assert read_adapter(tmp_path / 'wide.safetensors').layers
    with pytest.raises(InputError, match='wide.safetensors does not fit the base: 3 of its 6 layers differ: head is'):
        read_adapter(tmp_path / 'wide.safetensors', base.state_dict())


def test_mixed_adapters_have_to_be_of_one_base(base, adapters):
    wide = extract_adapter(adapted(Tiny(width=16), CONFIGS[1]))
    with pytest.raises(InputError, match='not of one base: they are for different shapes of "head"'):
        mix_adapters([(adapters[0], 1), (wide, 1)])
    tall, flat = adapter_of(2, (6, 8), (36, 6)), adapter_of(6, (6, 8), (36, 6))  # 3x1 and 1x1 kernels
    with pytest.raises(InputError, match='different shapes of "layer"'):
        mix_adapters([(tall, 1), (flat, 1)])
    biased = extract_adapter(adapted(Tiny(width=16), CONFIGS[0])).tensors['head.lora_shift_bias']
    odd = Adapter(adapters[0].config, {**adapters[0].tensors, 'head.lora_shift_bias': biased})
    with pytest.raises(InputError, match='different shapes of "head.lora_shift_bias"'):
        mix_adapters([(adapters[0], 1), (odd, 1)])
    with pytest.raises(InputError, match='weight of an adapter must be a finite number, got nan'):
        mix_adapters([(adapters[0], float('nan'))])


def test_wrong_files_are_one_sentence(base, adapters, tmp_path):
    path = tmp_path / 'f.safetensors'
    state = base.state_dict()
    with pytest.raises(InputError, match='There is no adapter file'):
        read_adapter(path)
    quoting = b'{"x":{"dtype":"\\n\\u001b[31m%s","shape":[],"data_offsets":[0,0]}}' % (b'x' * 10_000)
    for content in (b'mine', len(quoting).to_bytes(8, 'little') + quoting):
        path.write_bytes(content)
        with pytest.raises(InputError, match='cannot be read as a safetensors file') as raised:
            read_adapter(path)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 600
    metadata = {'lora_config': adapters[0].config.to_json()}
    tensors = adapters[0].tensors
    transposed = {**tensors, 'tail.lora_A': tensors['tail.lora_A'].T.contiguous()}
    half = {key: value for key, value in tensors.items() if key != 'tail.lora_B'}
    for content, header, message in (
        (state, metadata, 'is no adapter but a base checkpoint'),
        (apply_adapter(state, adapters[0]), metadata, 'is no adapter but an adapted checkpoint'),
        (tensors, {}, 'its metadata lacks "lora_config"'),
        (tensors, {'lora_config': '{'}, 'cannot be used'),
        (tensors, {'lora_config': '{"rnak": 1}'}, 'did you mean "rank"'),
        (half, metadata, 'lacks lora_B of the layer "tail"'),
        (transposed, metadata, '"tail" has lora_A 6x2 and lora_B 5x2, which do not go with rank 2'),
        (tensors, {'lora_config': LoRAConfig(['.*'], rank=7).to_json()}, 'which do not go with rank 7'),
    ):
        save_file(content, path, header)
        with pytest.raises(InputError, match=message):
            read_adapter(path)
    with pytest.raises(InputError, match='carries LoRA already'):
        apply_adapter(apply_adapter(state, adapters[0]), adapters[1])
    for plain in (base, state):
        with pytest.raises(InputError, match='no layer carries LoRA'):
            extract_adapter(plain)
