"""Parameters that modules share: one update under every name, or a refusal."""

import copy

import pytest
import torch
from torch import nn
from trained import is_same, trained

from lora_sr.adapters import (
    LoRAConfig,
    adapted_modules,
    add_lora,
    count_parameters,
    extract_adapter,
    infer_lora_config,
    load_adapter,
    lora_layers,
    merge_adapter,
    merge_lora,
    merge_state_dict,
    read_adapter,
    remove_lora,
    save_adapter,
)
from lora_sr.errors import InputError

ALL = LoRAConfig(groups=['all'], rank=2, alpha=3)


class Tied(nn.Module):
    """An embedding and the linear layer that undoes it; two convolutions that share both of their tensors."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.first, self.second = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.table.weight
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, indices):
        x = self.table(indices).transpose(1, 2)
        return self.head(self.second(self.first(x).tanh()).transpose(1, 2))


def assert_tied(network):
    assert network.head.weight is network.table.weight and network.first.weight is network.second.weight
    assert network.first.bias is network.second.bias


TIED = LoRAConfig(groups=['all'], rank=2, alpha=3, also_train=['bias'])
WORDS = torch.tensor([[0, 3, 8, 1, 1], [2, 5, 7, 7, 8]])


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return Tied()


def test_layers_that_share_a_weight_share_its_update(tied, tmp_path):
    base, before = copy.deepcopy(tied), tied(WORDS)
    plain = count_parameters(tied)
    add_lora(tied, TIED)
    assert torch.equal(tied(WORDS), before)
    for one, other in ((tied.table, tied.head), (tied.first, tied.second)):
        assert one.lora_A is other.lora_A and one.lora_B is other.lora_B and one.lora_alpha is other.lora_alpha
    assert tied.first.lora_shift_bias is tied.second.lora_shift_bias
    lora = 2 * (4 + 9) + 2 * (4 + 12) + 4 + 9
    counts = count_parameters(tied)
    assert counts.lora == lora and counts.total == plain.total + lora
    trained(tied)
    after = tied(WORDS)

    # One update of one weight: as if the base's own tied tensors had moved.
    moved = copy.deepcopy(base).double()
    with torch.no_grad():
        for name in ('table', 'first'):
            layer = tied.get_submodule(name)
            update = 3 / 2 * layer.lora_B.double() @ layer.lora_A.double()
            moved.get_submodule(name).weight.add_(update.view(layer.weight.shape))
        moved.first.bias.add_(tied.first.lora_shift_bias)
        moved.head.bias.add_(tied.head.lora_shift_bias)
    torch.testing.assert_close(after.double(), moved(WORDS), rtol=1e-5, atol=1e-5)

    state = tied.state_dict()
    assert {'table.lora_A', 'head.lora_A', 'first.lora_shift_bias', 'second.lora_shift_bias'} <= set(state)
    by_keys = merge_state_dict(state)
    assert by_keys['head.weight'] is by_keys['table.weight'] and by_keys['second.bias'] is by_keys['first.bias']
    copied = copy.deepcopy(tied)
    assert copied.table.lora_A is copied.head.lora_A
    merged = merge_lora(copied)
    assert_tied(merged)
    assert torch.equal(merged(WORDS), after) and is_same(merged.state_dict(), by_keys)
    plain_again = Tied()
    plain_again.load_state_dict(by_keys)
    assert torch.equal(plain_again(WORDS), after)

    torch.save(state, tmp_path / 'net.pth')
    read = torch.load(tmp_path / 'net.pth', weights_only=True)
    assert is_same(merge_state_dict(read), by_keys)
    built = add_lora(Tied(), infer_lora_config(read))
    built.load_state_dict(read)
    assert torch.equal(built(WORDS), after) and built.table.lora_A is built.head.lora_A
    save_adapter(tied, tmp_path / 'a.safetensors')
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path / 'a.safetensors')
    assert torch.equal(loaded(WORDS), after) and loaded.table.lora_A is loaded.head.lora_A
    assert is_same(merge_adapter(base.state_dict(), read_adapter(tmp_path / 'a.safetensors')), by_keys)
    assert_tied(remove_lora(loaded))
    assert torch.equal(loaded(WORDS), before)


def test_a_shared_update_has_the_gradient_of_all_its_places(tied):
    apart = copy.deepcopy(tied)
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    apart.second.weight = nn.Parameter(apart.second.weight.detach().clone())
    trained(add_lora(tied, ALL))
    add_lora(apart, ALL).load_state_dict(tied.state_dict())
    for network in (tied, apart):
        network(WORDS).square().mean().backward()
    for one, other in (('table', 'head'), ('first', 'second')):
        for tensor in ('lora_A', 'lora_B'):
            parts = [apart.get_parameter(f'{name}.{tensor}').grad for name in (one, other)]
            assert all(part.abs().max() > 1e-6 for part in parts)
            torch.testing.assert_close(tied.get_parameter(f'{one}.{tensor}').grad, sum(parts))


@pytest.mark.parametrize(
    'config',
    [
        {'exclude_modules': ['head']},
        {'rank_pattern': {'head': 1}},
        {'rank_pattern': {'table': 0}},
        {'alpha_pattern': {'table': 7}},
        {'exclude_modules': ['head', 'table'], 'target_parameters': [r'head\.weight']},
    ],
    ids=str,
)
def test_a_shared_weight_that_would_part_is_refused(tied, config):
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(InputError, match='table.weight and head.weight are one tensor, .* exclude all of them, '):
        add_lora(tied, LoRAConfig(groups=['all'], **config))
    assert is_same(tied.state_dict(), before) and not list(adapted_modules(tied))


def test_other_ties_that_would_part_are_refused(tied):
    excluded = add_lora(copy.deepcopy(tied), LoRAConfig(groups=['all'], exclude_modules=['head', 'table']))
    assert [name for name, _ in lora_layers(excluded)] == ['first', 'second']
    # Another number of groups is another matrix; a subclass has no update at all.
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3))
    grouped[1].weight = grouped[0].weight
    with pytest.raises(InputError, match='0.weight and 1.weight are one tensor'):
        add_lora(grouped, ALL)
    subclass = nn.Sequential(nn.Conv2d(3, 3, 1), type('Own', (nn.Conv2d,), {})(3, 3, 1))
    subclass[1].weight = subclass[0].weight
    with pytest.raises(InputError, match='0.weight and 1.weight are one tensor'):
        add_lora(subclass, ALL)
    norms = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Bilinear(4, 1, 4))
    norms[2].bias = norms[1].bias
    with pytest.raises(InputError, match='1.bias and 2.bias are one tensor'):
        add_lora(norms, LoRAConfig(['0'], also_train=['norm']))


def test_merging_cannot_part_what_was_tied_afterwards_or_before(tied):
    apart = Tied()
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    add_lora(apart, LoRAConfig(['table']))
    apart.head.weight = apart.table.base_parameter('weight')
    with pytest.raises(InputError, match='table.weight and head.weight are one tensor'):
        merge_lora(apart)
    assert [name for name, _ in lora_layers(apart)] == ['table']
    # A checkpoint of the time when one of the two could be excluded.
    with pytest.raises(InputError, match='table.weight and head.weight are one tensor, but are not updated alike'):
        merge_state_dict(apart.state_dict())
    with pytest.raises(
        InputError, match='does not fit Tied: table.weight and head.weight are one tensor, which must be'
    ):
        load_adapter(tied, extract_adapter(apart))
    assert not list(adapted_modules(tied))
    state = trained(add_lora(copy.deepcopy(tied), TIED)).state_dict()
    state['head.lora_B'] = state['head.lora_B'] + 1
    with pytest.raises(InputError, match='table.weight and head.weight are one tensor, but are not updated alike'):
        merge_state_dict(state)


def test_a_module_under_two_names_is_described_by_either():
    torch.manual_seed(0)
    conv = nn.Conv1d(3, 3, 1)
    base = nn.Sequential(conv, nn.Conv1d(3, 3, 1), conv)
    config = LoRAConfig(groups=['all'], rank=2, rank_pattern={'1': 1}, also_train=['bias'])
    network = trained(add_lora(copy.deepcopy(base), config))
    built = add_lora(copy.deepcopy(base), infer_lora_config(network.state_dict()))
    built.load_state_dict(network.state_dict())
    load_adapter(base, extract_adapter(network))
    x = torch.randn(1, 3, 4)
    assert torch.equal(built(x), network(x)) and torch.equal(base(x), network(x))
    assert built[0] is built[2] and is_same(merge_state_dict(network.state_dict()), merge_lora(built).state_dict())
