"""Our adapters in PEFT's layout: loaded by PEFT itself, and against the updates in float64."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from trained import trained

from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    extract_adapter,
    merge_adapter,
    peft_layout,
    read_adapter,
)
from lora_sr.errors import InputError


class Tiny(nn.Module):
    """Kernels of all forms, groups, strides, an embedding, and a name that is the end of another."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, groups=4, stride=2),
            nn.Conv2d(12, 12, 5, padding=2, groups=12),
            nn.Conv2d(12, 8, 1),
            nn.Conv2d(8, 8, (1, 3)),
            nn.Conv2d(8, 8, (3, 1)),
        )
        self.inner, self.outer = (nn.ModuleDict({'head': nn.Conv2d(8, 8, 3, padding=1)}) for _ in range(2))
        self.table, self.tail = nn.Embedding(7, 5), nn.Linear(8, 5)

    def forward(self, x):
        x = self.outer['head'](self.inner['head'](self.body(self.head(x)))).permute(0, 2, 3, 1)
        return self.tail(x) + self.table(torch.arange(7)).sum(0)


RANKS = {'outer.*': 0, r'body\.[01]': 1, 'tail': 3}


@pytest.fixture
def networks():
    """A network, and itself with LoRA on all but one layer."""
    torch.manual_seed(0)
    base = Tiny().eval()
    config = LoRAConfig(['.*'], rank=2, alpha=3, rank_pattern=RANKS, alpha_pattern={'table': -0.5})
    return base, trained(add_lora(copy.deepcopy(base), config))


def write(folder, tensors, config):
    save_file(tensors, folder / 'adapter_model.safetensors')
    (folder / 'adapter_config.json').write_text(json.dumps(config))


@pytest.mark.filterwarnings('ignore:LoRA adapter added to ConvNd')
@pytest.mark.filterwarnings('error:Found missing adapter keys')
@torch.no_grad()
def test_peft_computes_the_same(networks, tmp_path):
    peft = pytest.importorskip('peft')
    base, network = networks
    write(tmp_path, *peft_layout(extract_adapter(network), base))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(2, 3, 18, 16)
    expected = network(x)
    assert (loaded(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (base(x) - expected).abs().max() > 0.1 * expected.abs().max()
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, 'lora_A')}
    assert adapted == set(extract_adapter(network).layers)  # outer.head is not, whose name ends in head


def test_what_is_written_is_read_again(networks, tmp_path):
    base, network = networks
    adapter, state = extract_adapter(network), base.state_dict()
    write(tmp_path, *peft_layout(adapter, base))
    again = merge_adapter(state, read_adapter(tmp_path, state))
    for key, value in merge_adapter(state, adapter).items():
        assert (again[key] - value).abs().max() <= 1e-6 * value.abs().max()


def test_ranks_stay_or_are_the_least_that_do(networks):
    base, network = networks
    tensors, config = peft_layout(extract_adapter(network), base)
    for name, module in base.named_modules():
        pattern = f'^{re.escape(name)}'
        down = tensors.get(f'base_model.model.{name}.lora_A.weight')
        if down is None:
            continue
        rank = config['rank_pattern'].get(pattern, config['r'])
        assert len(down) == rank
        lora_A, lora_B, alpha = extract_adapter(network).update_of(name)
        groups = getattr(module, 'groups', 1)
        update = (lora_B.double() @ lora_A.double()).reshape(module.weight.shape)
        if isinstance(module, nn.Linear) or module.kernel_size[0] == groups == 1:
            assert rank == network.get_submodule(name).rank and torch.equal(down.flatten(), lora_A.flatten())
        else:
            of_groups = update.reshape(groups, len(update) // groups, -1)
            assert rank == groups * torch.linalg.matrix_rank(of_groups).max()
            assert rank <= 2 * 3 * 3 if groups == 1 else rank == groups * min(of_groups.shape[1:])
        alpha_there = config['alpha_pattern'].get(pattern, config['lora_alpha'])
        up = tensors[f'base_model.model.{name}.lora_B.weight'].double().flatten(1)
        if groups == 1:
            product = alpha_there / rank * (up @ down.double().flatten(1)).reshape(update.shape)
            expected = alpha.double() / network.get_submodule(name).rank * update
            assert (product - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_wide_kernel_gets_the_square_of_its_height_times_the_rank():
    """B A is one of r * 3 rows for each of the 3 rows of a kernel, so the update has 3 times as many."""
    base = nn.Sequential(nn.Conv2d(32, 32, 3))
    network = add_lora(copy.deepcopy(base), LoRAConfig(['0'], rank=2, alpha=2))
    nn.init.normal_(network[0].lora_B)
    tensors, config = peft_layout(extract_adapter(network), base)
    assert config['r'] == 2 * 3 * 3 and [tuple(value.shape) for value in tensors.values()] == [
        *((18, 32, 3, 3), (32, 18, 1, 1))
    ]


def test_a_delta_of_a_weight_is_written_as_lora(networks, tmp_path):
    base, _ = networks
    network = add_lora(
        copy.deepcopy(base), LoRAConfig(also_train=['depthwise'], groups=['conv'], exclude_modules=['table'])
    )
    nn.init.normal_(network.body[1].lora_shift_weight)
    adapter, state = extract_adapter(network), base.state_dict()
    adapter = type(adapter)(adapter.config, {'body.1.lora_shift_weight': adapter.tensors['body.1.lora_shift_weight']})
    write(tmp_path, *peft_layout(adapter, base))
    read = merge_adapter(state, read_adapter(tmp_path, state))['body.1.weight']
    expected = state['body.1.weight'] + adapter.tensors['body.1.lora_shift_weight']
    assert (read - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_is_no_adapter_of_the_network_or_not_finite_is_told(networks):
    base, network = networks
    with pytest.raises(InputError, match='The adapter does not fit Sequential: 9 of its 9 layers differ'):
        peft_layout(extract_adapter(network), nn.Sequential(nn.Linear(3, 3)))
    for name in ('tail', 'body.0'):
        damaged = copy.deepcopy(network)
        nn.init.constant_(damaged.get_submodule(name).lora_B, float('inf'))
        with pytest.raises(InputError, match=f'The update of {name} must be of finite numbers'):
            peft_layout(extract_adapter(damaged), base)


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.attention = nn.ConvTranspose2d(4, 4, 2), nn.MultiheadAttention(4, 2)
        self.wide, self.mirrored = nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect')
        self.plain, self.norm = nn.Linear(4, 4), nn.BatchNorm2d(4)


@pytest.mark.parametrize(
    'config, message',
    [
        (LoRAConfig(['up']), '1 of its updates: up is a ConvTranspose2d.'),
        (LoRAConfig(['attention']), '1 of its updates: attention is a MultiheadAttention.'),
        (LoRAConfig([r'attention\.out_proj']), 'attention.out_proj is a NonDynamicallyQuantizableLinear.'),
        (LoRAConfig(['wide']), '1 of its updates: wide is dilated.'),
        (LoRAConfig(['mirrored']), '1 of its updates: mirrored has reflect padding.'),
        (LoRAConfig(['plain'], also_train=['bias']), '1 of its updates: plain.bias is no weight of a layer.'),
        (LoRAConfig(['plain'], also_train=['norm']), 'norm.weight is no weight of a layer; norm.bias is no weight'),
        (LoRAConfig(['.*']), 'for 5 of its updates: .*; .*; .* and 2 more.'),
    ],
)
def test_what_peft_has_no_lora_for_is_told_by_layer(config, message):
    base = Unusual()
    network = add_lora(copy.deepcopy(base), config)
    with pytest.raises(InputError, match=message):
        peft_layout(extract_adapter(network), base)
