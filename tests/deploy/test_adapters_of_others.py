"""`lora-sr adapter` with files of PEFT and of kohya's scripts: applied, merged, known again, fitted, exported."""

import json
import re
import shutil

import pytest
import torch
from adapter_files import adapt, known, run, write_pairs
from safetensors import safe_open
from safetensors.torch import save_file

from lora_sr import load_network
from lora_sr.adapters import (
    LoRAConfig,
    read_adapter,
    save_adapter,
)
from lora_sr.checkpoints import AdapterFile, Checkpoint, NetworkSource, Origin
from lora_sr.cli.main import main
from lora_sr.deploy.merge import merge_checkpoint


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A folder with base.pth, a folder of PEFT for it, and what kohya's scripts write for the same updates."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = known().eval()
    torch.save({'params': base.state_dict()}, 'base.pth')
    tensors, other = {}, {}
    for name in ('conv_hr', 'body.0.conv1'):
        down, up = torch.randn(2, 8, 3, 3) * 0.15, torch.randn(8, 2, 1, 1)
        tensors |= {f'base_model.model.{name}.lora_A.weight': down, f'base_model.model.{name}.lora_B.weight': up}
        flat = f'lora_unet_{name.replace(".", "_")}'
        other |= {f'{flat}.lora_down.weight': down, f'{flat}.lora_up.weight': up, f'{flat}.alpha': torch.tensor(3.0)}
    (tmp_path / 'peft').mkdir()
    save_file(tensors, 'peft/adapter_model.safetensors')
    (tmp_path / 'peft' / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    save_file(other, 'kohya.safetensors')
    expected = {key: value.double() for key, value in base.state_dict().items()}
    for name in ('conv_hr', 'body.0.conv1'):
        down, up = (tensors[f'base_model.model.{name}.lora_{end}.weight'].double() for end in 'AB')
        expected[f'{name}.weight'] += 1.5 * torch.einsum('or,riyx->oiyx', up[..., 0, 0], down)
    return tmp_path, base, expected


@torch.no_grad()
@pytest.mark.parametrize('adapter', ['peft', 'peft/adapter_model.safetensors', 'kohya.safetensors'])
def test_adapters_of_others_go_where_ours_go(foreign, adapter, capsys):
    folder, base, expected = foreign
    assert run('merge', 'base.pth', adapter, '-o', 'merged.pth') == 0
    state = torch.load('merged.pth', weights_only=True)['params']
    assert state.keys() == expected.keys()
    assert all((value - expected[key]).abs().max() <= 1e-6 for key, value in state.items())
    assert run('apply', 'base.pth', adapter, '-o', 'applied.pth') == 0
    assert run('extract', 'applied.pth', '-o', 'own.safetensors') == 0
    assert sorted(read_adapter('own.safetensors').layers) == ['body.0.conv1', 'conv_hr']
    capsys.readouterr()
    assert run('info', adapter) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    name = 'lora_unet_conv_hr' if adapter == 'kohya.safetensors' else 'conv_hr'
    assert [name, '1', '2x8x3x3,', '8x2x1x1', '2', '3', '160'] in lines
    assert ['2', 'layers', 'with', 'LoRA,', '320', 'parameters'] in lines
    assert main(['inspect', adapter]) == 0
    assert '2 layers, rank 2, alpha 3' in capsys.readouterr().out

    x = torch.rand(1, 3, 9, 12)
    network = load_network(NetworkSource('base.pth', adapters=[(adapter, 1.0)]))
    truth = known().eval().double()
    truth.load_state_dict(expected)
    assert (network(x) - truth(x.double())).abs().max() <= 1e-5 < 0.01 * (network(x) - base(x)).abs().max()
    assert run('merge', 'base.pth', f'{adapter}=0.5', 'own.safetensors=0.5', '-o', 'half.pth') == 0
    state = torch.load('half.pth', weights_only=True)['params']
    assert all((value - expected[key]).abs().max() <= 1e-6 for key, value in state.items())
    assert run('merge', 'base.pth', adapter, adapter, '-o', 'twice.pth') == 2
    assert 'are one adapter' in capsys.readouterr().err


@pytest.mark.parametrize('weight', ['', '=0.7', '=-1'])
@pytest.mark.parametrize('adapter', ['peft', 'kohya.safetensors', 'own.safetensors'])
@pytest.mark.parametrize(
    'command', ['adapter merge base.pth {}', 'merge base.pth --adapter {}', 'adapter apply base.pth {}']
)
def test_an_adapter_is_known_again_however_it_was_merged(foreign, capsys, command, adapter, weight):
    """By its file, whatever its tensors became on the way; and what has no weight is not in it."""
    folder, _, _ = foreign
    save_adapter(adapt(known(), LoRAConfig(['conv_first'], rank=2), 0), 'own.safetensors')
    other = 'own.safetensors' if adapter == 'peft' else 'peft'
    for name, mix in (('once', [f'{adapter}{weight}']), ('mixed', [f'{adapter}{weight}', f'{other}=0'])):
        arguments = (' --adapter ' if '--adapter' in command else ' ').join(mix)
        assert main([*command.format(arguments).split(), '-o', f'{name}.pth']) == 0
        if 'apply' in command:  # what it writes is merged, and what can be taken out of it is known as well
            assert run('extract', f'{name}.pth', '-o', 'extracted.safetensors', '--overwrite') == 0
            assert main(['merge', f'{name}.pth', '-o', 'merged.pth', '--overwrite']) == 0
            (folder / 'merged.pth').replace(f'{name}.pth')
            assert run('merge', f'{name}.pth', 'extracted.safetensors', '-o', 'twice.pth') == 2
            assert 'carries the adapter extracted' in capsys.readouterr().err
        for again in ('adapter merge {} ', 'adapter apply {} ', 'merge {} --adapter '):
            capsys.readouterr()
            assert main([*f'{again}{adapter}'.format(f'{name}.pth').split(), '-o', 'twice.pth']) == 2
            assert f'The base {name}.pth carries the adapter {adapter}' in capsys.readouterr().err
    assert run('merge', 'mixed.pth', other, '-o', 'both.pth') == 0


@pytest.mark.parametrize('adapter', ['peft', 'own.safetensors'])
def test_an_adapter_is_known_again_on_a_live_network_and_in_an_export(foreign, adapter, capsys):
    save_adapter(adapt(known(), LoRAConfig(['conv_first'], rank=2), 0), 'own.safetensors')
    base = known().eval()
    merge_checkpoint(NetworkSource(base, adapters=[(adapter, 0.5)]), 'merged.pth')
    assert run('merge', 'merged.pth', adapter, '-o', 'twice.pth') == 2
    assert 'merged.pth carries the adapter' in capsys.readouterr().err
    assert main(f'export torchscript base.pth --adapter {adapter}=0.5 -o net.pt'.split()) == 0
    extra = {'metadata.json': ''}
    torch.jit.load('net.pt', _extra_files=extra)
    origin = Origin.parse(json.loads(extra['metadata.json'])['lora_sr'])
    assert origin.adapters == Checkpoint.read('merged.pth').origin.adapters == (AdapterFile.read(adapter).fingerprint,)


@torch.no_grad()
def test_weights_are_fitted_to_adapters_of_others(foreign, capsys):
    folder, base, expected = foreign
    truth = known().eval()
    truth.load_state_dict(
        {key: (0.6 * value + 0.4 * base.state_dict()[key]).float() for key, value in expected.items()}
    )
    fit = write_pairs(folder, truth)
    assert run('merge', 'base.pth', 'peft', '-o', 'fitted.pth', *fit) == 0
    weight = re.search(r'weight (-?[\d.]+)', capsys.readouterr().out)
    assert float(weight[1]) == pytest.approx(0.6, abs=1e-2)


def test_export_gives_what_peft_reads(foreign, capsys):
    folder, _, expected = foreign
    config = LoRAConfig(['body.*', 'conv_hr'], rank=2, alpha=3)
    save_adapter(adapt(known(), config, 0), 'own.safetensors')
    assert run('merge', 'base.pth', 'own.safetensors=0.7', 'peft', '-o', 'merged.pth') == 0
    capsys.readouterr()
    assert run('export', 'base.pth', 'own.safetensors=0.7', 'peft', '--to', 'peft', '-o', 'deep/out') == 0
    printed = capsys.readouterr().out
    assert 'adapter in the layout of PEFT' in printed and printed.splitlines()[-1] == 'wrote deep/out'
    assert sorted(path.name for path in (folder / 'deep' / 'out').iterdir()) == [
        *('adapter_config.json', 'adapter_model.safetensors')
    ]
    options = json.loads((folder / 'deep' / 'out' / 'adapter_config.json').read_text())
    with safe_open('deep/out/adapter_model.safetensors', framework='pt') as file:
        assert file.metadata()['format'] == 'pt' and json.loads(file.metadata()['lora_sr'])['base']
        layers = {key.split('.lora_')[0][len('base_model.model.') :] for key in file.keys()}
    assert all(re.fullmatch(options['target_modules'], layer) for layer in layers)
    assert run('merge', 'base.pth', 'deep/out', '-o', 'again.pth') == 0
    merged, again = (torch.load(f'{name}.pth', weights_only=True)['params'] for name in ('merged', 'again'))
    assert all((again[key] - value).abs().max() <= 1e-5 * value.abs().max() for key, value in merged.items())
    before = (folder / 'deep' / 'out' / 'adapter_config.json').read_bytes()
    assert run('export', 'base.pth', 'peft', '-o', 'deep/out') == 2
    assert 'exists: choose another name, or allow it with --overwrite' in capsys.readouterr().err
    assert (folder / 'deep' / 'out' / 'adapter_config.json').read_bytes() == before
    assert run('export', 'base.pth', 'peft', '-o', 'deep/out', '--overwrite') == 0
    # Whoever trained it is told another base.
    torch.save({'params': {key: value.float() for key, value in expected.items()}}, 'another.pth')
    capsys.readouterr()
    assert run('merge', 'another.pth', 'deep/out', '-o', 'm.pth') == 2
    assert 'was trained on another base than another.pth' in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            'merge base.pth empty -o m.pth',
            'There is no adapter file empty: in a folder it must be called adapter_model.s',
        ),
        ('merge base.pth bare -o m.pth', 'bare/adapter_model.safetensors cannot be used: its alpha is unknown without'),
        (
            'merge base.pth wide.safetensors -o m.pth',
            r'1 of its 1 layers differ: conv_hr is 8x8x3x3 here, .* for 8x9x3x3',
        ),
        (
            'merge base.pth nan.safetensors -o m.pth',
            'nan.safetensors cannot be used: it has values that are not finite',
        ),
        ('apply peft peft -o m.pth', 'the checkpoint peft cannot be read: it must be a file, got a folder'),
        ('merge kohya.safetensors peft -o m.pth', 'kohya.safetensors is an adapter, where a checkpoint of the base is'),
        (
            'merge base.pth peft -o peft/adapter_model.safetensors --overwrite',
            'is the input peft/adapter_model.safetens',
        ),
        ('extract kohya.safetensors -o m.safetensors', 'kohya.safetensors is an adapter already'),
        ('export base.pth peft -o base.pth', 'The output base.pth must be a folder, got a file'),
        (
            'export base.pth peft -o peft --overwrite',
            'peft/adapter_model.safetensors is the input peft/adapter_model.saf',
        ),
        ('export base.pth peft=0 -o out', 'There is nothing to write: the adapter changes nothing'),
        (
            'export base.pth biased.safetensors -o out',
            'PEFT has no LoRA for 1 of its updates: conv_hr.bias is no weight',
        ),
        ('export odd.pth kohya.safetensors -o out', 'odd.pth belongs to no network known here'),
        ('info bare/adapter_config.json', 'must be in the format of torch or of safetensors, got a text in JSON'),
    ],
)
def test_mistakes_with_adapters_of_others_are_one_sentence(foreign, capsys, arguments, message):
    folder, base, _ = foreign
    for name in ('empty', 'bare'):
        (folder / name).mkdir()
    shutil.copy('peft/adapter_model.safetensors', 'bare')
    factors = {'conv_hr.lora_down.weight': torch.zeros(2, 8, 3, 3), 'conv_hr.lora_up.weight': torch.zeros(8, 2, 1, 1)}
    save_file({**factors, 'conv_hr.lora_down.weight': torch.zeros(2, 9, 3, 3)}, 'wide.safetensors')
    save_file({**factors, 'conv_hr.lora_up.weight': torch.full((8, 2, 1, 1), float('nan'))}, 'nan.safetensors')
    save_adapter(adapt(known(), LoRAConfig(['conv_hr'], also_train=['bias']), 0), 'biased.safetensors')
    torch.save({'conv_hr.weight': torch.ones(8, 8, 3, 3), 'body.0.conv1.weight': torch.ones(8, 8, 3, 3)}, 'odd.pth')
    if 'bare/adapter_config.json' in arguments:
        shutil.copy('peft/adapter_config.json', 'bare')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert run(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before
