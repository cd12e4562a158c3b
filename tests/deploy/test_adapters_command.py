"""`lora-sr adapter`: from an adapted checkpoint to a file and back, mixes, and every mistake."""

import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from adapter_files import OfOnesOwn, adapt, load, option_file, run, write_pairs
from basicsr.archs.rrdbnet_arch import RRDBNet
from basicsr.archs.srresnet_arch import MSRResNet

from lora_sr import load_network
from lora_sr.adapters import (
    LoRAConfig,
    load_adapter,
    lora_layers,
    read_adapter,
    save_adapter,
)
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import Checkpoint
from lora_sr.cli.main import main

GT_AS_LR = r'gt/0.png must have 14 x 12 pixels \(.*\), since lr/0.png has 28 x 24 and the scale is 2, got 56 x 48'


@torch.no_grad()
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_extract_apply_merge_give_the_adapted_networks_images(files, suffix):
    folder, base = files
    (folder / 'out').mkdir()
    adapted, plain = (folder / 'out' / f'{name}{suffix}' for name in ('adapted', 'plain'))
    assert run('apply', folder / 'base.pth', folder / 'a.safetensors', '-o', adapted) == 0
    assert run('merge', folder / 'base.pth', folder / 'a.safetensors', '-o', plain) == 0
    assert {path.name for path in (folder / 'out').iterdir()} == {adapted.name, plain.name}
    trained = torch.load(folder / 'net_a.pth', weights_only=True)['params_ema']
    written = Checkpoint.read(adapted).state
    assert written.keys() == trained.keys() and all(torch.equal(trained[key], value) for key, value in written.items())
    x = torch.rand(1, 3, 9, 12)
    before = base(x)
    base.load_state_dict(Checkpoint.read(plain).state, strict=True)
    merged = base.requires_grad_(False)(x)
    network = type(base)(**({'num_feat': 8, 'num_block': 1, 'upscale': 2} if type(base) is MSRResNet else {}))
    load_adapter(load(network.eval(), folder / 'base.pth'), folder / 'a.safetensors')
    assert torch.equal(network(x), merged) and (merged - before).abs().max() > 0.01
    if type(base) is MSRResNet:
        # What this command writes, the others read.
        assert torch.equal(load_network(adapted).requires_grad_(False)(x), merged)
        assert torch.equal(load_network(plain).requires_grad_(False)(x), merged)
    again = folder / f'again{suffix}'
    assert main(['merge', str(adapted), '-o', str(again)]) == 0
    expected = Checkpoint.read(plain).state
    assert all(torch.equal(value, expected[key]) for key, value in Checkpoint.read(again).state.items())
    assert run('extract', adapted, '-o', folder / 'once_more.safetensors') == 0
    first, second = (read_adapter(folder / f'{name}.safetensors') for name in ('a', 'once_more'))
    assert sorted(first.config.target_modules) == sorted(second.config.target_modules)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())


def test_mixing_is_linear_in_the_weights_and_0_is_the_base(files, capsys):
    folder, base = files
    adapters = [folder / 'a.safetensors', folder / 'b.safetensors']
    states = {}
    for weights in ((0, 0), (1, 0), (0, 1), (0.7, -0.2), (1.6, 2), (1, 1)):
        output = folder / f'{weights}.pth'
        mix = [f'{path}={weight}' for path, weight in zip(adapters, weights)]
        if weights == (1, 1):
            mix = adapters
        capsys.readouterr()
        assert run('merge', folder / 'base.pth', *mix, '-o', output) == 0
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:2]] == [f'{w:.4f}' for w in weights]
        states[weights] = torch.load(output, weights_only=True)['params']
    truth = base.state_dict()
    assert all(torch.equal(value, truth[key]) for key, value in states[0, 0].items())
    for (a, b), state in states.items():
        assert state.keys() == truth.keys()
        for key, value in state.items():
            zero, one, two = (states[weights][key].double() for weights in ((0, 0), (1, 0), (0, 1)))
            assert (value - (zero + a * (one - zero) + b * (two - zero))).abs().max() <= 1e-5
    assert run('apply', folder / 'base.pth', f'{adapters[0]}=0', '-o', folder / 'nothing.pth') == 0
    assert torch.load(folder / 'nothing.pth', weights_only=True)['params'].keys() == truth.keys()
    assert run('apply', folder / 'base.pth', *adapters, '-o', folder / 'both.pth') == 0
    assert run('info', folder / 'both.pth') == 0


def test_info_groups_layers(files, capsys):
    folder, base = files
    capsys.readouterr()
    for name in ('a.safetensors', 'net_a.pth'):
        assert run('info', folder / name) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        adapter = read_adapter(folder / 'a.safetensors')
        total = sum(value.numel() for key, value in adapter.tensors.items() if key.endswith(('_A', '_B')))
        size = f'{(folder / name).stat().st_size:,}'
        if type(base) is MSRResNet:
            assert ['body.0.conv*', '2', '6x24,', '24x6', '2', '3', '576'] in lines
            assert ['conv_hr', '1', '6x24,', '24x6', '2', '3', '288'] in lines and total == 576 + 288
            assert ['nothing', 'besides'] in lines and ['3', 'layers', 'with', 'LoRA,', '864', 'parameters'] in lines
        else:
            assert ['mlps.*', '2', '2x8,', '8x2', '2', '3', '64'] in lines
            assert ['norm.weight', '1', '8', '-', '-', '8'] in lines
            assert ['2', 'parameters', 'with', 'a', 'delta', 'besides,', '16', 'values'] in lines
            assert ['4', 'layers', 'with', 'LoRA,', str(total), 'parameters'] in lines
        kind = ['adapter,'] if name == 'a.safetensors' else ['adapted', 'checkpoint,']
        assert [*kind, size, 'bytes'] in lines


def test_param_key_chooses_what_is_extracted(files, capsys):
    folder, _ = files
    output = folder / 'start.safetensors'
    assert run('extract', folder / 'net_a.pth', '-o', output, '--param-key', 'params') == 0
    assert not any(value.any() for key, value in read_adapter(output).tensors.items() if key.endswith('lora_B'))
    assert any(value.any() for key, value in read_adapter(folder / 'a.safetensors').tensors.items())
    assert f'wrote {output}' in capsys.readouterr().out


def test_base_in_training_form_is_sent_to_merge(tmp_path, capsys):
    """The authors' training checkpoints of SPAN hold a stale eval_conv, onto which an adapter would be lost."""
    torch.manual_seed(0)
    branched, deployed = SPAN(feature_channels=6).eval(), SPAN(feature_channels=6, deploy=True).eval()
    stale = {key: value for key, value in deployed.state_dict().items() if 'eval_conv' in key}
    torch.save({**branched.state_dict(), **stale}, tmp_path / 'training.pth')
    save_adapter(adapt(deployed, LoRAConfig([r'block_\d\..*']), 0), tmp_path / 'a.safetensors')
    assert run('merge', tmp_path / 'training.pth', tmp_path / 'a.safetensors', '-o', tmp_path / 'm.pth') == 2
    message = capsys.readouterr().err
    assert '18 of its 18 layers differ' in message and 'branches, which `lora-sr merge` folds' in message
    assert main(['merge', str(tmp_path / 'training.pth'), '-o', str(tmp_path / 'base.pth')]) == 0
    assert run('apply', tmp_path / 'base.pth', tmp_path / 'a.safetensors', '-o', tmp_path / 'm.pth') == 0
    assert len(list(lora_layers(load_network(tmp_path / 'm.pth')))) == 18

    # What goes onto the rest of it leaves no stale weight behind.
    save_adapter(adapt(SPAN(feature_channels=6), LoRAConfig(['conv_cat']), 0), tmp_path / 'rest.safetensors')
    assert run('merge', tmp_path / 'training.pth', tmp_path / 'rest.safetensors', '-o', tmp_path / 'rest.pth') == 0
    assert Checkpoint.read(tmp_path / 'rest.pth').state.keys() == branched.state_dict().keys()


def test_an_option_file_tells_what_stands_before_the_names_of_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = OfOnesOwn().eval()
    torch.save({'params': {f'mine.{key}': value for key, value in base.state_dict().items()}}, 'base.pth')
    options = option_file(tmp_path, base)
    expected = {key: value.clone() for key, value in base.state_dict().items()}
    save_adapter(adapt(base, LoRAConfig(['last'], rank=2, alpha=3), 0), 'a.safetensors')
    assert run('merge', 'base.pth', 'a.safetensors', '-o', 'm.pth', *options) == 0
    lora_A, lora_B, _ = (value.double() for value in read_adapter('a.safetensors').update_of('last'))
    updated = expected['last.weight'].double() + 1.5 * (lora_B @ lora_A).reshape(12, 8, 3, 3)
    merged = load(OfOnesOwn(), 'm.pth').state_dict()
    assert (merged.pop('last.weight') - updated).abs().max() <= 1e-6 * updated.abs().max()
    assert all(torch.equal(value, expected[key]) for key, value in merged.items())


def test_a_file_in_an_older_layout_keeps_its_names_and_its_precision(tmp_path, monkeypatch):
    """RRDBNet as BSRGAN's authors name it, in float16."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = RRDBNet(3, 3, num_feat=8, num_block=1, num_grow_ch=4).eval()
    renamed = {}
    for key, value in network.state_dict().items():
        key = key.replace('body.0.rdb', 'RRDB_trunk.0.RDB').replace('conv_body', 'trunk_conv')
        renamed[key.replace('conv_up', 'upconv').replace('conv_hr', 'HRconv')] = value.half()
    torch.save(renamed, 'base.pth')
    save_adapter(adapt(network, LoRAConfig(['conv_hr'], rank=2, alpha=3), 0), 'a.safetensors')
    assert run('merge', 'base.pth', 'a.safetensors', '-o', 'm.pth') == 0
    merged = torch.load('m.pth', weights_only=True)['params']
    assert list(merged) == list(renamed) and {value.dtype for value in merged.values()} == {torch.float16}
    lora_A, lora_B, _ = (value.double() for value in read_adapter('a.safetensors').update_of('conv_hr'))
    expected = renamed['HRconv.weight'].double() + 1.5 * (lora_B @ lora_A).reshape(8, 8, 3, 3)
    assert (merged['HRconv.weight'] - expected).abs().max() <= 2**-10 * expected.abs().max()
    assert all(torch.equal(value, renamed[key]) for key, value in merged.items() if key != 'HRconv.weight')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            'merge base.pth wide.safetensors -o m.pth',
            r'wide.safetensors does not fit the base .*base.pth: \d+ of',
        ),
        ('merge base.pth a.safetensors -o there.pth', 'there.pth exists: choose another name'),
        ('merge base.pth a.safetensors -o m.bin', 'must end in .pth or .safetensors'),
        ('merge base.pth a.safetensors -o absent/m.pth', 'The folder .*absent of the output does not exist'),
        ('extract net_a.pth -o there.safetensors', 'there.safetensors exists: choose another name'),
        ('extract net_a.pth -o a.pth', 'must end in .safetensors'),
        ('extract base.pth -o m.safetensors', 'base.pth cannot be used: There is no adapter to take out'),
        ('extract a.safetensors -o m.safetensors', 'a.safetensors is an adapter already'),
        ('extract net_a.pth -o m.safetensors --param-key ema', 'has no "ema"'),
        ('apply net_a.pth a.safetensors -o m.pth', 'net_a.pth carries LoRA already, where a checkpoint of the base'),
        ('apply a.safetensors a.safetensors -o m.pth', 'a.safetensors is an adapter, where a checkpoint of the base'),
        ('apply base.pth base.pth -o m.pth', 'base.pth is no adapter but a base checkpoint'),
        ('apply base.pth net_a.pth -o m.pth', 'net_a.pth is no adapter but an adapted checkpoint'),
        ('apply base.pth absent.safetensors -o m.pth', 'There is no adapter file .*absent.safetensors'),
        ('apply absent.pth a.safetensors -o m.pth', 'absent.pth cannot be read'),
        (
            'apply base.pth nan.safetensors -o m.pth',
            'nan.safetensors cannot be used: it has values that are not finite, in .*lora_B',
        ),
        ('info base.pth', 'no layer carries LoRA'),
        ('info absent.pth', 'absent.pth cannot be read'),
        ('merge base.pth a.safetensors -o m.pth --fit --lr lr', '--gt and --scale is not given'),
        ('merge base.pth a.safetensors -o m.pth --scale 2', '--scale is for --fit'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt lr --lr gt --scale 2 -opt o.yml', GT_AS_LR),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 4 -opt o.yml',
            'be 2, that of the .* got 4',
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt lr --lr lr --scale 2 -opt o.yml',
            'got lr and lr, which are the',
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt twins --lr lr --scale 2 -opt o.yml',
            'got that of 0.bmp: ren',
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt border --lr half --scale 2 -opt o.yml',
            'half/0.png must have more than 2 pixels each way, .* got 2 x 2',
        ),
        ('merge base.pth a.safetensors -o m.pth --import .', r'must be a .py file or a module, .* got "\."\.'),
        ('merge base.pth a.safetensors -o m.pth --import os.', r'must be a .py file or a module, .* got "os\."\.'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt lr --lr lr --scale 0 -opt o.yml', 'The scale is 0'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr none --scale 2 -opt o.yml', 'none.* not a folder'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt no.yml', 'no.yml cannot be read'),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt none.yml', 'has no network_g'),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt name.yml',
            "no network 'Fast'",
        ),
        (
            'merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt key.yml',
            "depth is not a known key; did you mean 'width'",
        ),
        ('merge base.pth a.safetensors -o m.pth --fit --gt gt --lr lr --scale 2 -opt size.yml', 'does not fit'),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(files, capsys, monkeypatch, arguments, message):
    folder, base = files
    monkeypatch.chdir(folder)
    write_pairs(folder, base, 1)
    for name, length in (('border', 4), ('half', 2)):
        (folder / name).mkdir()
        cv2.imwrite(f'{name}/0.png', np.zeros((length, length, 3), np.uint8))
    shutil.copytree('gt', 'twins')
    shutil.copy('gt/0.png', 'twins/0.bmp')
    option_file(folder, base)
    (folder / 'options.yml').rename('o.yml')
    for name, text in (
        ('none', 'name: x'),
        ('name', 'network_g: {type: Fast}'),
        ('key', 'network_g: {type: OfOnesOwn, depth: 3}'),
        ('size', 'network_g: {type: OfOnesOwn, width: 9}'),
    ):
        (folder / f'{name}.yml').write_text(f'{text}\n')
    for name in ('there.pth', 'there.safetensors'):
        (folder / name).write_text('mine')
    wide = OfOnesOwn(12) if type(base) is OfOnesOwn else MSRResNet(num_feat=12, num_block=1, upscale=2)
    save_adapter(adapt(wide, LoRAConfig(groups=['all']), 0), 'wide.safetensors')
    damaged = read_adapter('a.safetensors')
    for key, value in damaged.tensors.items():
        if key.endswith('lora_B'):
            value[0, 0] = float('nan')
    save_adapter(damaged, 'nan.safetensors')
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_weights_on_the_command_line(files, monkeypatch, capsys):
    folder, _ = files
    monkeypatch.chdir(folder)
    for text in ('a.safetensors=half', 'a.safetensors=nan', '=0.5', 'a.safetensors='):
        with pytest.raises(SystemExit, match='2'):
            run('merge', 'base.pth', text, '-o', 'm.pth')
        assert 'should be FILE or FILE=WEIGHT' in capsys.readouterr().err
    (folder / 'a.safetensors').rename('a=1.safetensors')
    assert run('merge', 'base.pth', 'a=1.safetensors', '-o', 'm.pth') == 0
    assert run('merge', 'base.pth', 'a=1.safetensors=0.5', '-o', 'm.pth') == 2
    assert run('merge', 'base.pth', 'a=1.safetensors=-5e-1', '-o', 'm.pth', '--overwrite') == 0
    assert 'weight -0.5000' in capsys.readouterr().out
