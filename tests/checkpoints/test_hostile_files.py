"""Damaged and hostile files end in one sentence: no traceback, no endless reading, no memory without a bound."""

import json
import os
import resource
import sys
import time
import types

import pytest
import torch
from basicsr.archs import edsr_arch as basicsr_edsr
from basicsr.archs import swinir_arch as basicsr_swinir
from hostile import KEY, assert_refused, span
from safetensors.torch import save_file

from lora_sr.adapters import LoRAConfig, add_lora, extract_adapter
from lora_sr.archs import LKDN, SPAN
from lora_sr.checkpoints import Checkpoint, NetworkSource, building, load_network
from lora_sr.checkpoints.bounds import bounded, check_numbers, little_memory
from lora_sr.checkpoints.building import build_network
from lora_sr.checkpoints.content import load_weights
from lora_sr.checkpoints.origin import Origin
from lora_sr.cli.main import main
from lora_sr.errors import InputError

SWINIR = {'type': 'SwinIR', 'img_size': 8, 'window_size': 4, 'depths': [2], 'num_heads': [2], 'embed_dim': 4}


@pytest.fixture
def refuse(tmp_path, capsys):
    def refuse(content, command='merge') -> str:
        torch.save(content, tmp_path / 'bad.pth')
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        error = assert_refused(capsys, command, tmp_path / 'bad.pth', '-o', tmp_path / 'out.pth')
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
        assert len(error.replace(str(tmp_path), '')) < 320
        return error

    return refuse


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda value: value.to(torch.int32), 'conv_cat.weight must be torch.float32, got torch.int32'),
        (lambda value: value > 0, 'must be torch.float32, got torch.bool'),
        (lambda value: value.to(torch.complex64), 'must be torch.float32, got torch.complex64'),
        (lambda value: value.to_sparse(), 'must be a dense tensor, got sparse_coo'),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), 'must be a dense tensor, got'),
        (lambda value: value.to('meta'), 'must have values, got none'),
        (lambda value: value * float('nan'), 'not finite: conv_cat.weight'),
        (lambda value: value.double() + 1e300, 'not finite: conv_cat.weight'),
        (lambda value: torch.zeros(0), 'bad.pth'),
        (lambda value: torch.zeros(()), 'conv_cat.weight has shape () instead of'),
        (lambda value: torch.zeros(1).expand(10**12), 'is damaged: its tensors must have the values that it holds'),
        (
            lambda value: torch.zeros(1, 1, 1, 1).expand(5000, 6000, 1, 1),
            'conv_cat.weight has shape (5000, 6000, 1, 1) instead of',
        ),
    ],
)
def test_no_tensor_is_beyond_a_sentence(refuse, change, message):
    state = span().state_dict()
    assert message in refuse({**state, KEY: change(state[KEY])})


@pytest.mark.parametrize('name', ['conv\nERROR: forged', 'a\0b', '\x1b[31mred', '\u202eabc', 'x' * 5000, 3, b'x', (1,)])
def test_names_are_printable_text(refuse, name):
    message = 'is damaged: a name must be of at most 512 printable letters, got '
    assert message in refuse({'params': {**span().state_dict(), name: torch.zeros(1)}})
    assert message in refuse({name: span().state_dict()})


@pytest.mark.parametrize('metadata', [3, {'': 3}, {'': {'version': 'x'}}, {3: {'version': None}}, {'': {'version': 1}}])
def test_versions_of_modules_may_be_anything(tmp_path, metadata):
    state = span().state_dict()
    state._metadata = metadata
    torch.save(state, tmp_path / 'odd.pth')
    assert isinstance(load_network(tmp_path / 'odd.pth'), SPAN)


@pytest.mark.parametrize('index', [3, 10**14, -1])
def test_positions_of_a_window_are_those_of_its_size(tmp_path, index):
    network = build_network({**SWINIR, 'upscale': 2, 'upsampler': 'pixelshuffledirect'})
    state = network.state_dict()
    state['layers.0.residual_group.blocks.0.attn.relative_position_index'][0, 0] = index
    torch.save(
        {'params': state, 'lora_sr': {'network': {**SWINIR, 'upscale': 2, 'upsampler': 'pixelshuffledirect'}}},
        tmp_path / 'bad.pth',
    )
    with pytest.raises(InputError, match='relative_position_index must be that of SwinIR, got another'):
        load_network(tmp_path / 'bad.pth')


CYCLIC: dict = {'type': 'SPAN'}
CYCLIC['upscale'] = CYCLIC


@pytest.mark.parametrize('odd', [torch.zeros(1), b'x', 1j, torch.float16, {('a',): 1}, {torch.zeros(1): 1}, CYCLIC])
def test_the_network_in_an_origin_is_text(tmp_path, odd):
    content = {'params': span().state_dict(), 'lora_sr': {'network': {'type': 'SPAN', 'upscale': odd}, 'run': 'a run'}}
    torch.save(content, tmp_path / 'odd.pth')
    origin = Checkpoint.read(tmp_path / 'odd.pth').origin
    handed_on = Origin.parse(origin.to_json())
    assert handed_on == Origin.parse(origin.to_dict()) and (handed_on.run, handed_on.network) == ('a run', None)


@pytest.mark.parametrize('optimizers', [3, None, torch.zeros(()), {'state': 3}])
def test_optimizers_are_a_list(tmp_path, capsys, optimizers):
    torch.save({'optimizers': optimizers, 'state': {}, 'param_groups': [], 'iter': 4}, tmp_path / '4.state')
    assert 'its optimizers must be a list, got a ' in assert_refused(capsys, 'inspect', tmp_path / '4.state')


@pytest.mark.parametrize('name', ['²', '①', '9' * 200])
def test_states_are_named_by_numbers(tmp_path, capsys, name):
    for folder, file in (
        ('models', 'net_g_latest.pth'),
        ('models', f'net_g_{name}.pth'),
        ('training_states', f'{name}.state'),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.save(span().state_dict(), tmp_path / folder / file)
    for file in ('net_g_latest', f'net_g_{name}'):
        assert main(['inspect', str(tmp_path / 'models' / f'{file}.pth')]) == 0
        assert name not in capsys.readouterr().out.partition('iteration')[2].partition('\n')[0]


def test_a_name_is_there_once(tmp_path, capsys):
    state = span().state_dict()
    state[f'module.{KEY}'] = torch.zeros_like(state[KEY])
    torch.save(state, tmp_path / 'bad.pth')
    error = assert_refused(capsys, 'merge', tmp_path / 'bad.pth', '-o', tmp_path / 'out.pth')
    assert f'bad.pth must have each name once, got {KEY} and module.{KEY}.' in error


@pytest.mark.parametrize('sizes', [[(14000, 14000)], [(2500, 2500)] * 30])
def test_an_update_is_not_added_to_repeated_values(refuse, sizes):
    state = {}
    for index, (height, width) in enumerate(sizes):
        state[f'l{index}.weight'] = torch.zeros(1).expand(height, width)
        state[f'l{index}.lora_A'], state[f'l{index}.lora_B'] = torch.ones(1, width), torch.ones(height, 1)
        state[f'l{index}.lora_alpha'] = torch.ones(())
    assert 'its tensors must have the values that it holds' in refuse(state)


def test_a_network_has_not_many_times_the_values_of_its_file():
    state = span().state_dict()
    with bounded(state, 2):
        span()
    with pytest.raises(InputError, match='got far more'), bounded(state, 2):
        torch.nn.Conv2d(1000, 1000, 3)
    with pytest.raises(InputError, match='got far more'), bounded(state, 2):
        torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 1) for _ in range(1000)))
    torch.nn.Conv2d(1000, 1000, 3)  # and nothing stays


@pytest.mark.parametrize('number', ['1500', '1000000000', '9' * 300])
def test_numbers_of_layers_are_about_the_count_of_tensors(number):
    check_numbers({**span().state_dict(), 'body.999.weight': torch.zeros(1), f'conv_{number}.weight': torch.zeros(1)})
    with pytest.raises(InputError, match='must have numbers of about the count of its tensors, 1, got body'):
        check_numbers({f'body.{number}.weight': torch.zeros(1)})


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux limits the memory of a process')
def test_memory_is_limited_while_a_network_is_built():
    before, threads = resource.getrlimit(resource.RLIMIT_AS), torch.get_num_threads()
    with little_memory(2**28):
        torch.ones(2**24)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.ones(2**28)
        with little_memory(2**27), pytest.raises(MemoryError):
            [0] * 2**26
    assert (resource.getrlimit(resource.RLIMIT_AS), torch.get_num_threads()) == (before, threads)
    assert torch.ones(2**28, dtype=torch.uint8).sum() == 2**28


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors', '.yml'])
def test_what_is_no_file_is_not_read(tmp_path, capsys, suffix):
    fifo, folder, device = (tmp_path / f'{name}{suffix}' for name in ('fifo', 'folder', 'device'))
    os.mkfifo(fifo)
    folder.mkdir()
    device.symlink_to('/dev/zero')
    for path, what in ((fifo, 'a pipe or a device'), (folder, 'a folder'), (device, 'a pipe or a device')):
        assert f'must be a file, got {what}' in assert_refused(capsys, 'inspect', path)
    if suffix != '.yml':
        torch.save(span().state_dict(), tmp_path / 'base.pth')
        assert 'There is no adapter file' in assert_refused(capsys, 'inspect', tmp_path / 'base.pth', '--adapter', fifo)


def test_what_fits_nowhere_is_not_loaded(tmp_path):
    with pytest.raises(InputError, match=r'other.pth does not fit SPAN: none of its tensors does\.'):
        load_weights(span(), {'a.weight': torch.zeros(3)}, 'other.pth', strict=False)
    load_weights(span(), {**span().state_dict(), 'a.weight': torch.zeros(3)}, 'other.pth', strict=False)


def test_float8_is_read(tmp_path):
    state = {key: value.to(torch.float8_e4m3fn) for key, value in span().state_dict().items()}
    torch.save(state, tmp_path / 'small.pth')
    assert torch.equal(load_network(tmp_path / 'small.pth').conv_cat.weight, state[KEY].float())


@pytest.fixture
def adapter(tmp_path):
    network = span()
    torch.save(network.state_dict(), tmp_path / 'base.pth')
    return extract_adapter(add_lora(network, LoRAConfig([r'block_1\.c1_r\.eval_conv'], rank=2)))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'rank_pattern': {'(a+)+$': 3}}, 'must be simpler'),
        ({'target_modules': ['(([a-z0-9_.])+)+!']}, 'must be simpler'),
        ({'exclude_modules': ['.*.*.*.*!']}, 'must be simpler'),
        ({'target_parameters': ['(' * 5000]}, 'must be simpler'),
        ({'rank_pattern': {r'(a*)(a*)\1\2b': 3}}, 'must be simpler'),
        ({'exclude_modules': '(' * 2000 + 'a' + ')' * 40}, 'is not a regular expression'),
        ({'rank': 10**9}, 'do not go with rank 1000000000'),
        ({'rank': 10**400}, 'must be at most 2147483647'),
        ({'alpha': float('nan')}, 'must be a number of at most 1e+30 other than 0, got nan'),
        ({'rank_pattern': 3}, 'must be a section of patterns and numbers, got 3'),
        ({'a\nERROR: forged': 1}, r'Unknown LoRA option "a\nERROR: forged"'),
        ([], 'must be a mapping, got []'),
    ],
)
def test_the_configuration_of_an_adapter_may_be_anything(adapter, tmp_path, capsys, changes, message):
    config = {**json.loads(adapter.config.to_json()), **changes} if isinstance(changes, dict) else changes
    file = tmp_path / 'bad.safetensors'
    save_file(adapter.tensors, file, metadata={'lora_config': json.dumps(config)})
    error = assert_refused(capsys, 'adapter', 'merge', tmp_path / 'base.pth', file, '-o', tmp_path / 'out.pth')
    assert message in error and len(error.replace(str(tmp_path), '')) < 350


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'a.lora_A': torch.zeros(1, 3)}, 'make no update of a weight (2, 2)'),
        ({'a.lora_A': torch.zeros(0, 2), 'a.lora_B': torch.zeros(2, 0)}, 'make no update'),
        ({'a.lora_A': torch.ones(1, 2, dtype=torch.int32)}, 'must be of floating-point numbers'),
        ({'b.lora_shift_bias': torch.zeros(2)}, 'b.lora_shift_bias is the delta of b.bias, which is not there'),
        ({'a.lora_shift_bias': torch.zeros(2)}, 'must be floating-point numbers of shape (3,)'),
        ({'a.lora_shift_lora_shift_bias': torch.zeros(3), 'a.lora_shift_bias': torch.zeros(3)}, 'which is not there'),
        ({'b.weight': torch.zeros(2, dtype=torch.int32)}, 'b.weight must be floating-point, got torch.int32'),
        ({'b.weight': torch.full((2,), torch.nan)}, 'has weights too large for float32, or NaN: b.weight'),
        (
            {'a.lora_alpha': torch.ones((), dtype=torch.complex64)},
            'a.weight must be floating-point, got torch.complex64',
        ),
    ],
)
def test_updates_that_make_no_sense_are_not_added(refuse, changes, message):
    state = {'a.weight': torch.zeros(2, 2), 'a.bias': torch.zeros(3), 'a.lora_A': torch.zeros(1, 2)}
    state.update({'a.lora_B': torch.zeros(2, 1), 'a.lora_alpha': torch.ones(()), **changes})
    assert message in refuse(state)


@pytest.mark.parametrize('verb', ['merge', 'apply'])
@pytest.mark.parametrize(
    ('lora_B', 'alpha', 'message'),
    [
        (
            1e38,
            1.0,
            'The adapters give values that are not finite, or too large for torch.float32: block_1.c1_r.eval_conv',
        ),
        (1.0, 0.0, 'lora_alpha must be a number of at most 1e+30 other than 0, got 0.'),
        (1.0, 1e31, 'lora_alpha must be a number of at most 1e+30 other than 0, got 1e+31.'),
        (1.0, True, None),
    ],
)
def test_updates_beyond_all_numbers_are_not_written(adapter, tmp_path, capsys, verb, lora_B, alpha, message):
    tensors = dict(adapter.tensors)
    for key, value in tensors.items():
        if key.endswith('lora_alpha'):
            tensors[key] = torch.tensor(alpha)
        else:
            tensors[key] = torch.full_like(value, lora_B if key.endswith('lora_B') else min(lora_B, 1e38))
    save_file(tensors, tmp_path / 'bad.safetensors', metadata={'lora_config': adapter.config.to_json()})
    line = [
        'adapter',
        verb,
        str(tmp_path / 'base.pth'),
        str(tmp_path / 'bad.safetensors'),
        '-o',
        str(tmp_path / 'out.pth'),
    ]
    if message is None or (verb == 'apply' and lora_B > 1):  # which carries two factors, each of them finite
        assert main(line) == 0
    else:
        assert message in assert_refused(capsys, *line) and not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize(('section', 'told'), [({}, False), ({'unknown': 1}, True), ({'unit': '/etc'}, True)])
def test_a_section_that_cannot_be_used_is_told(tmp_path, caplog, section, told):
    """The shapes tell the network, but no scale of its residuals."""
    network = basicsr_edsr.EDSR(3, 3, num_feat=4, num_block=1, res_scale=0.1)
    stated = {**EDSR, 'res_scale': 0.1, **section}
    torch.save({'params': network.state_dict(), 'lora_sr': {'network': stated}}, tmp_path / 'edsr.pth')
    opened = load_network(tmp_path / 'edsr.pth')
    assert opened.body[0].res_scale == (1 if told else 0.1)
    assert ('names the network of its run, but' in caplog.text) == told


EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1}
TOO_LARGE = 'the numbers of network_g must add up to at most 65,536, got more at '
NO_IMAGE = 'network_g.type must be a network that takes an image and gives an image, got '


@pytest.mark.parametrize(
    'section, message',
    [
        ({**SWINIR, 'img_size': 4096, 'window_size': 128}, 'its windows must be of at most 64 pixels, got 128'),
        (
            {**SWINIR, 'img_size': 100_000},
            f'{TOO_LARGE}img_size',
        ),
        ({**SWINIR, 'img_size': [8192, 8192]}, 'its images must be of at most 512x512 pixels, got 8192x8192'),
        ({**SWINIR, 'img_size': {0: 8192, 1: 8192}}, 'must have integers for img_size and window_size, got '),
        ({**SWINIR, 'img_size': [8192, 8192, 1]}, 'must have integers for img_size and window_size, got '),
        ({**SWINIR, 'img_size': 512, 'window_size': 64}, 'its masks must have at most 33,554,432 values, got 512x512'),
        ({**SWINIR, 'depths': [10**9]}, f'{TOO_LARGE}depths'),
        (
            {**SWINIR, 'depths': [40_000, 40_000]},
            f'{TOO_LARGE}depths',
        ),
        ({**SWINIR, 'depths': [0] * 10**5}, 'must have at most 1,000 values, got more'),
        ({**SWINIR, 'depths': torch.tensor([9])}, 'network_g.depths must be a plain value, got a Tensor'),
        (
            {**SWINIR, 'mlp_ratio': float('nan')},
            f'{TOO_LARGE}mlp_ratio',
        ),
        ({**EDSR, 'rgb_mean': [0.0] * 10**6}, 'must have at most 1,000 values, got more'),
        (
            {**EDSR, 'num_block': 10**12},
            f'{TOO_LARGE}num_block',
        ),
        ({'type': 'DFDNet', 'num_feat': 1, 'dict_path': 'evil'}, f'{NO_IMAGE}DFDNet'),
        ({'type': 'SpyNet', 'load_path': 'evil'}, f'{NO_IMAGE}SpyNet'),
        ({'type': 'IconVSR', 'num_feat': 1, 'spynet_path': 'evil'}, f'{NO_IMAGE}IconVSR'),
        ({'type': 'VGGFeatureExtractor', 'layer_name_list': ['conv1_1']}, f'{NO_IMAGE}VGGFeatureExtractor'),
        ({'type': 'AdaptSR', 'base': {'type': 'SpyNet', 'load_path': 'evil'}, 'lora': {}}, f'{NO_IMAGE}SpyNet'),
        ({'type': 'AdaptSR', 'base': {'type': 'AdaptSR', 'base': {'type': 'SpyNet'}}}, f'{NO_IMAGE}AdaptSR'),
        ({'type': 'TakesPaths', 'weights': '/evil.pth'}, 'network_g.weights must be a word, and no path'),
        ({'type': 'TakesPaths', 'weights': {'a': ['evil.pth']}}, 'network_g.a must be a word, and no path'),
        ({'type': '\x1b[31m\nX' * 100}, 'network_g.type must be a word, and no path, got '),
        ({'type': 'x' * 70}, "there is no network 'xxxx"),
        ({'type': 'x' * 10**6}, 'network_g.type must be a word'),
        ({'type': ['EDSR']}, "network_g.type has to be a name, not ['EDSR']"),
        ({**EDSR, '\x1b[31m\n' * 1000: 3}, 'is not a known key; the keys here are num_in_ch'),
        ({**EDSR, 'x' * 1000: 3}, 'is not a known key; the keys here are num_in_ch'),
        ({**EDSR, 'num_in_ch': 'many'}, 'cannot be built'),
        ({'type': 'LKDN', 'conv': 'x' * 80}, '"conv" of LKDN is'),
    ],
)
def test_a_file_does_not_say_anything_of_its_network(tmp_path, monkeypatch, capsys, section, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, 'load', loading_no_evil(torch.load))
    (tmp_path / 'evil.pth').touch()
    monkeypatch.setattr(building, 'IMPORTED', [types.SimpleNamespace(TakesPaths=TakesPaths)])
    for state in ({'conv.weight': torch.ones(3, 3, 3, 3)}, edsr()):
        torch.save({'params': state, 'lora_sr': {'run': 'r', 'network': section}}, 'bad.pth')
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if len(state) == 1:
            error = assert_refused(capsys, 'merge', 'bad.pth', '-o', 'out.pth')
            assert message in error and len(error) < 320
            assert main(['inspect', 'bad.pth']) == 0
            output = capsys.readouterr().out
            assert max(map(len, output.splitlines())) < 450 and output.replace('\n', '').isprintable()
        else:
            assert type(load_network('bad.pth')).__name__ == 'EDSR'
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


class TakesPaths(torch.nn.Module):
    def __init__(self, weights):
        raise AssertionError(f'it is built with {weights}')


def edsr() -> dict:
    arguments = {key: value for key, value in EDSR.items() if key != 'type'}
    return basicsr_edsr.EDSR(**arguments).state_dict()


def loading_no_evil(load):
    def load_all_else(file, *arguments, **named):
        assert file != 'evil'
        return load(file, *arguments, **named)

    return load_all_else


def test_an_option_file_may_name_any_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'a': torch.zeros(1)}, 'net.pth')
    (tmp_path / 'own.yml').write_text('network_g: {type: SpyNet, load_path: absent.pth}\n')
    with pytest.raises(InputError, match='network_g: the checkpoint absent.pth cannot be read: No such file'):
        load_network(NetworkSource('net.pth', options='own.yml'))


@pytest.mark.parametrize('count, message', [(20_000, 'at most 10,000 tensors'), (3000, 'it lacks layers.1.')])
def test_names_are_counted_once(tmp_path, capsys, count, message):
    layers = {f'layers.{index}.conv.weight': torch.zeros(1) for index in range(count)}
    arguments = {key: value for key, value in SWINIR.items() if key != 'type'}
    torch.save({**basicsr_swinir.SwinIR(**arguments).state_dict(), **layers}, tmp_path / 'bad.pth')
    start = time.process_time()
    assert message in assert_refused(capsys, 'merge', tmp_path / 'bad.pth', '-o', tmp_path / 'out.pth')
    assert time.process_time() - start < 5


def test_blocks_are_counted_before_they_are_built(refuse):
    state = LKDN(num_feat=2, num_atten=2, num_block=1, num_in=1).state_dict()
    blocks = {
        f'B{index}{key[2:]}': value for index in range(2, 300) for key, value in state.items() if key[:3] == 'B1.'
    }
    assert 'it is no LKDN: its blocks must be at most 200, got 299' in refuse({**state, **blocks})


def test_what_a_file_says_of_itself_is_part_of_a_line():
    origin = Origin.parse({'run': 'a\nforged', 'version': 'x' * 9999, 'iteration': 10**400, 'adapters': ['\x1b[31m']})
    assert str(origin).isprintable() and len(str(origin)) < 300 and origin.iteration is None
    assert Origin.parse('[' * 10**5) is None
    many = Origin.parse({'adapters': [letter * 64 for letter in 'abcdef'] * 10**4, 'version': '1'})
    assert str(many).endswith(
        'with adapters aaaaaaaaaaaa, bbbbbbbbbbbb, cccccccccccc, dddddddddddd and 59996 more, lora_sr 1'
    )


def test_arguments_make_no_lines(tmp_path, capsys):
    assert r'a\nERROR: forged.pth cannot be read' in assert_refused(capsys, 'inspect', 'a\nERROR: forged.pth')
    assert len(assert_refused(capsys, 'inspect', 'x' * 10**5)) < 300
