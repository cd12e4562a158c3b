"""Every kind of layer with an update: against torch's functions with the weight written out, in float64."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained import is_same, trained

from lora_sr.adapters import (
    LoRAConfig,
    adapted_modules,
    add_lora,
    count_parameters,
    describe_lora,
    describe_misfit,
    extract_adapter,
    infer_lora_config,
    layer_groups,
    left_alone,
    load_adapter,
    lora_layers,
    mark_trainable,
    merge_adapter,
    merge_lora,
    merge_state_dict,
    mix_adapters,
    read_adapter,
    remove_lora,
    save_adapter,
)
from lora_sr.adapters.layers import LORA_LAYERS
from lora_sr.errors import InputError


def attend(layer, weight, x):
    return F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        layer.embed_dim,
        layer.num_heads,
        weight,
        layer.in_proj_bias,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        layer.dropout,
        layer.out_proj.weight,
        layer.out_proj.bias,
        training=False,
        need_weights=False,
    )[0].transpose(0, 1)


# Name -> the layer, its input, and torch's function of the layer, an explicit weight and the input.
KINDS = {
    'Conv1d': (
        lambda: nn.Conv1d(4, 6, 5, stride=2, padding=1, groups=2),
        lambda: torch.randn(2, 4, 11),
        lambda layer, weight, x: F.conv1d(x, weight, layer.bias, 2, 1, 1, 2),
    ),
    'Conv3d': (
        lambda: nn.Conv3d(3, 4, (1, 3, 2), bias=False),
        lambda: torch.randn(2, 3, 3, 5, 4),
        lambda layer, weight, x: F.conv3d(x, weight),
    ),
    'ConvTranspose1d': (
        lambda: nn.ConvTranspose1d(4, 6, 4, stride=2),
        lambda: torch.randn(2, 4, 5),
        lambda layer, weight, x: F.conv_transpose1d(x, weight, layer.bias, 2),
    ),
    'ConvTranspose2d': (
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        lambda: torch.randn(2, 6, 4, 5),
        lambda layer, weight, x: F.conv_transpose2d(x, weight, layer.bias, 2, 1, 1, 2, 2),
    ),
    'ConvTranspose3d': (
        lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 2)),
        lambda: torch.randn(1, 2, 2, 3, 3),
        lambda layer, weight, x: F.conv_transpose3d(x, weight, layer.bias, (1, 2, 2)),
    ),
    'Embedding': (
        lambda: nn.Embedding(9, 6, padding_idx=2),
        lambda: torch.tensor([[0, 8, 2], [3, 3, 1]]),
        lambda layer, weight, x: F.embedding(x, weight, 2),
    ),
    'MultiheadAttention': (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        lambda: torch.randn(2, 5, 8),
        attend,
    ),
}


class Single(nn.Module):
    """A network of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)


class Everything(nn.Module):
    """All kinds of layers in a row, with a ``PReLU``, a layer scale, a token and a depth-wise convolution."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.gamma = nn.Parameter(torch.rand(8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU()
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.conv3 = nn.Conv3d(1, 1, 3, padding=1)
        self.tail = nn.Conv2d(4, 3, 1)

    def forward(self, indices):
        x = self.block(self.table(indices) + self.token) * self.gamma
        x = self.act(self.depthwise(self.conv1(self.norm(x).transpose(1, 2)))).unsqueeze(2)
        return self.tail(self.conv3(self.up(x).unsqueeze(1)).squeeze(1))


INDICES = torch.tensor([[0, 3, 9, 4, 1, 1], [2, 5, 7, 7, 8, 6]])
ALL = LoRAConfig(groups=['all'], rank=2, alpha=3)
WITH_DELTAS = LoRAConfig(
    groups=['all'], rank=2, alpha=3, also_train=['bias', 'norm', 'parameters', 'depthwise'], rank_pattern={'up': 1}
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Everything().eval().requires_grad_(False)


@pytest.mark.parametrize('kind', KINDS)
def test_layer_equals_the_function_of_the_weight_written_out(kind):
    torch.manual_seed(0)
    make, make_input, function = KINDS[kind]
    torch.set_default_dtype(torch.float64)
    try:
        base, x = Single(make()), make_input()
    finally:
        torch.set_default_dtype(torch.float32)
    adapted = trained(add_lora(copy.deepcopy(base), LoRAConfig(['layer'], rank=2, alpha=3)))
    name = 'in_proj_weight' if kind == 'MultiheadAttention' else 'weight'
    weight = getattr(base.layer, name).detach().numpy()
    lora_A, lora_B = (getattr(adapted.layer, tensor).detach().numpy() for tensor in ('lora_A', 'lora_B'))
    written_out = torch.from_numpy(weight + 3 / 2 * np.dot(lora_B, lora_A).reshape(weight.shape))
    expected = function(base.layer, written_out, x)
    for mode in (True, False):
        torch.testing.assert_close(adapted.train(mode)(x), expected, rtol=1e-12, atol=1e-12)
    assert (adapted(x) - base(x)).abs().max() > 0.1
    official = copy.deepcopy(base)
    with torch.no_grad():
        getattr(official.layer, name).copy_(written_out)
    torch.testing.assert_close(adapted(x), official(x), rtol=1e-12, atol=1e-12)
    if len(weight.shape) != 4:
        assert lora_A.shape == (2, weight[0].size) and lora_B.shape == (len(weight), 2)
    adapter, state = extract_adapter(adapted), base.state_dict()
    assert describe_misfit(adapter, state) is None
    constructed = LORA_LAYERS[type(base.layer)](base.layer, 2, 3)
    constructed.load_state_dict(adapted.layer.state_dict())
    assert torch.equal(Single(constructed)(x), adapted(x)) and is_same(base.state_dict(), state)
    state[f'layer.{name}'] = torch.cat([state[f'layer.{name}']] * 2)
    assert describe_misfit(adapter, state).startswith('1 of its 1 layers differ: layer is ')


@pytest.mark.parametrize('config', [ALL, WITH_DELTAS], ids=['lora', 'deltas'])
@torch.no_grad()
def test_step_0_is_the_base_and_merging_is_exact(network, config, tmp_path):
    before, state = network(INDICES), copy.deepcopy(network.state_dict())
    adapted = add_lora(copy.deepcopy(network), config)
    assert torch.equal(adapted(INDICES), before)
    has_lora = {name for name, _ in lora_layers(adapted)}
    assert has_lora | ({'depthwise'} if config is WITH_DELTAS else set()) == {
        *('table', 'block.self_attn', 'block.self_attn.out_proj', 'block.linear1', 'block.linear2'),
        *('conv1', 'depthwise', 'up', 'conv3', 'tail'),
    }
    assert [type(module).__name__ for module in remove_lora(copy.deepcopy(adapted)).modules()] == [
        type(module).__name__ for module in network.modules()
    ]
    # Without gradients, since torch has other kernels for what wants them.
    trained(adapted).requires_grad_(False)
    after = adapted(INDICES)
    assert (after - before).abs().max() > 0.1

    merged = merge_lora(copy.deepcopy(adapted))
    assert torch.equal(merged(INDICES), after)
    assert [type(module) for module in merged.modules()] == [type(module) for module in network.modules()]
    assert is_same(merge_state_dict(adapted.state_dict()), merged.state_dict())
    assert is_same({key: value for key, value in adapted.state_dict().items() if 'lora_' not in key}, state)

    for again in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert [type(module) for module in again.modules()] == [type(module) for module in adapted.modules()]
        assert torch.equal(again(INDICES), after) and is_same(merge_lora(again).state_dict(), merged.state_dict())

    save_adapter(adapted, tmp_path / 'a.safetensors')
    adapter = read_adapter(tmp_path / 'a.safetensors')
    assert adapter.config == describe_lora(adapted) == infer_lora_config(adapted.state_dict())
    assert is_same(merge_adapter(state, adapter), merged.state_dict())
    loaded = copy.deepcopy(network)
    load_adapter(loaded, adapter)
    assert torch.equal(loaded.requires_grad_(False)(INDICES), after)
    built = add_lora(copy.deepcopy(network), infer_lora_config(adapted.state_dict()))
    built.load_state_dict(adapted.state_dict())
    assert is_same(built.state_dict(), adapted.state_dict())
    assert torch.equal(remove_lora(adapted)(INDICES), before)


@torch.no_grad()
def test_a_mix_of_adapters_is_the_sum_of_their_updates(network):
    base = network.state_dict()
    adapters = [
        extract_adapter(trained(add_lora(copy.deepcopy(network), config), seed))
        for seed, config in enumerate((ALL, WITH_DELTAS))
    ]
    mixed = merge_adapter(base, mix_adapters(zip(adapters, (0.5, -2))))
    first, second = (merge_adapter(base, adapter) for adapter in adapters)
    for key, value in base.items():
        expected = value.double() + 0.5 * (first[key].double() - value) - 2 * (second[key].double() - value)
        torch.testing.assert_close(mixed[key].double(), expected, rtol=0, atol=2e-5)


def test_gradients_reach_every_update_and_nothing_else(network):
    trained(add_lora(network.train(), WITH_DELTAS))
    mark_trainable(network)
    network(INDICES).square().mean().backward()
    gradients = {name: value.grad for name, value in network.named_parameters()}
    assert {name for name, value in gradients.items() if value is not None} == {n for n in gradients if 'lora_' in n}
    assert all(value.abs().max() > 1e-7 for name, value in gradients.items() if 'lora_' in name)


def test_a_replica_computes_what_its_module_computes(network):
    """As torch/nn/parallel/replicate.py makes one: tensors are attributes, and submodules are replicas."""
    trained(add_lora(network, WITH_DELTAS))
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas.get(child))
        for name, value in module._parameters.items():
            setattr(replica, name, None if value is None else value.detach().clone())
        for name, value in module._buffers.items():
            setattr(replica, name, value.clone())
    with torch.no_grad():
        torch.testing.assert_close(replicas[network](INDICES), network(INDICES))


def test_compiled_and_autocast(network):
    trained(add_lora(network.train(), WITH_DELTAS))
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network.block.self_attn.dropout = 0.0
    expected = network(INDICES)
    torch.testing.assert_close(torch.compile(network, backend='eager', fullgraph=True)(INDICES), expected)
    with torch.autocast('cpu', torch.bfloat16):
        output = network(INDICES)
    assert output.dtype == torch.bfloat16
    assert (output - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize('function', ['_transformer_encoder_layer_fwd', '_native_multi_head_attention'])
@torch.no_grad()
def test_the_fast_path_of_inference_sees_the_updates(monkeypatch, function):
    torch.manual_seed(0)
    whole = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    base = whole if function == '_transformer_encoder_layer_fwd' else Single(attention)
    base.eval().requires_grad_(False)
    adapted = trained(add_lora(copy.deepcopy(base), ALL)).requires_grad_(False)
    calls, original = [], getattr(torch, function)
    monkeypatch.setattr(torch, function, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    x = torch.randn(2, 5, 8)
    fast = adapted(x)
    assert calls
    slow = adapted.train()
    for module in slow.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(fast, slow(x), rtol=1e-5, atol=1e-5)
    assert (fast - base(x)).abs().max() > 0.1


def test_who_holds_a_layer_outside_of_the_registry_holds_the_adapted_one():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1)
            self.steps = [self.conv]
            self.seen = []
            self.conv.register_forward_hook(lambda *args: self.seen.append(1))

        def forward(self, x):
            return self.steps[0](x)

    torch.manual_seed(0)
    network, x = Hidden(), torch.randn(1, 3, 4)
    before = network(x)
    trained(add_lora(network, ALL))
    after = network(x)
    assert not torch.allclose(after, before, atol=1e-2) and len(network.seen) == 2
    assert torch.equal(merge_lora(network)(x), after) and network.steps[0] is network.conv


def test_parameters_outside_of_layers_train_as_deltas():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
            self.act = nn.PReLU(3)
            self.items = nn.ParameterList([torch.ones(3), torch.ones(3)])
            self.named = nn.ParameterDict({'gain': torch.ones(3)})
            self.block = nn.Sequential(nn.Linear(3, 3))
            self.block.token = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            x = self.act(self.block(x) + self.block.token) * self.scale * self.fixed
            return x * self.items[0] + sum(self.items) * self.named['gain']

    torch.manual_seed(0)
    base, x = Bare(), torch.randn(5, 3)
    names = ['scale', 'act.weight', 'items.0', 'items.1', 'named.gain', 'block.token']
    network = add_lora(copy.deepcopy(base), LoRAConfig(groups=['all'], also_train=['parameters']))
    assert torch.equal(network(x), base(x)) and left_alone(network) == []
    mark_trainable(network)
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for name in names:
            owner, _, last = name.rpartition('.')
            delta = network.get_parameter(f'{owner}.lora_shift_{last}'.lstrip('.')).normal_()
            expected.get_parameter(name).add_(delta)
    trains = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trains == {'block.0.lora_A', 'block.0.lora_B'} | {
        '.'.join([*name.split('.')[:-1], f'lora_shift_{name.split(".")[-1]}']) for name in names
    }
    torch.testing.assert_close(network(x), expected(x))
    assert is_same(merge_state_dict(network.state_dict()), expected.state_dict())
    again = copy.deepcopy(base)
    load_adapter(again, extract_adapter(network.state_dict()))
    assert torch.equal(again(x), network(x))
    assert is_same(merge_lora(network).state_dict(), expected.state_dict())

    config = LoRAConfig(['block.0'], also_train=['parameters'], exclude_modules=['items', 'named', 'act'])
    excluded = add_lora(copy.deepcopy(base), config)
    assert [name for name, _ in adapted_modules(excluded)] == ['', 'block', 'block.0']
    with pytest.raises(InputError, match='has "parameters", but Sequential has nothing of that kind'):
        add_lora(nn.Sequential(nn.Linear(3, 3)), LoRAConfig(['0'], also_train=['parameters']))


def test_parameters_are_named_one_by_one():
    base = Everything()
    network = add_lora(copy.deepcopy(base), LoRAConfig(target_parameters=['gamma', r'block\.norm\d\.bias', 'tail.*']))
    assert set(network.state_dict()) - set(base.state_dict()) == {
        *('lora_shift_gamma', 'block.norm1.lora_shift_bias', 'block.norm2.lora_shift_bias'),
        *('tail.lora_shift_weight', 'tail.lora_shift_bias'),
    }
    again = add_lora(copy.deepcopy(base), infer_lora_config(trained(network).state_dict()))
    again.load_state_dict(network.state_dict())
    assert is_same(again.state_dict(), network.state_dict())
    mark_trainable(network)
    assert not is_same(merge_lora(network).state_dict(), base.state_dict())
    for config, message in (
        ({'target_parameters': ['gama']}, 'target_parameters "gama" matches no parameter .* near names are gamma'),
        ({'target_modules': ['tail'], 'target_parameters': [r'tail\.weight']}, 'matches no parameter that can carry'),
        ({'target_parameters': [r'normed\.weight_v']}, 'matches no parameter that can carry'),
    ):
        other = Everything()
        other.normed = nn.utils.weight_norm(nn.Linear(3, 3))
        with pytest.raises(InputError, match=message):
            add_lora(other, LoRAConfig(**config))
    add_lora(network, LoRAConfig(target_parameters=['gamma']))
    with pytest.raises(InputError, match='"gamma" carries a delta already'):
        add_lora(network, LoRAConfig(groups=['all'], also_train=['parameters']))
    assert not list(lora_layers(network))


@pytest.mark.parametrize(
    ('layer', 'columns'),
    [
        (nn.Conv2d(6, 6, 5, groups=6), 25),
        (nn.Conv2d(6, 12, (3, 5), groups=6), 15),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), 9),
        (nn.Conv1d(6, 6, 4, groups=6), 4),
    ],
    ids=['depthwise', 'several of each channel', 'transposed', '1-D'],
)
def test_the_kernels_of_channels_by_themselves_are_the_rows_of_a_matrix(layer, columns):
    layer = layer.double()
    network = nn.Sequential(copy.deepcopy(layer))
    add_lora(network, LoRAConfig(['0'], rank=2, alpha=3))
    lora = network[0]
    channels = len(layer.weight)
    assert lora.lora_A.shape == (2, columns) and lora.lora_B.shape == (channels, 2)
    assert lora.lora_A.numel() + lora.lora_B.numel() < layer.weight.numel() or columns < 6
    x = torch.randn(1, 6, *[9] * (layer.weight.ndim - 2), dtype=torch.float64)
    assert torch.equal(network(x), layer(x))
    nn.init.normal_(lora.lora_B)
    kernels = layer.weight.detach().numpy().reshape(channels, -1).copy()
    for channel in range(channels):  # by the definition, a kernel at a time
        for unit in range(2):
            kernels[channel] += 3 / 2 * lora.lora_B[channel, unit].item() * lora.lora_A[unit].detach().numpy()
    state = network.state_dict()
    np.testing.assert_allclose(merge_state_dict(state)['0.weight'].reshape(channels, -1), kernels, rtol=1e-12)
    assert infer_lora_config(state).rank == 2
    again = add_lora(nn.Sequential(copy.deepcopy(layer)), infer_lora_config(state))
    again.load_state_dict(state)
    assert torch.equal(again(x), network(x))
    on_base = nn.Sequential(copy.deepcopy(layer))
    load_adapter(on_base, extract_adapter(network))
    assert torch.equal(on_base(x), network(x)) and torch.equal(merge_lora(network)(x), on_base(x))


@pytest.mark.parametrize('make', [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_depthwise_convolutions_train_their_whole_weight(make):
    torch.manual_seed(0)
    base = nn.Sequential(make(4, 6, 1), make(6, 6, 3, groups=6), make(6, 6, 3, groups=6), make(6, 6, 1, groups=3))
    config = LoRAConfig(groups=['all'], rank=1, also_train=['depthwise', 'bias'], exclude_modules=['2'])
    network = trained(add_lora(copy.deepcopy(base), config))
    assert [name for name, _ in lora_layers(network)] == ['0', '3']
    assert [name for name, _ in adapted_modules(network)] == ['0', '1', '3']
    assert network[1].lora_shift_weight.shape == base[1].weight.shape and network[1].lora_shift_bias.shape == (6,)
    merged = merge_state_dict(network.state_dict())
    torch.testing.assert_close(merged['1.weight'], base[1].weight + network[1].lora_shift_weight)
    assert torch.equal(merged['2.weight'], base[2].weight)
    assert is_same(merge_lora(network).state_dict(), merged)
    assert left_alone(add_lora(copy.deepcopy(base), LoRAConfig(['0'], also_train=['depthwise']))) == []
    ranks = {'0': 0, '2': 0}
    few = add_lora(copy.deepcopy(base), LoRAConfig(groups=['all'], rank_pattern=ranks, also_train=['depthwise']))
    assert [name for name, _ in adapted_modules(few)] == ['1', '3']
    alone = add_lora(copy.deepcopy(base), LoRAConfig(['1'], also_train=['depthwise'], exclude_modules=['2']))
    assert [name for name, _ in adapted_modules(alone)] == ['1'] and not list(lora_layers(alone))
    mark_trainable(alone)
    assert count_parameters(alone).trainable == base[1].weight.numel()
    assert list(layer_groups(alone)) == ['0', '2', '3']  # what carries a delta of its weight cannot carry LoRA
    widening = nn.Sequential(make(6, 6, 1), make(6, 12, 3, groups=6))
    with pytest.raises(InputError, match='"depthwise", but Sequential has nothing of that kind'):
        add_lora(widening, LoRAConfig(['0'], also_train=['depthwise']))


class Own(nn.Conv2d):
    """A subclass, which may use its weight otherwise."""


def test_what_is_left_alone_is_said_by_name_and_size(caplog):
    network = nn.ModuleDict(
        {
            'plain': nn.Conv2d(3, 4, 3),
            'own': Own(3, 4, 3),
            'normed': nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            'memory': nn.LSTM(3, 4),
            'cross': nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            'sparse': nn.Embedding(5, 4, sparse=True),
            'bounded': nn.Embedding(5, 4, max_norm=1.0),
            'norm': nn.GroupNorm(2, 4),
            'act': nn.PReLU(),
        }
    )
    network['twin'] = Own(3, 4, 3)
    network['twin'].weight = network['own'].weight
    expected = [
        ('own', 'Own', 112),
        ('normed', 'ParametrizedConv2d', 4 + 4 + 108),
        ('memory', 'LSTM', 4 * (12 + 16 + 4 + 4)),
        ('cross', 'MultiheadAttention', 16 + 12 + 20 + 12),
        ('sparse', 'Embedding', 20),
        ('bounded', 'Embedding', 20),
        ('twin', 'Own', 4),
    ]
    assert left_alone(network) == expected
    with caplog.at_level(logging.INFO, 'lora_sr'):
        add_lora(network, LoRAConfig(groups=['all']))
    assert left_alone(network) == expected
    (record,) = (record for record in caplog.records if record.message.startswith('Left alone'))
    assert 'own (Own, 112 parameters), normed (ParametrizedConv2d, 116 parameters), memory (LSTM, 144' in record.message
    assert [name for name, _ in lora_layers(network)] == ['plain', 'cross.out_proj']
    caplog.clear()
    with caplog.at_level(logging.INFO, 'lora_sr'):
        add_lora(Everything(), ALL)
    assert not any(record.message.startswith('Left alone') for record in caplog.records)
    with pytest.raises(InputError, match='"cross" matches "cross", a MultiheadAttention, which cannot carry LoRA'):
        add_lora(network, LoRAConfig(['cross']))


def test_a_rank_beyond_the_full_one_is_said_and_one_far_beyond_refused(caplog):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(32, 32))
    with pytest.raises(InputError, match=r'^LoRA rank must be at most 256, 8 times the full rank of 1, got 300\.$'):
        add_lora(network, LoRAConfig(groups=['all'], rank=300))
    assert not list(lora_layers(network))
    with caplog.at_level(logging.INFO, 'lora_sr'):
        add_lora(network, LoRAConfig(groups=['all'], rank=8))
    message = 'The rank exceeds the full rank of 1 of 2 layers: in 0 it is 8, where 3 reaches every update.'
    assert [record.message for record in caplog.records] == [message]
