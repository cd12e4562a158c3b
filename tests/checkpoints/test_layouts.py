"""Files in older layouts are the networks of today, and come back in their own names."""

from __future__ import annotations

import pytest
import torch
import yaml
from basicsr.archs.rrdbnet_arch import RRDBNet
from safetensors.torch import save_file
from spandrel import MAIN_REGISTRY, ModelLoader
from tiny_run import TINY_OPTIONS, run_python, write_pairs
from torch import nn
from wrapped import before

from lora_sr.adapters import LoRAConfig, add_lora, save_adapter
from lora_sr.checkpoints import Checkpoint, NetworkSource, load_network
from lora_sr.checkpoints.content import load_weights, read_checkpoint
from lora_sr.cli.main import main


def old_layout(state: dict) -> dict:
    """RRDBNet as ESRGAN's authors first named it, by rules of its own: the sequence of their modules, counted."""
    modules = {'conv_first': '0', 'conv_body': '1.sub.2', 'conv_up1': '3', 'conv_up2': '6', 'conv_hr': '8'}
    modules['conv_last'] = '10'
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition('.')
        if module == 'body':
            block, dense, conv, kind = rest.split('.')
            renamed[f'model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}'] = value
        else:
            renamed[f'model.{modules[module]}.{rest}'] = value
    return renamed


def later_layout(state: dict) -> dict:
    """As BSRGAN and RealSR have it."""
    names = {'conv_body': 'trunk_conv', 'conv_up1': 'upconv1', 'conv_up2': 'upconv2', 'conv_hr': 'HRconv'}
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition('.')
        rest = rest.replace('rdb', 'RDB')
        renamed[f'RRDB_trunk.{rest}' if module == 'body' else f'{names.get(module, module)}.{rest}'] = value
    return renamed


@pytest.mark.parametrize('relayout', [old_layout, later_layout])
@pytest.mark.parametrize('scale', [4, 2, 1])
@torch.no_grad()
def test_older_layouts_of_esrgan_are_basicsrs_network(tmp_path, relayout, scale):
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=scale, num_feat=8, num_block=2, num_grow_ch=32)
    torch.save(before('module.', relayout(network.state_dict())), tmp_path / 'old.pth')
    checkpoint = Checkpoint.read(tmp_path / 'old.pth')
    loaded = load_network(tmp_path / 'old.pth')
    assert checkpoint.family == 'RRDBNet' and type(loaded) is RRDBNet
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in network.state_dict().items())
    image = torch.rand(1, 3, 12, 16)
    by_spandrel = MAIN_REGISTRY.load(relayout(network.state_dict()))
    assert (by_spandrel(image) - loaded(image).clamp(0, 1)).abs().max() < 1e-5

    # A run's network, whose class its option file names.
    run = RRDBNet(3, 3, scale=scale, num_feat=8, num_block=2, num_grow_ch=32)
    load_weights(run, read_checkpoint(tmp_path / 'old.pth'), 'old.pth', 'params')
    assert torch.equal(run(image), network(image))


@pytest.mark.slow
def test_a_run_gives_a_file_back_in_its_own_layout(tmp_path):
    """Trained with LoRA from an old layout, resumed, and merged: the names are the file's, and spandrel reads it."""
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=2, num_feat=8, num_block=2, num_grow_ch=32)
    file = old_layout(network.state_dict())
    torch.save(file, tmp_path / 'old.pth')
    write_pairs(tmp_path / 'pairs')
    options = yaml.safe_load(TINY_OPTIONS.format(root=tmp_path / 'pairs', suffix='', backend='disk'))
    base = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'scale': 2, 'num_feat': 8, 'num_block': 2}
    options['network_g'] = {'type': 'AdaptSR', 'base': base, 'lora': {'groups': ['all'], 'rank': 2}}
    options['path']['pretrain_network_g'] = 'old.pth'
    options['val'] = None
    options['datasets'].pop('val')
    for iterations in (2, 4):
        options['train']['total_iter'] = iterations
        (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(options))
        run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', '--auto_resume', cwd=tmp_path)
    trained = tmp_path / 'experiments' / 'tiny' / 'models' / 'net_g_4.pth'
    assert main(['merge', str(trained), '-o', str(tmp_path / 'merged.pth')]) == 0
    merged = torch.load(tmp_path / 'merged.pth')['params']
    assert merged.keys() == file.keys()
    assert not torch.equal(merged['model.0.weight'], file['model.0.weight'])
    image = torch.rand(1, 3, 12, 16)
    by_spandrel = ModelLoader(device='cpu').load_from_file(tmp_path / 'merged.pth')
    with torch.no_grad():
        assert (by_spandrel(image) - load_network(trained)(image).clamp(0, 1)).abs().max() < 1e-5


def test_adapters_go_onto_an_older_layout_and_it_comes_back(tmp_path):
    """`adapter merge`, and `adapter apply` followed by `merge`, give one file, with the names of the base."""
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=4, num_feat=8, num_block=1, num_grow_ch=32)
    file = {name.replace('.sub.2.', '.sub.1.'): value for name, value in old_layout(network.state_dict()).items()}
    torch.save({'state_dict': file}, tmp_path / 'old.pth')
    add_lora(network, LoRAConfig(['conv_first', r'body\.0\.rdb1\.conv1'], rank=2))
    for name, value in network.named_parameters():
        if name.endswith('lora_B'):
            nn.init.normal_(value)
    save_adapter(network, tmp_path / 'a.safetensors')
    old, adapter, applied, merged = (tmp_path / name for name in ('old.pth', 'a.safetensors', 'b.pth', 'c.pth'))
    assert main(['adapter', 'merge', str(old), str(adapter), '-o', str(merged)]) == 0
    assert main(['adapter', 'apply', str(old), str(adapter), '-o', str(applied)]) == 0
    assert main(['merge', str(applied), '-o', str(tmp_path / 'd.pth')]) == 0
    results = [torch.load(tmp_path / name)['params'] for name in ('c.pth', 'd.pth')]
    assert results[0].keys() == results[1].keys() == file.keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in file)
    image = torch.rand(1, 3, 12, 16)
    by_spandrel = ModelLoader(device='cpu').load_from_file(merged)
    with torch.no_grad():
        assert (by_spandrel(image) - network(image).clamp(0, 1)).abs().max() < 1e-5


def test_an_adapter_of_others_knows_the_names_of_the_file(tmp_path):
    """Whoever trained it had the file, and not BasicSR's network."""
    torch.manual_seed(0)
    network = RRDBNet(3, 3, scale=4, num_feat=8, num_block=1, num_grow_ch=32)
    file = {name.replace('.sub.2.', '.sub.1.'): value for name, value in old_layout(network.state_dict()).items()}
    torch.save(file, tmp_path / 'old.pth')
    down, up = torch.randn(2, 3, 3, 3), torch.randn(8, 2, 1, 1)
    kohya = {'lora_unet_model_0.lora_down.weight': down, 'lora_unet_model_0.lora_up.weight': up}
    save_file({**kohya, 'lora_unet_model_0.alpha': torch.tensor(1.0)}, tmp_path / 'kohya.safetensors')
    arguments = [str(tmp_path / name) for name in ('old.pth', 'kohya.safetensors')]
    assert main(['adapter', 'merge', *arguments, '-o', str(tmp_path / 'merged.pth')]) == 0
    merged = torch.load(tmp_path / 'merged.pth')['params']
    update = torch.einsum('or,rihw->oihw', up[..., 0, 0].double(), down.double()) / 2
    expected = {**file, 'model.0.weight': (file['model.0.weight'].double() + update).float()}
    assert merged.keys() == file.keys()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in expected.items())
    source = NetworkSource(arguments[0], adapters=[(arguments[1], 1.0)])
    image = torch.rand(1, 3, 12, 16)
    with torch.no_grad():
        assert torch.allclose(load_network(source)(image), load_network(tmp_path / 'merged.pth')(image), atol=1e-5)
