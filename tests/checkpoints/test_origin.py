"""Where files say they come from, and adapters that know their base."""

import hashlib
import json
import time

import onnx
import pytest
import safetensors
import torch
import yaml
from safetensors.torch import save_file
from tiny_run import TINY_OPTIONS, run_python, write_pairs

import lora_sr
from lora_sr import load_network
from lora_sr.adapters import lora_layers
from lora_sr.archs import SPAN, DSCLoRA
from lora_sr.checkpoints import Checkpoint, NetworkSource, Origin
from lora_sr.checkpoints.origin import fingerprint
from lora_sr.cli.main import main
from lora_sr.errors import InputError
from lora_sr.option_file import load_options


def test_fingerprint_is_of_names_types_shapes_and_values():
    state = {'b.weight': torch.arange(6.0).view(2, 3), 'a': torch.ones((), dtype=torch.float16)}
    digest = hashlib.sha256()
    digest.update(b'a ()\n' + state['a'].float().numpy().tobytes())
    digest.update(b'b.weight (2, 3)\n' + state['b.weight'].numpy().tobytes())
    half = {key: value.half() for key, value in state.items()}  # these values are the same in every precision
    assert fingerprint(half) == fingerprint({**state, 'bn.running_mean': torch.rand(3)}) == digest.hexdigest()
    assert fingerprint(state) == digest.hexdigest()
    assert fingerprint({**dict(reversed(state.items())), 'b.lora_A': torch.rand(1)}) == digest.hexdigest()
    for other in (
        {**state, 'b.weight': state['b.weight'].view(3, 2)},
        {**state, 'b.weight': state['b.weight'] + 1e-6},
        {'c': state['a'], 'b.weight': state['b.weight']},
    ):
        assert fingerprint(other) != digest.hexdigest()


@pytest.mark.parametrize(
    'value',
    [
        torch.zeros(()).expand(1),
        torch.ones(2, 3).T,
        torch.zeros(0, 4),
        torch.ones([1] * 100 + [3]),
        torch._neg_view(torch.ones(3)),
        torch.full((2,), 1 + 2j).conj(),
    ],
)
def test_fingerprint_is_of_values_however_they_are_stored(value):
    plain = torch.tensor(value.flatten().tolist(), dtype=value.dtype).reshape(value.shape)
    assert fingerprint({'a': value}) == fingerprint({'a': plain})


def test_origin_reads_what_it_writes():
    origin = Origin(
        run='a', iteration=7, options='0' * 64, network={'type': 'SPAN'}, base='1' * 64, adapters=('2' * 64,)
    )
    assert Origin.parse(origin.to_json()) == Origin.parse(origin.to_dict()) == origin
    assert origin.version == lora_sr.__version__
    for other in ('{', '3', 3, None, []):
        assert Origin.parse(other) is None
    later = {'run': 'a', 'of a later version': 1, 'version': '9.9', 'iteration': '7', 'adapters': None}
    assert Origin.parse(later) == Origin(run='a', version='9.9')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run of DSCLoRA with EMA, four iterations, with an override."""
    folder = tmp_path_factory.mktemp('run')
    write_pairs(folder / 'pairs')
    torch.manual_seed(0)
    torch.save({'params': SPAN(feature_channels=4, upscale=2, deploy=True).state_dict()}, folder / 'base.pth')
    options = yaml.safe_load(TINY_OPTIONS.format(root=folder / 'pairs', suffix='', backend='disk'))
    options.update(val=None, network_g={'type': 'DSCLoRA', 'feature_channels': 4, 'upscale': 2, 'rank': 2})
    options['datasets'].pop('val')
    options['path']['pretrain_network_g'] = 'base.pth'
    options['train']['ema_decay'] = 0.5
    (folder / 'tiny.yml').write_text('# mine\n' + yaml.safe_dump(options))
    run_python('-m', 'lora_sr.train', '-opt', 'tiny.yml', '--force_yml', 'train:total_iter=4', cwd=folder)
    return folder


@pytest.mark.slow
def test_a_run_says_what_it_was(run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    experiment = run / 'experiments/tiny'
    effective = load_options(experiment / 'tiny.yml')
    expected = load_options(run / 'tiny.yml')
    expected['train']['total_iter'] = 4
    assert effective == expected
    head = (experiment / 'tiny.yml').read_text().splitlines()
    assert head[1] == '# python -m lora_sr.train -opt tiny.yml --force_yml train:total_iter=4'

    digest = hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()
    base = fingerprint(torch.load('base.pth', weights_only=True)['params'])
    for name, iteration in (('models/net_g_2.pth', 2), ('models/net_g_latest.pth', None)):
        written = torch.load(experiment / name, weights_only=True)
        assert list(written) == ['params', 'params_ema', 'lora_sr']
        assert Origin.parse(written['lora_sr']) == Origin(
            run='tiny', iteration=iteration, options=digest, network=dict(expected['network_g']), base=base
        )
    state = torch.load(experiment / 'training_states/2.state', weights_only=True)
    assert Origin.parse(state['lora_sr']).iteration == 2

    # It goes on from there, and knows its base still.
    again = ['-m', 'lora_sr.train', '-opt', 'tiny.yml', '--auto_resume', '--force_yml', 'train:total_iter=6']
    run_python(*again, cwd=run)
    resumed = Checkpoint.read(experiment / 'models/net_g_6.pth').origin
    assert (resumed.base, resumed.iteration) == (base, 6) and resumed.options != digest

    assert main(['inspect', str(experiment / 'models/net_g_2.pth')]) == 0
    assert f'run tiny, iteration 2, options {digest[:12]}, base {base[:12]}' in capsys.readouterr().out


@pytest.mark.slow
def test_commands_hand_it_on(run, tmp_path, capsys):
    trained = run / 'experiments/tiny/models/net_g_2.pth'
    origin = Checkpoint.read(trained).origin
    assert main(['merge', str(trained), '-o', str(tmp_path / 'merged.safetensors')]) == 0
    assert main(['export', 'onnx', str(trained), '-o', str(tmp_path / 'net.onnx')]) == 0
    assert main(['export', 'torchscript', str(trained), '-o', str(tmp_path / 'net.pt')]) == 0
    assert main(['adapter', 'extract', str(trained), '-o', str(tmp_path / 'a.safetensors')]) == 0
    found = {}
    for name in ('merged', 'a'):
        with safetensors.safe_open(tmp_path / f'{name}.safetensors', 'pt') as file:
            found[name] = Origin.parse(file.metadata()['lora_sr'])
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / 'net.onnx').metadata_props}
    found['onnx'] = Origin.parse(properties['lora_sr'])
    extra = {'metadata.json': ''}
    torch.jit.load(tmp_path / 'net.pt', _extra_files=extra)
    found['torchscript'] = Origin.parse(json.loads(extra['metadata.json'])['lora_sr'])
    for one in found.values():
        assert (one.run, one.iteration, one.options, one.base) == ('tiny', 2, origin.options, origin.base)
    assert found['merged'].adapters == found['onnx'].adapters == found['torchscript'].adapters != ()
    assert found['a'].adapters == ()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A base, another of the same shapes, and an adapter of the first."""
    monkeypatch.chdir(tmp_path)
    for name in ('base', 'other'):
        network = SPAN(feature_channels=4, upscale=2, deploy=True)
        torch.save({'params': network.state_dict()}, f'{name}.pth')
    adapted = DSCLoRA(feature_channels=4, upscale=2)
    adapted.load_state_dict(torch.load('base.pth', weights_only=True)['params'])
    for _, layer in lora_layers(adapted):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    torch.save({'params': adapted.state_dict()}, 'adapted.pth')
    assert main(['adapter', 'extract', 'adapted.pth', '-o', 'a.safetensors']) == 0
    return tmp_path


@pytest.mark.parametrize(
    'command', ['adapter merge {} a.safetensors', 'adapter apply {} a.safetensors', 'merge {} --adapter a.safetensors']
)
def test_another_base_and_an_adapter_put_on_twice_are_told(files, capsys, command):
    capsys.readouterr()
    assert main([*command.format('other.pth').split(), '-o', 'x.pth']) == 2
    assert 'was trained on another base than other.pth' in capsys.readouterr().err
    assert main([*command.format('other.pth').split(), '-o', 'x.pth', '--force']) == 0
    assert main(['adapter', 'merge', 'base.pth', 'a.safetensors', '-o', 'once.pth']) == 0
    capsys.readouterr()
    assert main([*command.format('once.pth').split(), '-o', 'twice.pth']) == 2
    assert 'carries the adapter a.safetensors already' in capsys.readouterr().err
    assert main([*command.format('once.pth').split(), '-o', 'twice.pth', '--force']) == 0
    if 'apply' in command:  # it leaves the weights of the base alone
        return
    assert not torch.equal(*(Checkpoint.read(f'{n}.pth').state['conv_2.eval_conv.weight'] for n in ('once', 'twice')))


@pytest.mark.parametrize(
    'command',
    [
        'adapter merge base.pth a.safetensors a.safetensors',
        'merge base.pth --adapter a.safetensors --adapter a.safetensors',
    ],
)
def test_one_adapter_twice_in_a_list_is_told(files, capsys, command):
    assert main([*command.split(), '-o', 'x.pth']) == 2
    assert 'are one adapter: put it on twice with --force' in capsys.readouterr().err
    assert main([*command.split(), '-o', 'x.pth', '--force']) == 0


def test_what_was_put_on_is_what_is_said(files):
    """Not what has no weight, nor what has no LoRA."""
    assert main(['adapter', 'apply', 'base.pth', 'a.safetensors', '-o', 'applied.pth']) == 0
    assert len(Checkpoint.read('applied.pth').origin.adapters) == 1
    assert main(['merge', 'applied.pth', '-o', 'merged.pth']) == 0
    assert Checkpoint.read('merged.pth').origin.adapters == Checkpoint.read('applied.pth').origin.adapters
    assert main(['adapter', 'merge', 'base.pth', 'a.safetensors=0', '-o', 'none.pth']) == 0
    assert Checkpoint.read('none.pth').origin.adapters == ()
    assert main(['export', 'torchscript', 'base.pth', '-o', 'net.pt']) == 0
    extra = {'metadata.json': ''}
    torch.jit.load('net.pt', _extra_files=extra)
    assert Origin.parse(json.loads(extra['metadata.json'])['lora_sr']).adapters == ()


def test_the_other_state_dict_of_a_file_is_named(files, capsys):
    base, other = (torch.load(f'{name}.pth', weights_only=True)['params'] for name in ('base', 'other'))
    wrapped = {f'module.{key}': value for key, value in base.items()}
    for content, key in (
        ({'params': base, 'params_ema': other}, 'params'),
        ({'params_ema': other, 'state': {'deep': {'er': wrapped}}}, 'state.deep.er'),
        ({'params_ema': other, 'a.b': {'c': base}, 'a': {'b': other}}, 'a.b.c'),
        ({'params_ema': other, 'odd': {'module.x': base['conv_cat.bias'], 'x': base['conv_cat.bias']}, 'G': base}, 'G'),
    ):
        torch.save(content, 'both.pth')
        capsys.readouterr()
        for command in ('adapter merge both.pth a.safetensors', 'merge both.pth --adapter a.safetensors'):
            assert main([*command.split(), '-o', 'm.pth']) == 2
            error = capsys.readouterr().err
            assert f'was trained on the state dict {key} of both.pth' in error and f'--param-key {key}.' in error
            assert main([*command.split(), '-o', 'm.pth', '--param-key', key]) == 0
            (files / 'm.pth').unlink()


@pytest.mark.parametrize('name', ['\n\x1b[31m', 'x' * 100_000])
def test_where_the_other_state_dict_is_stays_one_sentence(files, name):
    base, other = (torch.load(f'{name}.pth', weights_only=True)['params'] for name in ('base', 'other'))
    torch.save({'params_ema': other, 'deep': {name: {'G': base}}}, 'both.pth')
    with pytest.raises(InputError, match='on the state dict deep') as raised:
        load_network(NetworkSource('both.pth', adapters=[('a.safetensors', 1.0)]))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


def test_a_file_of_thousands_of_state_dicts_is_not_compared_to_its_end(files, capsys):
    """All of them are one, which takes the file a few bytes more each time."""
    other = torch.load('other.pth', weights_only=True)['params']
    large = {'weight': torch.zeros(10**7)}
    torch.save({'params': other, 'large': large, **{f'other {i}': dict(large) for i in range(5000)}}, 'many.pth')
    start = time.process_time()
    assert main('adapter merge many.pth a.safetensors -o m.pth'.split()) == 2
    assert 'was trained on another base than many.pth' in capsys.readouterr().err
    assert time.process_time() - start < 30  # at 0.05 s each it would be minutes


@pytest.mark.parametrize(
    'command, output',
    [
        ('merge adapted.pth', 'adapted.pth'),
        ('merge base.pth --adapter a.safetensors', 'a.safetensors'),
        ('adapter merge base.pth a.safetensors', 'base.pth'),
        ('adapter merge base.pth a.safetensors', 'a.safetensors'),
        ('adapter apply base.pth a.safetensors', 'link.safetensors'),
        ('adapter apply base.pth a.safetensors=0.5', 'a.safetensors'),
        ('adapter extract adapted.safetensors', 'adapted.safetensors'),
        ('merge own.pth', 'own.pth'),
    ],
)
def test_nothing_replaces_what_it_is_made_of(files, capsys, command, output):
    (files / 'link.safetensors').symlink_to(files / 'a.safetensors')
    adapted = Checkpoint.read('adapted.pth').state
    save_file(adapted, 'adapted.safetensors')
    torch.save({f'own.{key}': value for key, value in adapted.items()}, 'own.pth')
    before = (files / output).read_bytes()
    assert main([*command.split(), '-o', output, '--overwrite']) == 2
    assert f'The output {output} is the input ' in capsys.readouterr().err
    assert (files / output).read_bytes() == before
