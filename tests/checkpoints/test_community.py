"""Networks of the community: what spandrel builds is loaded, adapted, merged and given back as its file was."""

import json
import random
import re
import resource
import time
import warnings

import pytest
import spandrel
import torch
from community_networks import SMALL
from hostile import assert_refused
from tiny_run import TINY_OPTIONS, run_python
from torch import nn

import lora_sr
from lora_sr.adapters import LoRAConfig, add_lora, is_lora_key, left_alone, lora_layers, mark_trainable
from lora_sr.archs import AdaptSR, network_info
from lora_sr.checkpoints import Checkpoint, load_network
from lora_sr.checkpoints.building import build_network
from lora_sr.checkpoints.community import architecture_name
from lora_sr.checkpoints.layouts import layout_of
from lora_sr.checkpoints.networks import open_network
from lora_sr.checkpoints.origin import Origin, fingerprint
from lora_sr.cli.main import main
from lora_sr.errors import InputError, import_basicsr

# In which trainers put a generator, or what they put before its names.
WRAPPINGS = {
    'bare': lambda state: state,
    'params_ema': lambda state: {'params': {}, 'params_ema': state},
    'lightning': lambda state: {'state_dict': {f'net_g.{name}': value for name, value in state.items()}, 'epoch': 3},
    'parallel': lambda state: {'model_state_dict': {f'module.{name}': value for name, value in state.items()}},
    'compiled': lambda state: {'generator': {f'_orig_mod.{name}': value for name, value in state.items()}},
}


def named(names):
    return [pytest.param(name, marks=pytest.mark.slow) if SMALL[name].is_slow else name for name in names]


ALL = named(SMALL)
# What `lora-sr merge` gives of SPAN is its deploy form, which spandrel does not know.
ADAPTED = named(name for name in SMALL if name != 'SPAN')
OF_SPANDREL = named(name for name, small in SMALL.items() if small.family is None)


@pytest.fixture
def write(tmp_path):
    """A function: write the file of a small network, in one of the wrappings."""

    def write(name, wrapping=None):
        file = tmp_path / f'{re.sub(r"[^a-zA-Z0-9]", "_", name)}.pth'
        torch.save(WRAPPINGS[wrapping or random.Random(name).choice([*WRAPPINGS])](SMALL[name].state()), file)
        return file

    return write


def described(state):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return spandrel.ModelLoader(device='cpu').load_from_state_dict(dict(state)).eval()


def run(network, images):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # AuraSR adds noise to its images
        return network(images.clone())


def image(channels, height, width, batch=1):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_every_architecture_of_spandrel_is_here():
    known = {support.architecture.id for support in spandrel.MAIN_REGISTRY}
    assert known - {small.architecture for small in SMALL.values()} == {'GFPGAN', 'RestoreFormer', 'LaMa'}


@pytest.mark.parametrize('name', ALL)
def test_gives_what_spandrel_gives(write, name, recwarn):
    expected, file, small = described(SMALL[name].state()), write(name), SMALL[name]
    import_basicsr('BasicSR')  # whose own warnings are another matter
    recwarn.clear()
    checkpoint = Checkpoint.read(file)
    network = load_network(checkpoint)
    assert checkpoint.family == small.family
    assert architecture_name(network) == (None if small.family else expected.architecture.name)
    info = network_info(network)
    assert (info.in_channels, info.out_channels, info.scale) == (
        *(expected.input_channels, expected.output_channels),
        expected.scale,
    )
    for height, width in ((5, 7), (24, 32), (33, 47)):
        if small.family == 'SwinIR' and height < 16:
            continue  # spandrel pads to 16 pixels and BasicSR's to a window, and both cannot be right
        images = image(info.in_channels, height, width)
        output = run(network, images)
        # Networks of random weights give values far from [0, 1], and rounding is relative to these.
        assert (output.clamp(0, 1) - run(expected, images)).abs().max() <= 1e-5 * max(1, output.abs().max())
    batch = image(info.in_channels, 24, 32, batch=2)
    one_by_one = torch.cat([run(network, one) for one in batch.split(1)])
    if name != 'AuraSR':
        assert torch.allclose(run(network, batch), one_by_one, rtol=1e-4, atol=1e-5)
    assert [str(one.message) for one in recwarn] == []


def train(network, channels):
    """Two steps, which change every update that has a part in the output."""
    optimizer = torch.optim.Adam([value for value in network.parameters() if value.requires_grad], lr=1e-3)
    network.train()
    for _ in range(2):
        loss = (network(image(channels, 16, 16, batch=2)) - 0.5).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


@pytest.mark.parametrize('name', ADAPTED)
def test_spandrel_loads_what_was_adapted_and_merged(write, tmp_path, capsys, name):
    small, file = SMALL[name], write(name)
    lora, section = {'groups': ['all'], 'rank': 2}, {'type': 'spandrel', 'path': str(file)}
    if small.family is None:
        network, origin = AdaptSR(section, lora), {'type': 'AdaptSR', 'base': section, 'lora': lora}
    else:
        network, origin = add_lora(load_network(file), LoRAConfig.from_dict(lora)), None
        mark_trainable(network)
    info = network_info(network)
    before = run(network, image(info.in_channels, 24, 32))
    train(network, info.in_channels)
    trained, merged = tmp_path / 'net_g_2.pth', tmp_path / 'merged.pth'
    written = Origin(network=origin, layout=layout_of(network)).to_dict()
    torch.save({'params': network.state_dict(), 'lora_sr': written}, trained)

    assert main(['merge', str(trained), '-o', str(merged)]) == 0
    assert f'layers with LoRA      {len(list(lora_layers(network)))} ' in capsys.readouterr().out

    state = torch.load(merged, weights_only=True)['params']
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in small.state().items()
    }
    images = image(info.in_channels, 24, 32)
    output = run(network, images)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = spandrel.ModelLoader(device='cpu').load_from_file(merged).eval()
    assert (run(again, images) - output.clamp(0, 1)).abs().max() <= 1e-5
    assert (output - before).abs().max() > 1e-6
    assert fingerprint(load_network(file).state_dict()) == fingerprint(
        {key: value for key, value in network.state_dict().items() if not is_lora_key(key)}
    )


@pytest.mark.parametrize('name', OF_SPANDREL)
def test_an_optimized_network_is_the_network(write, name):
    network = load_network(write(name, 'bare'))
    images = image(network_info(network).in_channels, 24, 32)
    expected, given = run(network, images), run(lora_sr.optimize(network), images)
    # The noise of AuraSR depends on the memory format.
    tolerance = 0.01 if name == 'AuraSR' else 1e-4
    assert (given - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize('name', ['HAT', 'SwinIR-unshuffle'])
def test_adapters_go_onto_a_file_whatever_its_names(write, tmp_path, name):
    file = write(name, 'lightning')
    network = add_lora(load_network(file), LoRAConfig(groups=['all'], rank=2))
    for _, layer in lora_layers(network):
        nn.init.normal_(layer.lora_B, std=0.02)
    torch.save(
        {'params': network.state_dict(), 'lora_sr': Origin(layout=layout_of(network)).to_dict()}, file.parent / 't.pth'
    )
    adapter, both = tmp_path / 'adapter.safetensors', tmp_path / 'both.pth'
    outputs = [tmp_path / f'{kind}.pth' for kind in ('merged', 'mixed', 'applied')]
    for arguments in (
        ('adapter', 'extract', tmp_path / 't.pth', '-o', adapter),
        ('merge', tmp_path / 't.pth', '-o', outputs[0]),
        ('adapter', 'merge', file, f'{adapter}=1', '-o', outputs[1]),
        ('adapter', 'apply', file, adapter, '-o', both),
        ('merge', both, '-o', outputs[2]),
    ):
        assert main([str(argument) for argument in arguments]) == 0
    first, *others = (torch.load(output, weights_only=True)['params'] for output in outputs)
    assert first.keys() == SMALL[name].state().keys()
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.allclose(other[key], first[key], atol=1e-6) for key in first)


@pytest.mark.parametrize('prefix', ['model.', 'model_g.'])
def test_files_of_grl_keep_their_names(tmp_path, prefix):
    state = {f'{prefix}{name}': value for name, value in SMALL['GRL'].state().items()}
    beside = {'model_ema.decay': torch.zeros(())} if prefix == 'model_g.' else {}
    torch.save({'state_dict': {**state, **beside}}, tmp_path / 'grl.ckpt')
    network = add_lora(load_network(tmp_path / 'grl.ckpt'), LoRAConfig(groups=['attention'], rank=1))
    written = Origin(layout=layout_of(network)).to_dict()
    torch.save({'params': network.state_dict(), 'lora_sr': written}, tmp_path / 'trained.pth')
    assert main(['merge', str(tmp_path / 'trained.pth'), '-o', str(tmp_path / 'merged.pth')]) == 0
    merged = torch.load(tmp_path / 'merged.pth', weights_only=True)['params']
    assert merged.keys() == state.keys()


def test_grl_keeps_the_tables_that_tell_the_size_of_its_windows(tmp_path):
    from spandrel.architectures.GRL import GRL

    arguments = {**SMALL['GRL'].arguments, 'window_size': 4, 'stripe_size': [8, 8], 'anchor_window_down_factor': 2}
    network = GRL(**arguments).eval()
    tables = {name: value for name, value in network.named_buffers() if name.startswith(('table', 'index', 'mask'))}
    torch.save({**network.state_dict(), **tables}, tmp_path / 'grl.pth')
    loaded = load_network(tmp_path / 'grl.pth')
    assert loaded.layers[0].blocks[0].window_size == (4, 4)
    assert tables.keys() <= loaded.state_dict().keys()


def test_older_layouts_of_esrgan_come_back(tmp_path):
    """Through spandrel where BasicSR's class does not fit: here x2 in the names of BSRGAN."""
    state = bsrgan(SMALL['ESRGAN-x2'])
    torch.save(state, tmp_path / 'bsrgan_x2.pth')
    network = add_lora(load_network(tmp_path / 'bsrgan_x2.pth'), LoRAConfig(groups=['conv'], rank=1))
    images = image(3, 24, 32)
    assert (run(network, images).clamp(0, 1) - run(described(state), images)).abs().max() <= 1e-5
    written = Origin(layout=layout_of(network)).to_dict()
    torch.save({'params': network.state_dict(), 'lora_sr': written}, tmp_path / 'trained.pth')
    assert main(['merge', str(tmp_path / 'trained.pth'), '-o', str(tmp_path / 'merged.pth')]) == 0
    assert torch.load(tmp_path / 'merged.pth', weights_only=True)['params'].keys() == state.keys()


def bsrgan(small):
    """The state dict of an ESRGAN in the names of BSRGAN."""
    names = {'model.0.': 'conv_first.', 'model.3.': 'upconv1.', 'model.5.': 'HRconv.', 'model.7.': 'conv_last.'}
    state = {}
    for name, value in small.state().items():
        name = re.sub(r'^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.', r'RRDB_trunk.\1.RDB\2.conv\3.', name)
        name = re.sub(r'^model\.1\.sub\.\d+\.', 'trunk_conv.', name)
        for old, new in names.items():
            name = name.replace(old, new) if name.startswith(old) else name
        state[name] = value
    return state


def refused(folder, state):
    torch.save(state, folder / 'net.pth')
    with pytest.raises(InputError) as caught:
        load_network(folder / 'net.pth')
    return str(caught.value).replace(f'{folder}/', '')


@pytest.mark.parametrize('name', ['ESRGAN-x2', 'PLKSR', 'HAT', 'SwinIR-unshuffle'])
def test_a_tensor_that_the_network_does_not_take_is_told(tmp_path, name):
    state = bsrgan(SMALL[name]) if name == 'ESRGAN-x2' else SMALL[name].state()
    sentence = refused(tmp_path, {**state, 'extra.weight': torch.zeros(3)})
    architecture = SMALL[name].architecture
    assert sentence == f'net.pth does not fit the {architecture} of its names: 1 key is not known to it (extra.weight).'


def test_what_spandrel_throws_away_is_no_mistake(tmp_path):
    counts = {'total_ops': torch.zeros(1), 'up.total_params': torch.zeros(1)}
    tables = {name: value for name, value in SMALL['GRL'].build().named_buffers() if name.startswith(('table', 'mask'))}
    grl = {**SMALL['GRL'].state(), **tables}
    for number, state in enumerate(
        (
            {**SMALL['OmniSR'].state(), **counts},
            grl,
            {f'model.{name}': value for name, value in grl.items()},
            {**{f'model_g.{name}': value for name, value in grl.items()}, 'model_d.conv.weight': torch.zeros(3)},
        )
    ):
        torch.save(state, tmp_path / f'{number}.pth')
        load_network(tmp_path / f'{number}.pth')


def test_misfits_are_said_in_our_words(tmp_path):
    state = SMALL['PLKSR'].state()
    key = 'feats.1.lk.conv.bias'
    start = 'net.pth does not fit the PLKSR of its names: '
    without = {name: value for name, value in state.items() if name != key}
    assert refused(tmp_path, without) == f'{start}1 key is missing ({key}).'
    shapes = refused(tmp_path, {**state, key: torch.zeros(5)})
    assert shapes == f'{start}{key} has shape (5,) instead of (4,).'
    lacking = {name: value for name, value in state.items() if name != 'feats.1.channe_mixer.2.weight'}
    assert refused(tmp_path, lacking) == 'net.pth is incomplete: it lacks feats.1.channe_mixer.2.weight.'


@pytest.mark.parametrize('name', ['PLKSR', 'SwinIR-unshuffle'])
def test_an_option_file_whose_base_names_its_file_has_its_weights(write, tmp_path, capsys, name):
    file, options = write(name, 'lightning'), tmp_path / 'net.yml'
    base, images = {'type': 'spandrel', 'path': str(file)}, image(3, 24, 32)
    expected = run(described(SMALL[name].state()), images)
    for section in (base, {'type': 'AdaptSR', 'base': base, 'lora': {'groups': ['all'], 'rank': 2}}):
        options.write_text(json.dumps({'network_g': section}))
        opened = open_network(options)
        assert (run(opened.network, images).clamp(0, 1) - expected).abs().max() <= 1e-5
        assert opened.checkpoint.path == file and layout_of(opened.network) == layout_of(load_network(file))
        assert main(['export', 'chainner', str(options), '-o', str(tmp_path / 'o.pth'), '--overwrite']) == 0
        assert torch.load(tmp_path / 'o.pth', weights_only=True)['params'].keys() == SMALL[name].state().keys()
    for section, sentence in (
        ({'type': 'spandrel'}, 'network_g.path is missing'),
        ({**base, 'path': str(tmp_path / 'none.pth')}, 'none.pth cannot be read: No such file or directory'),
        ({**base, 'path': 3}, 'network_g: path must be a file of weights, got 3.'),
        ({**base, 'pth': 3}, 'network_g.pth is not a known key; '),
        ({'type': 'AdaptSR', 'base': {'type': 'spandrel'}, 'lora': {}}, 'network_g.base.path is missing'),
    ):
        options.write_text(json.dumps({'network_g': section}))
        assert sentence in assert_refused(capsys, 'export', 'onnx', options, '-o', tmp_path / 'o.onnx')


def test_windows_behind_an_unshuffled_image_are_filled(tmp_path):
    """spandrel pads to multiples of 4 where windows of 8 behind a pixel unshuffling by 2 want 16."""
    small = SMALL['SwinIR-unshuffle']
    large = {**small.arguments, 'window_size': 8}
    state = type(small)(small.architecture, small.kind, large, names=small.names).state()
    torch.save(state, tmp_path / 'net.pth')
    network = load_network(tmp_path / 'net.pth')
    assert network_info(network).size_multiple == 16
    images = image(3, 32, 48)
    assert (run(network, images).clamp(0, 1) - run(described(state), images)).abs().max() <= 1e-5
    assert run(network, image(3, 21, 35)).shape == (1, 3, 42, 70)


def test_what_a_network_freezes_itself_is_not_adapted(write):
    network = AdaptSR({'type': 'spandrel', 'path': str(write('RCAN'))}, {'groups': ['all'], 'rank': 2})
    assert {one.name for one in left_alone(network)} == {'sub_mean', 'add_mean'}
    assert not any('mean' in name for name, value in network.named_parameters() if value.requires_grad)


def test_a_file_with_lora_is_no_base(write, tmp_path):
    file = write('Swin2SR')
    network = add_lora(load_network(file), LoRAConfig(groups=['mlp'], rank=1))
    torch.save(network.state_dict(), tmp_path / 'adapted.pth')
    with pytest.raises(InputError, match='adapted.pth must be a base, got a checkpoint with LoRA'):
        build_network({'type': 'spandrel', 'path': str(tmp_path / 'adapted.pth')})
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / 'conv.pth')
    with pytest.raises(InputError, match='conv.pth must be of an architecture of spandrel, got one of none'):
        build_network({'type': 'spandrel', 'path': str(tmp_path / 'conv.pth')})


@pytest.mark.parametrize('architecture', ['GFPGAN', 'RestoreFormer', 'LaMa'])
def test_networks_for_faces_and_holes_are_refused(tmp_path, capsys, architecture):
    support = next(one for one in spandrel.MAIN_REGISTRY if one.architecture.id == architecture)
    state, asked = {}, []

    class Asked(dict):
        def __contains__(self, key):
            asked.append(key)
            return key in self.keys()

    while not support.detect(Asked(state)):  # which asks for one key after the other
        state[next(key for key in asked if key not in state)] = torch.zeros(1)
    torch.save(state, tmp_path / 'face.pth')
    error = assert_refused(capsys, 'export', 'torchscript', tmp_path / 'face.pth', '-o', tmp_path / 'out.pt')
    assert f'face.pth is a {architecture}, for ' in error and error.endswith('where SR and restoration are right.\n')


@pytest.mark.parametrize(('dtype', 'right'), [('float16', 'float32 or bfloat16'), ('bfloat16', 'float32')])
def test_types_of_16_bits_are_those_that_spandrel_knows(write, monkeypatch, dtype, right):
    network = load_network(write('HAT' if dtype == 'float16' else 'AuraSR'))
    monkeypatch.setattr('lora_sr.runtime.deployed._device', lambda network: torch.device('meta'))
    with pytest.raises(InputError, match=f'must run in {right}, got {dtype}'):
        lora_sr.optimize(network, getattr(torch, dtype))


def hostile(name):
    """State dicts of an architecture that no network has, with what each of them is."""
    state, chosen = SMALL[name].state(), random.Random(name)
    for key in chosen.sample([*state], 2):
        yield f'without {key}', {other: value for other, value in state.items() if other != key}
        value = state[key]
        for what, instead in (
            ('scalar', torch.zeros(())),
            ('empty', torch.zeros(0)),
            ('wide', torch.zeros(1, 1, 1, 1).expand(5000, 6000, 1, 1)),
            ('endless', torch.zeros(1).expand(10**12)),
            ('long', torch.zeros(1).expand(16 * 10**6)),
            *([('complex', value.to(torch.complex64))] if value.is_floating_point() else []),
        ):
            yield f'{what} {key}', {**state, key: instead}
    weight = next(key for key in state if key.endswith('weight') and state[key].is_floating_point())
    yield 'NaN', {**state, weight: state[weight] * float('nan')}
    for key in chosen.sample([key for key in state if re.search(r'\.\d+\.', key)], 1):
        for number in ('1000000000', '99999', '9' * 30, '²', '-1'):
            other = re.sub(r'\.\d+\.', f'.{number}.', key, count=1)
            yield f'number {number}', {**state, other: state[key]}
            yield f'only number {number}', {other if one == key else one: value for one, value in state.items()}
    for key in [key for key in state if key in SIZES.get(SMALL[name].architecture, ())]:
        for number in (10**4, 10**9, -(10**9)):
            yield f'{key} of {number}', {**state, key: torch.zeros_like(state[key]) + number}


# Tensors whose values tell sizes.
SIZES = {
    'DAT': {'layers.0.blocks.0.attn.attns.0.rpe_biases'},
    'FDAT': {'upsampler.MetaUpsample'},
    'IPT': {'sub_mean.bias'},
}


def small_mistakes(what):
    """What a network may have: a window of another size, say."""
    return what.startswith(('scalar', 'sub_mean', 'without', 'wide', 'number 99'))


HOSTILE = {'HAT', 'DAT', 'FDAT', 'ESRGAN-x2', 'Swin2SR'}


@pytest.mark.parametrize(
    'name',
    [
        name if name in HOSTILE else pytest.param(name, marks=pytest.mark.slow)
        for name, small in SMALL.items()
        if small.family is None
    ],
)
def test_hostile_files_end_in_a_sentence(tmp_path, name):
    described({key: value.clone() for key, value in SMALL[name].state().items()})
    for what, state in hostile(name):
        torch.save(state, tmp_path / 'bad.pth')
        memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            load_network(tmp_path / 'bad.pth')
        except InputError as error:
            message = str(error).replace(str(tmp_path), '')
            assert message.isprintable() and 'bad.pth' in message and len(message) < 500, what
        else:
            assert small_mistakes(what), what
        assert time.monotonic() - begin < 20, what
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**21, what  # KiB


@pytest.mark.slow
@pytest.mark.parametrize('name', ['HAT', 'SwinIR-unshuffle'])
def test_runs_from_an_option_file(write, pairs, tmp_path, name):
    """A training from a wrapped file, which goes on, and whose merged network spandrel loads."""
    file = write(name, 'lightning')
    options = TINY_OPTIONS.format(root=pairs, suffix='', backend='disk')
    section = (
        f'network_g: {{type: AdaptSR, base: {{type: spandrel, path: {file}}}, lora: {{groups: [all], rank: 2}}}}\n'
    )
    options = re.sub(r'network_g:\n(  .*\n)+', section, options)
    (tmp_path / 'train.yml').write_text(options)
    run_python('-m', 'lora_sr.train', '-opt', tmp_path / 'train.yml', cwd=tmp_path)
    models = tmp_path / 'experiments/tiny/models'
    run_python('-m', 'lora_sr.cli.main', 'merge', models / 'net_g_6.pth', '-o', 'merged.pth', cwd=tmp_path)
    merged = torch.load(tmp_path / 'merged.pth', weights_only=True)['params']
    assert merged.keys() == SMALL[name].state().keys()
    images = image(3, 24, 32)
    trained = load_network(models / 'net_g_6.pth')
    assert (run(described(merged), images) - run(trained, images).clamp(0, 1)).abs().max() <= 1e-5
    options = options.replace('total_iter: 6', 'total_iter: 8')
    (tmp_path / 'train.yml').write_text(options)
    run_python('-m', 'lora_sr.train', '-opt', tmp_path / 'train.yml', '--auto_resume', cwd=tmp_path)
    assert (models / 'net_g_8.pth').is_file()
