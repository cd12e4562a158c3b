"""LoRA: against the authors' layer, against float64, and against what a user would do wrong."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lora_sr.adapters import (
    LoRAConfig,
    LoRAConv2d,
    LoRALinear,
    add_lora,
    count_parameters,
    describe_lora,
    left_alone,
    load_adapter,
    lora_layers,
    mark_trainable,
    merge_lora,
    merge_state_dict,
    remove_lora,
    save_adapter,
    set_lora_scale,
)
from lora_sr.errors import InputError


class Small(nn.Module):
    """Every kind of layer that matters here: plain, strided, grouped, depth-wise and dilated convolutions, linear."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8),
            nn.GELU(),
            nn.Conv2d(8, 12, (1, 3), stride=2, padding=(0, 1), groups=4, bias=False),
            nn.BatchNorm2d(12),
        )
        self.up = nn.ConvTranspose2d(12, 4, 2, 2)
        self.tail = nn.Linear(4, 5)

    def forward(self, x):
        return self.tail(self.up(self.body(self.head(x))).permute(0, 2, 3, 1))


ALL = LoRAConfig(['.*'], rank=3, alpha=5)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Small().eval()


def trained(network):
    """Pretend that training moved the LoRA tensors."""
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.1)
    return network


@pytest.mark.parametrize('kernel', ['k1', 'k3', 'k5'])
def test_convolution_equals_the_authors_layer(shared, kernel):
    golden = np.load(shared / 'golden/convlora.npz')
    tensors = {
        name: torch.from_numpy(golden[f'{kernel}.{name}']) for name in ('weight', 'bias', 'lora_A', 'lora_B', 'x', 'y')
    }
    size, rank, alpha = golden[f'{kernel}.meta'].tolist()
    out_channels, in_channels = tensors['weight'].shape[:2]
    layer = LoRAConv2d(nn.Conv2d(in_channels, out_channels, size, padding=size // 2), rank, alpha)
    assert layer.lora_A.shape == tensors['lora_A'].shape and layer.lora_B.shape == tensors['lora_B'].shape
    layer.load_state_dict({name: tensors[name] for name in ('weight', 'bias', 'lora_A', 'lora_B')})
    assert (layer(tensors['x']) - tensors['y']).abs().max() <= 1e-5


def test_linear_equals_the_formula():
    torch.manual_seed(0)
    base = nn.Linear(6, 4).double()
    layer = LoRALinear(base, rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = base(x) + 3 / 2 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


def test_adding_lora_leaves_the_output_bit_equal_and_trains_lora_only(network):
    x = torch.randn(2, 3, 12, 10)
    before = network(x)
    names = set(network.state_dict())
    add_lora(network, ALL)
    assert torch.equal(network(x), before)
    adapted = {name for name, _ in lora_layers(network)}
    assert adapted == {'head', 'body.0', 'body.2', 'up', 'tail'}
    added = {f'{name}.{tensor}' for name in adapted for tensor in ('lora_A', 'lora_B', 'lora_alpha')}
    assert set(network.state_dict()) == names | added

    mark_trainable(network)
    trains = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trains == {f'{name}.{tensor}' for name in adapted for tensor in ('lora_A', 'lora_B')}
    network(x).square().mean().backward()
    # At the start B is zero, so the gradient reaches B only.
    assert all(layer.lora_B.grad.abs().sum() > 0 for _, layer in lora_layers(network))
    assert network.head.base_parameter('weight').grad is None


def test_initialization_is_kaiming_uniform_and_zero():
    torch.manual_seed(0)
    layer = LoRAConv2d(nn.Conv2d(64, 64, 3), rank=16, alpha=1)
    bound = 1 / (64 * 3) ** 0.5  # kaiming_uniform_ with a = sqrt(5) over a fan-in of in * k
    assert layer.lora_A.abs().max() <= bound and abs(layer.lora_A.std().item() - bound / 3**0.5) < 0.01 * bound
    assert not layer.lora_B.any()


@torch.no_grad()
def test_deltas_beside_lora_train_merge_and_load():
    """A bias, a normalization layer and a table of positions, against the same numbers put into the base by hand."""

    class WithTable(Small):
        def __init__(self):
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return super().forward(x) + self.relative_position_bias_table

    # Frozen: where a parameter wants a gradient torch takes another kernel, which rounds differently.
    base = WithTable().eval().requires_grad_(False)
    adapted = add_lora(copy.deepcopy(base), LoRAConfig(['head'], also_train=['bias', 'norm', 'position']))
    mark_trainable(adapted)
    x = torch.randn(2, 3, 12, 10)
    assert torch.equal(adapted(x), base(x))
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with_delta = {'head.bias', 'body.3.weight', 'body.3.bias', 'relative_position_bias_table'}
    assert trains == {'head.lora_A', 'head.lora_B'} | {
        '.'.join([*name.split('.')[:-1], f'lora_shift_{name.split(".")[-1]}']) for name in with_delta
    }

    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        for name in with_delta:
            *path, last = name.split('.')
            delta = dict(adapted.named_parameters())['.'.join([*path, f'lora_shift_{last}'])].normal_()
            by_hand.get_parameter(name).add_(delta)
    torch.testing.assert_close(adapted(x), by_hand(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(adapted(x), base(x), atol=1e-2)

    state = adapted.state_dict()
    merged = merge_lora(copy.deepcopy(adapted))
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(merged(x), adapted(x))
    by_keys = merge_state_dict(state)
    assert by_keys.keys() == base.state_dict().keys()
    assert all(torch.equal(value, by_keys[key]) for key, value in merged.state_dict().items())
    again = add_lora(copy.deepcopy(base), describe_lora(adapted))
    again.load_state_dict(state)
    assert torch.equal(again(x), adapted(x))
    set_lora_scale(adapted, 0)
    assert torch.equal(adapted(x), base(x))
    assert torch.equal(remove_lora(adapted)(x), base(x))
    adapted = add_lora(copy.deepcopy(base), LoRAConfig(['head'], also_train=['bias']))
    adapted.load_state_dict(base.state_dict())  # strictly


def test_whoever_reads_the_weight_of_a_layer_reads_the_updated_one(network):
    """As the branches of reparameterized networks do: a functional convolution with the layer's weight."""
    x = torch.randn(1, 3, 8, 8)
    trained(add_lora(network, ALL))
    head = network.head
    by_formula = head.base_parameter('weight') + 5 / 3 * (head.lora_B @ head.lora_A).view(8, 3, 3, 3)
    torch.testing.assert_close(head.weight, by_formula)
    assert torch.equal(nn.functional.conv2d(x, head.weight, head.bias, padding=1), head(x))


def test_a_replica_computes_what_its_layer_computes(network):
    """DataParallel makes replicas, whose tensors are attributes (torch/nn/parallel/replicate.py)."""
    layer = trained(add_lora(network, LoRAConfig(['head'], also_train=['bias']))).head
    with torch.no_grad():
        layer.lora_shift_bias.normal_()
    replica = layer._replicate_for_data_parallel()
    for name, value in layer.named_parameters(recurse=False):
        setattr(replica, name, value.detach().clone())
    for name, value in layer.named_buffers(recurse=False):
        setattr(replica, name, value.clone())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(replica(x), layer(x))


@pytest.mark.parametrize('rank', [1, 2, 16])
def test_merged_equals_adapted_and_has_the_base_names(network, rank):
    names = list(network.state_dict())
    trained(add_lora(network, LoRAConfig(['.*'], rank=rank, alpha=2.5)))
    x = torch.randn(2, 3, 12, 10)
    adapted = network(x)
    merged = merge_lora(copy.deepcopy(network))
    assert list(merged.state_dict()) == names and type(merged.head) is nn.Conv2d and type(merged.tail) is nn.Linear
    assert torch.equal(merged(x), adapted)
    assert (adapted - remove_lora(network)(x)).abs().max() > 1e-3


def test_scale_runs_from_the_base_to_the_adapted_network_and_merges_as_set(network):
    x = torch.randn(1, 3, 12, 10)
    base = network(x)
    trained(add_lora(network, LoRAConfig(['tail'], rank=2)))
    adapted = network(x)
    set_lora_scale(network, 0)
    assert torch.equal(network(x), base)
    set_lora_scale(network, 0.5)
    torch.testing.assert_close(network(x), (base + adapted) / 2)
    torch.testing.assert_close(merge_lora(network)(x), (base + adapted) / 2)


def test_patterns_exclusions_and_overrides(network):
    config = LoRAConfig(
        [r'body\.\d', 'tail', 'head'],
        rank=4,
        alpha=8,
        exclude_modules=['body.0'],
        rank_pattern={'tail': 2},
        alpha_pattern={'h.*': 1},
    )
    add_lora(network, config)
    assert {name: (layer.rank, layer.lora_alpha.item()) for name, layer in lora_layers(network)} == {
        'head': (4, 1.0),
        'body.2': (4, 8.0),
        'tail': (2, 8.0),
    }
    counts = count_parameters(network)
    sizes = {'head': 4 * 3 * (3 * 3 + 8 * 3), 'body.2': 4 * (8 * 3) + (12 // 4) * 4, 'tail': 2 * (4 + 5)}
    assert counts.lora == sum(sizes.values()) and counts.trainable == counts.total


def test_base_checkpoint_loads_strictly_and_half_an_adapter_does_not(network):
    base = copy.deepcopy(network.state_dict())
    add_lora(network, ALL)
    network.load_state_dict(base)
    with pytest.raises(RuntimeError, match='head.lora_B'):
        network.load_state_dict({**base, 'head.lora_A': network.head.lora_A})


def test_module_that_stands_twice_is_adapted_and_merged_twice():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    network = trained(add_lora(nn.Sequential(conv, nn.ReLU(), conv), LoRAConfig(['0'], rank=2)))
    assert network[0] is network[2] and isinstance(network[2], LoRAConv2d)
    x = torch.randn(1, 4, 6, 6)
    adapted = network(x)
    merge_lora(network)
    assert network[0] is network[2] and torch.equal(network(x), adapted)


def test_computed_weights_cannot_carry_lora():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.utils.weight_norm(nn.Conv2d(3, 3, 1)))
    with pytest.raises(InputError, match='"1" matches "1", a Conv2d, which cannot carry LoRA'):
        add_lora(network, LoRAConfig(['1']))
    assert [name for name, _ in lora_layers(add_lora(network, LoRAConfig(['.*'])))] == ['0']


def test_layers_of_no_values_are_passed_over():
    """As in an RGT that is too narrow for the divisions of its width."""

    class Narrow(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    empty = [nn.Conv2d(4, 0, 1), nn.Linear(0, 4), nn.Linear(0, 0), nn.ConvTranspose2d(0, 2, 3), nn.Embedding(0, 3)]
    network = add_lora(Narrow(nn.Conv2d(4, 4, 3), *empty), LoRAConfig(groups=['all'], rank=2))
    assert [name for name, _ in lora_layers(network)] == ['0']
    assert left_alone(network) == [('2', 'Linear', 4), ('4', 'ConvTranspose2d', 2)]  # their biases
    merge_lora(network)
    with pytest.raises(InputError, match='matches "1", a Conv2d, which cannot carry LoRA'):
        add_lora(network, LoRAConfig(['1'], rank=2))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_merges_to_the_bit(dtype):
    torch.manual_seed(0)
    network = trained(add_lora(nn.Sequential(nn.Conv2d(3, 5, (3, 1), padding='same')), ALL)).to(dtype)
    x = torch.randn(1, 3, 6, 6, dtype=dtype)
    adapted = network(x)
    assert torch.equal(merge_lora(network)(x), adapted)


def test_what_was_frozen_stays_frozen_after_merging(network):
    network.head.weight.requires_grad_(False)
    merge_lora(add_lora(network, ALL))
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {'head.weight'}


@pytest.mark.parametrize(
    'config, message',
    [
        ({'target_modules': ['boddy.0']}, r'"boddy.0" matches no module .* near names are body\.'),
        ({'target_modules': [r'body\.3']}, r'matches "body\.3", a BatchNorm2d, which cannot carry LoRA \(Conv1d, '),
        ({'target_modules': ['body']}, r'"body" matches "body", a Sequential.*inside it are body\.0, body\.2'),
        ({'target_modules': ['.*'], 'exclude_modules': ['tial']}, 'exclude_modules "tial" matches no module'),
        ({'target_modules': ['.*'], 'exclude_modules': ['.*']}, 'leave nothing'),
        ({'target_modules': ['tail'], 'rank_pattern': {'head': 4}}, 'rank_pattern "head" matches none of the adapted'),
        ({'target_modules': ['tail'], 'rank': 0}, '"rank" must be an integer of at least 1, got 0'),
        ({'target_modules': ['tail'], 'rank_pattern': {'tail': -1}}, '"tail" must be an integer of at least 0, got -1'),
        ({'target_modules': ['tail'], 'alpha': 0}, r'"alpha" must be a number of at most 1e\+30 other than 0, got 0'),
        ({'target_modules': ['(']}, 'is not a regular expression'),
        ({'target_modules': []}, 'neither groups nor'),
        ({'target_modules': ['tail'], 'rnak': 4}, 'did you mean "rank"'),
        ({'rank': 4}, 'neither groups nor'),
    ],
)
def test_wrong_configurations_name_what_is_wrong(network, config, message):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=message):
        add_lora(network, LoRAConfig.from_dict(config))
    assert network.state_dict().keys() == before.keys()


def test_verbs_refuse_a_network_without_lora(network):
    for verb in (mark_trainable, merge_lora, describe_lora, lambda n: set_lora_scale(n, 1)):
        with pytest.raises(InputError, match='carries LoRA'):
            verb(network)
    add_lora(network, ALL)
    with pytest.raises(InputError, match='carries LoRA already'):
        add_lora(network, ALL)


def test_layers_with_deltas_go_through_pickle(network):
    add_lora(network, LoRAConfig(['head'], also_train=['bias', 'norm']))
    with torch.no_grad():
        network.head.lora_shift_bias.normal_()
        network.body[3].lora_shift_weight.normal_()
    again = pickle.loads(pickle.dumps(network.head)), pickle.loads(pickle.dumps(network.body[3]))
    assert type(again[0]) is type(network.head) and type(again[1]) is type(network.body[3])
    assert torch.equal(again[0].bias, network.head.bias) and torch.equal(again[1].weight, network.body[3].weight)


class Scaled(nn.Module):
    """A normalization whose parameters have names of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), ChannelNorm()

    def forward(self, x):
        return self.norm(self.conv(x))


class ChannelNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        return x / x.std() * self.gamma + self.beta


@torch.no_grad()
def test_a_norm_of_any_names_goes_through_its_adapter(tmp_path):
    network = add_lora(Scaled(), LoRAConfig(['conv'], rank=1, also_train=['norm']))
    network.norm.lora_shift_gamma.normal_()
    assert describe_lora(network).target_parameters == [r'norm\.beta', r'norm\.gamma']
    save_adapter(network, tmp_path / 'a.safetensors')
    other = Scaled()
    other.load_state_dict({key: value for key, value in network.state_dict().items() if '.lora_' not in key})
    load_adapter(other, tmp_path / 'a.safetensors')
    x = torch.rand(1, 3, 5, 5)
    assert torch.equal(other(x), network(x))


@pytest.mark.parametrize('normalize', [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_statistics_stay_frozen_until_the_updates_are_gone(normalize):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), normalize(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)).train()
    mark_trainable(add_lora(network, LoRAConfig(['0'], rank=1)))
    before = {name: value.clone() for name, value in network.named_buffers()}
    network(torch.rand(2, 3, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    merge_lora(network)
    assert all(module.training for module in network.modules())
    network(torch.rand(2, 3, 5, 5))
    assert not torch.equal(network[2].running_mean, before['2.running_mean'])
