"""Damaged and hostile files end in one sentence: no traceback, no endless reading, no memory without a bound."""

import json
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from lora_sr.adapters import LoRAConfig, add_lora, extract_adapter
from lora_sr.archs import SPAN
from lora_sr.checkpoints import load_network
from lora_sr.checkpoints.bounds import bounded
from lora_sr.checkpoints.content import load_weights
from lora_sr.checkpoints.origin import Origin
from lora_sr.cli.main import main
from lora_sr.errors import InputError

KEY = 'conv_cat.weight'


def span() -> SPAN:
    torch.manual_seed(0)
    return SPAN(feature_channels=4, upscale=2, deploy=True)


def assert_refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith('lora-sr: error: ') and error.count('\n') == 1 and error[:-1].isprintable()
    return error


@pytest.fixture
def refuse(tmp_path, capsys):
    def refuse(content, command='merge') -> str:
        torch.save(content, tmp_path / 'bad.pth')
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        error = assert_refused(capsys, command, tmp_path / 'bad.pth', '-o', tmp_path / 'out.pth')
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
        assert len(error.replace(str(tmp_path), '')) < 350
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
        (lambda value: torch.zeros(()), 'those of no SPAN'),
        (lambda value: torch.zeros(1).expand(10**12), 'is damaged: its tensors must have the values that it holds'),
        (
            lambda value: torch.zeros(1, 1, 1, 1).expand(7000, 9000, 1, 1),
            'must have about the values that are in it, got far more',
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


def test_a_network_has_not_many_times_the_values_of_its_file():
    state = span().state_dict()
    with bounded(state, 2):
        span()
    with pytest.raises(InputError, match='got far more'), bounded(state, 2):
        torch.nn.Conv2d(1000, 1000, 3)
    with pytest.raises(InputError, match='got far more'), bounded(state, 2):
        torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 1) for _ in range(1000)))
    torch.nn.Conv2d(1000, 1000, 3)  # and nothing stays


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
    ],
)
def test_updates_that_make_no_sense_are_not_added(refuse, changes, message):
    state = {'a.weight': torch.zeros(2, 2), 'a.bias': torch.zeros(3), 'a.lora_A': torch.zeros(1, 2)}
    state.update({'a.lora_B': torch.zeros(2, 1), 'a.lora_alpha': torch.ones(()), **changes})
    assert message in refuse(state)


def test_what_a_file_says_of_itself_is_part_of_a_line():
    origin = Origin.parse({'run': 'a\nforged', 'version': 'x' * 9999, 'iteration': 10**400, 'adapters': ['\x1b[31m']})
    assert str(origin).isprintable() and len(str(origin)) < 300 and origin.iteration is None
    assert Origin.parse('[' * 10**5) is None


def test_arguments_make_no_lines(tmp_path, capsys):
    assert r'a\nERROR: forged.pth cannot be read' in assert_refused(capsys, 'inspect', 'a\nERROR: forged.pth')
    assert len(assert_refused(capsys, 'inspect', 'x' * 10**5)) < 300
