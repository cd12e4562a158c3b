"""Gains beside LoRA: against the formula in float64, in networks, state dicts, files and mixes."""

import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from trained import trained

from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    apply_adapter,
    count_parameters,
    describe_lora,
    extract_adapter,
    infer_lora_config,
    load_adapter,
    mark_trainable,
    merge_adapter,
    merge_lora,
    merge_state_dict,
    mix_adapters,
    peft_layout,
    read_adapter,
    save_adapter,
    set_lora_scale,
)
from lora_sr.errors import InputError

CONFIG = dict(target_modules=['.*'], rank=2, alpha=3, also_train=['gain', 'bias'])


class Kinds(nn.Module):
    """Layers of each kind, of which one stands twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.linear = nn.Linear(5, 8)
        self.again = self.linear
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(4, 8)

    def forward(self, x):
        x = self.up(self.depthwise(self.grouped(self.conv(x)))).flatten(2).transpose(1, 2)
        x = self.linear(x) + self.table(torch.arange(4)).sum(0)
        return self.attention(x, x, x)[0]


@pytest.fixture
def networks():
    torch.manual_seed(0)
    base = Kinds().eval()
    return base, trained(add_lora(copy.deepcopy(base), LoRAConfig(**CONFIG)))


def expected(base, network, strength=1.0):
    """The weights by the formula, in float64."""
    state, found = network.state_dict(), {}
    for key, weight in base.state_dict().items():
        name, _, last = key.rpartition('.')
        if f'{name}.lora_gain' in state and last in ('weight', 'in_proj_weight'):
            lora_A, lora_B, gain = (state[f'{name}.lora_{part}'].double() for part in ('A', 'B', 'gain'))
            rows = gain.reshape(-1, *[1] * (weight.ndim - 1))
            update = (lora_B @ lora_A).reshape(weight.shape) * (3 / 2) + rows * weight.double()
            found[key] = weight.double() + strength * update
        else:
            shift = state.get(f'{name}.lora_shift_{last}')
            found[key] = weight.double() if shift is None else weight.double() + strength * shift.double()
    return found


def output(state):
    network = Kinds().double().eval()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(images().double())


def images():
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_each_row_of_a_weight_has_a_factor(networks):
    base, network = networks
    gains = {key: value for key, value in network.state_dict().items() if key.endswith('.lora_gain')}
    sizes = {'conv': 6, 'grouped': 6, 'depthwise': 6, 'up': 6, 'linear': 8, 'again': 8, 'table': 4}
    sizes.update({'attention': 24, 'attention.out_proj': 8})
    assert {key.removesuffix('.lora_gain'): len(value) for key, value in gains.items()} == sizes
    for strength in (1.0, 0.5, -2.0):
        set_lora_scale(network, strength)
        exact = copy.deepcopy(network).double()(images().double())
        torch.testing.assert_close(exact, output(expected(base, network, strength)), rtol=1e-9, atol=1e-9)
    set_lora_scale(network, 0)
    assert torch.equal(network(images()), base(images()))


def test_the_start_is_the_base_and_gains_train():
    torch.manual_seed(0)
    base = Kinds().eval()
    network = add_lora(copy.deepcopy(base), LoRAConfig(**CONFIG))
    mark_trainable(network)
    assert torch.equal(network(images()), base(images()))
    network(images()).square().sum().backward()
    # Where B is zero, the gradient of a gain is that of the weight along each of its rows.
    plain = copy.deepcopy(base)
    plain(images()).square().sum().backward()
    for name in ('conv', 'grouped', 'depthwise', 'up', 'linear', 'table'):
        layer = plain.get_submodule(name)
        rows = (layer.weight.grad * layer.weight.detach()).flatten(1).sum(1)
        torch.testing.assert_close(network.get_submodule(name).lora_gain.grad, rows, rtol=1e-4, atol=1e-5)
    without = add_lora(copy.deepcopy(base), LoRAConfig(**{**CONFIG, 'also_train': ['bias']}))
    assert count_parameters(network).lora - count_parameters(without).lora == 6 * 4 + 8 + 24 + 8 + 4


@torch.no_grad()
def test_merging_gives_the_weights_of_the_formula(networks):
    base, network = networks
    wanted, state = expected(base, network), network.state_dict()
    merged = merge_state_dict(state)
    for key, value in merged.items():
        torch.testing.assert_close(value.double(), wanted[key], rtol=1e-6, atol=1e-6)
    assert infer_lora_config(state).also_train == describe_lora(network).also_train == ['gain']
    live = merge_lora(network)
    assert all(torch.equal(value, merged[key]) for key, value in live.state_dict().items())


@torch.no_grad()
def test_adapters_have_gains_in_files_and_mixes(networks, tmp_path):
    base, network = networks
    adapter = extract_adapter(network)
    save_adapter(network, tmp_path / 'a.safetensors')
    read = read_adapter(tmp_path / 'a.safetensors', base.state_dict())
    assert read.tensors.keys() == adapter.tensors.keys()
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path / 'a.safetensors')
    assert torch.equal(fresh(images()), network(images()))

    other = trained(add_lora(copy.deepcopy(base), LoRAConfig(['conv', 'up'], rank=1, also_train=['gain'])), seed=5)
    first, second = merge_adapter(base.state_dict(), adapter), merge_adapter(base.state_dict(), extract_adapter(other))
    mixed = merge_adapter(base.state_dict(), mix_adapters([(adapter, 0.3), (extract_adapter(other), -1.5)]))
    for key, value in base.state_dict().items():
        wanted = value + 0.3 * (first[key] - value) - 1.5 * (second[key] - value)
        torch.testing.assert_close(mixed[key], wanted, rtol=1e-5, atol=1e-5)
    plain = trained(add_lora(copy.deepcopy(base), LoRAConfig(['conv', 'linear'], rank=1)))
    both = mix_adapters([(extract_adapter(other), 1.0), (extract_adapter(plain), 1.0)])
    adapted = add_lora(copy.deepcopy(base), infer_lora_config(apply_adapter(base.state_dict(), both)))
    adapted.load_state_dict(apply_adapter(base.state_dict(), both))  # of gains that are missing nothing changes
    merged = merge_lora(adapted).state_dict()
    for key, value in merge_adapter(base.state_dict(), both).items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-6)


def test_gains_that_fit_nothing(networks):
    base, network = networks
    adapter = extract_adapter(network)
    wide = {**base.state_dict(), 'linear.weight': torch.zeros(8, 5)}
    adapter.tensors['conv.lora_gain'] = torch.ones(5)
    with pytest.raises(InputError, match='conv has 6 rows here, the adapter gains of 5'):
        apply_adapter(wide, adapter)
    state = {**network.state_dict(), 'conv.lora_gain': torch.ones(5)}
    with pytest.raises(InputError, match=re.escape('the gain of "conv" must be 6 floating-point numbers')):
        merge_state_dict(state)
    alone = {**base.state_dict(), 'conv.lora_gain': torch.ones(6)}
    with pytest.raises(InputError, match='"conv" carries LoRA but lacks lora_A and lora_B and lora_alpha'):
        merge_state_dict(alone)
    delta = trained(add_lora(copy.deepcopy(base), LoRAConfig(target_parameters=['conv.weight'])))
    with pytest.raises(InputError, match='one has the gain of "conv", another the delta of its weight'):
        mix_adapters([(extract_adapter(network), 1.0), (extract_adapter(delta), 1.0)])
    with pytest.raises(InputError, match='has "gain", but Kinds has nothing of that kind'):
        add_lora(base, LoRAConfig(target_parameters=['conv.weight'], also_train=['gain']))


@pytest.mark.filterwarnings('ignore:LoRA adapter added to ConvNd')
@torch.no_grad()
def test_peft_computes_the_same(tmp_path):
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval()
    config = LoRAConfig(['.*'], rank=1, also_train=['gain'])
    network = trained(add_lora(copy.deepcopy(base), config))
    tensors, section = peft_layout(extract_adapter(network), base)
    save_file(tensors, tmp_path / 'adapter_model.safetensors')
    peft.LoraConfig.from_peft_type(**section).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(images()), network(images()), rtol=1e-4, atol=1e-5)
