"""The networks of the NTIRE 2026 efficient SR challenge: against their authors' outputs, the organizers' counts, and
the PSNR of the authors' code."""

import copy
import json

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

import lora_sr
from lora_sr import load_network
from lora_sr.adapters import (
    LoRAConfig,
    add_lora,
    count_parameters,
    layer_groups,
    lora_layers,
    mark_trainable,
    merge_lora,
)
from lora_sr.archs import DISP, SPANF, SPANV2, DSCFFused, is_training_form, network_info
from lora_sr.archs.complexity import count_activations, count_convolutions, count_flops
from lora_sr.checkpoints import Checkpoint
from lora_sr.checkpoints.families import FAMILIES
from lora_sr.deploy.exports import export_onnx, export_torchscript
from lora_sr.deploy.merge import merge_checkpoint
from lora_sr.errors import InputError
from lora_sr.report.comparison import compare

# File -> its family, and the section of an option file that it belongs to.
ENTRIES = {
    'team01_PDS': {'type': 'SPANF', 'tail_channels': 20, 'layout': 'PDS', 'deploy': True},
    'team15_DSCF_Fused': {'type': 'DSCFFused'},
    'team16_PKDSR': {'type': 'SPANF', 'tail_channels': 24, 'deploy': True},
    'team18_DISP': {'type': 'DISP'},
    'team22_spanv2_c2': {'type': 'SPANV2'},
}
SMALL = {
    'SPANF': lambda: SPANF(feature_channels=6, upscale=3),
    'PDS': lambda: SPANF(feature_channels=6, upscale=2, tail_channels=5, layout='PDS', deploy=True),
    'SPANV2': lambda: SPANV2(feature_channels=6, upscale=2),
    'SPANV2 as wide as the image': lambda: SPANV2(feature_channels=3),
    'DISP': lambda: DISP(feature_channels=5, upscale=3, num_block=3),
    'DSCFFused': lambda: DSCFFused(feature_channels=5, upscale=2),
}
each_entry = pytest.mark.parametrize('name', ENTRIES)
each_small = pytest.mark.parametrize('name', SMALL)


@pytest.fixture
def weights(shared):
    """A function: the authors' file of an entry."""
    return lambda name: shared / f'weights/NTIRE2026/{name}.pth'


@pytest.fixture
def truth(shared):
    """A function: images, and what the authors' code makes of them."""

    def read(name):
        tensors = np.load(shared / f'golden/networks/{name}.npz')
        return torch.from_numpy(tensors['lr']), torch.from_numpy(tensors['sr'])

    return read


def small(name):
    torch.manual_seed(0)
    return SMALL[name]().eval()


def with_lora(network):
    """LoRA on every layer of ``network``, with an update that is not zero any more."""
    add_lora(network, LoRAConfig(groups=['all'], rank=2, alpha=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora_layers(network):
            layer.lora_B.normal_(std=0.01, generator=generator)
    return network


@torch.no_grad()
@each_entry
def test_official_weights_give_the_authors_output(weights, truth, name):
    network, (lr, sr) = load_network(weights(name)), truth(name)
    assert type(network).__name__ == ENTRIES[name]['type'] and not is_training_form(network)
    assert (network(lr) - sr).abs().max() <= 1e-5
    optimized = lora_sr.optimize(network)  # which has no kernels for them
    assert (optimized(lr) - sr).abs().max() <= 1e-5


@torch.no_grad()
@each_entry
def test_an_option_file_names_the_network_of_the_official_weights(weights, truth, name):
    network, (lr, sr) = build_network(dict(ENTRIES[name])).eval(), truth(name)
    network.load_state_dict(Checkpoint.read(weights(name)).state, strict=True)
    assert (network(lr) - sr).abs().max() <= 1e-5


@each_entry
def test_official_weights_are_of_one_family(weights, name):
    state = Checkpoint.read(weights(name)).state
    assert [name for name, family in FAMILIES.items() if family.recognize(state)] == [ENTRIES[name]['type']]


def test_official_weights_of_others_are_not_of_these_families(shared):
    ours = {section['type'] for section in ENTRIES.values()}
    files = [file for file in (shared / 'weights').rglob('*.pth') if file.parent.name != 'NTIRE2026']
    assert files
    for file in files:
        state = Checkpoint.read(file).state
        assert not [family for family in ours if FAMILIES[family].recognize(state)]


@each_entry
def test_counts_are_those_of_the_organizers(shared, weights, name):
    reference = json.loads((shared / 'reference.json').read_text())
    network = load_network(weights(name))
    assert count_parameters(network).total == reference['measured_with_official_code'][name]['params']
    found = round(count_flops(network) / 1e9, 2), round(count_activations(network) / 1e6, 2)
    if name == 'team22_spanv2_c2':
        # The organizers' tool does not see the team's operator; the team counts as here.
        assert (*found, count_convolutions(network)) == (9.11, 51.38, 22)
        return
    table = reference['published']["NTIRE 2026 efficient SR (organisers' results.txt, RTX A6000, five runs)"]
    row = dict(zip(table['columns'], table[name.replace('team', '')]))
    assert found == (row['flops G (fvcore, 256x256)'], row['activations M'])
    assert count_convolutions(network) == row['convolutions']


@each_entry
def test_set5_has_the_psnr_and_ssim_of_the_authors_code(shared, weights, name):
    expected = json.loads((shared / 'reference.json').read_text())['measured_with_official_code'][name]['Set5']
    data = shared / 'data/benchmark/Set5'
    row = compare({name: weights(name)}, {'Set5': (data / 'GTmod4', data / 'LRbicx4')}).rows[1]
    assert row.quality['Set5'].psnr == pytest.approx(expected['psnr'], abs=1e-4)
    assert row.quality['Set5'].ssim == pytest.approx(expected['ssim'], abs=1e-4)


@torch.no_grad()
@each_entry
def test_lora_on_official_weights_merges_into_a_file_of_the_authors_layout(weights, truth, tmp_path, name):
    network, (lr, sr) = load_network(weights(name)), truth(name)
    layers = [layer for layer, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert torch.equal(add_lora(copy.deepcopy(network), LoRAConfig(groups=['all'], rank=2))(lr), network(lr))
    with_lora(network)
    assert [layer for layer, _ in lora_layers(network)] == layers
    adapted = network(lr)
    assert (adapted - sr).abs().max() > 1e-3
    torch.save({'params': network.state_dict()}, tmp_path / 'adapted.pth')
    merge_checkpoint(tmp_path / 'adapted.pth', tmp_path / 'merged.pth')
    merged, official = Checkpoint.read(tmp_path / 'merged.pth').state, Checkpoint.read(weights(name)).state
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in official.items()}
    assert torch.equal(load_network(tmp_path / 'merged.pth')(lr), adapted)


@each_entry
@pytest.mark.filterwarnings('ignore')
def test_exports_give_the_images_of_the_network(weights, tmp_path, name):
    for export, suffix in ((export_onnx, 'onnx'), (export_torchscript, 'pt')):
        if suffix == 'onnx':
            pytest.importorskip('onnxruntime')
        report = export(weights(name), tmp_path / f'net.{suffix}')
        assert (tmp_path / f'net.{suffix}').is_file() and report.difference.largest <= 1e-5


def test_groups_are_what_the_report_calls_the_layers():
    groups = layer_groups(small('SPANV2'))
    gates = [f'block_{i}.guidance_map_conv' for i in range(2, 6)]  # the learned attention
    assert [name for name, group in groups.items() if group == 'attention'] == gates
    last = {'SPANF': 'conv_2', 'PDS': 'conv_2_1', 'SPANV2': 'pointwise_conv'}
    last.update(DISP='upsampler', DSCFFused='upsampler')
    for name, part in last.items():
        groups = layer_groups(small(name))
        found = {layer.partition('.')[0] for layer, group in groups.items() if group == 'upsampler'}
        assert found == {part} and set(groups.values()) <= {'conv', 'attention', 'upsampler'}


@torch.no_grad()
@each_small
def test_a_checkpoint_tells_the_network(tmp_path, name):
    network = small(name)
    x = torch.rand(1, 3, 7, 9)
    torch.save(network.state_dict(), tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    assert type(loaded) is type(network) and torch.equal(loaded(x), network(x))
    with_lora(network)
    torch.save({'params_ema': network.state_dict(), 'params': loaded.state_dict()}, tmp_path / 'adapted.pth')
    adapted = load_network(tmp_path / 'adapted.pth')
    assert torch.equal(adapted(x), network(x)) and not torch.equal(adapted(x), loaded(x))
    assert torch.equal(merge_lora(adapted)(x), network(x))


@torch.no_grad()
@each_small
def test_images_of_any_size(name):
    network = small(name)
    info = network_info(network)
    assert (info.in_channels, info.out_channels, info.size_multiple, info.fixed_size) == (3, 3, 1, None)
    for batch, height, width in ((1, 1, 1), (2, 3, 1), (1, 16, 5)):
        assert network(torch.rand(batch, 3, height, width)).shape == (batch, 3, height * info.scale, width * info.scale)


@each_small
def test_training_reaches_every_parameter(name):
    network = small(name).train()
    (network(torch.rand(2, 3, 9, 10)) - 1).abs().mean().backward()
    assert not [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]


@each_small
def test_only_lora_trains_where_it_is_asked_for(name):
    network = with_lora(small(name))
    mark_trainable(network)
    network(torch.rand(1, 3, 8, 8)).mean().backward()
    reached = {key.rpartition('.')[2] for key, value in network.named_parameters() if value.grad is not None}
    assert reached == {'lora_A', 'lora_B'}


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        *((name, {'num_in_ch': 1}, 'be 3, for RGB images, got 1') for name in ('SPANF', 'SPANV2', 'DISP', 'DSCFFused')),
        ('SPANV2', {'num_out_ch': 4}, '"num_out_ch" of SPANV2 must be 3'),
        ('SPANF', {'upscale': 0}, '"upscale" of SPANF must be an integer of at least 1, got 0'),
        ('SPANF', {'tail_channels': -1}, '"tail_channels" of SPANF must be an integer of at least 1, got -1'),
        ('SPANF', {'feature_channels': 3}, '"feature_channels" of SPANF must be other than 3, got 3'),
        ('SPANF', {'layout': 'pds'}, '"layout" of SPANF must be one of SPANF, PDS, got \'pds\''),
        ('SPANF', {'layout': ['PDS']}, r'"layout" of SPANF must be one of SPANF, PDS, got \[.PDS.\]'),
        ('SPANV2', {'feature_channels': 2.5}, '"feature_channels" of SPANV2 must be an integer of at least 1, got 2.5'),
        ('DISP', {'num_block': True}, '"num_block" of DISP must be an integer of at least 1, got True'),
        ('DSCFFused', {'upscale': '4'}, '"upscale" of DSCFFused must be an integer of at least 1, got \'4\''),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(InputError, match=message):
        ARCH_REGISTRY.get(name)(**arguments)
