"""Damaged and hostile state dicts with the names of the networks of the NTIRE 2026 challenge end in one sentence."""

import resource
import time

import pytest
import torch
from hostile import assert_refused

from lora_sr.archs import DISP, SPANF, SPANV2, DSCFFused

NETWORKS = {
    'SPANF': lambda: SPANF(feature_channels=4, upscale=2, deploy=True),
    'SPANF with branches': lambda: SPANF(feature_channels=4, upscale=2, layout='PDS'),
    'SPANV2': lambda: SPANV2(feature_channels=4, upscale=2),
    'DISP': lambda: DISP(feature_channels=4, upscale=2, num_block=2),
    'DSCFFused': lambda: DSCFFused(feature_channels=4, upscale=2),
}
UNKNOWN = 'belongs to no network known here'


@pytest.fixture
def refuse(tmp_path, capsys):
    def refuse(state) -> str:
        torch.save(state, tmp_path / 'bad.pth')
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        error = assert_refused(capsys, 'merge', tmp_path / 'bad.pth', '-o', tmp_path / 'out.pth')
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
        assert time.process_time() - start < 5
        error = error.replace(f'{tmp_path}/', '')
        assert len(error) < 420
        return error

    return refuse


def first_read(state) -> list[str]:
    """The tensors of whose shapes a network is built."""
    names = ('conv_near', 'upsampler.0', 'conv_cat', 'conv_cat_1', 'conv_cat_other', 'conv_2', 'block_1.c1.conv')
    names = (*names, 'block_1.c1_r.eval_conv', 'block_1.c1_r.sk')
    return [f'{name}.weight' for name in names if f'{name}.weight' in state]


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize(
    'change',
    [
        lambda value: torch.zeros(()),
        lambda value: torch.zeros(0),
        lambda value: torch.zeros(7),
        lambda value: value.flatten(1),
        lambda value: value.int(),
        lambda value: value * float('nan'),
        lambda value: torch.zeros(1, 1, 1, 1).expand(3 * 50**2, 4000, 1, 1),
        lambda value: torch.zeros(1, 1, 1, 1).expand(3 * 10**8, 1, 1, 1),
        lambda value: torch.zeros(3 * 65**2, 4, 1, 1),
        lambda value: torch.zeros(3 * 10**4, 1, 1, 1),
    ],
)
def test_no_shape_is_beyond_a_sentence(refuse, name, change):
    state = NETWORKS[name]().state_dict()
    keys = first_read(state)
    assert len(keys) >= 2
    for key in keys:
        refuse({**state, key: change(state[key])})


@pytest.mark.parametrize('name', NETWORKS)
def test_a_missing_tensor_is_named(refuse, name):
    state = NETWORKS[name]().state_dict()
    for key in state:
        error = refuse({other: value for other, value in state.items() if other != key})
        is_whole_part = not any(other != key and other.split('.')[0] == key.split('.')[0] for other in state)
        assert UNKNOWN in error if is_whole_part else key in error or UNKNOWN in error


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize(
    'extra',
    [
        'block_1000000.c1_r.eval_conv.weight',
        'blocks.1000000.c1_r.eval_conv.weight',
        'blocks.99999999999999999999999.c1_r.eval_conv.weight',
        'blocks.0._extern_conv_block.1000000.eval_conv.weight',
        'blocks.²',
        'block_1.c1.conv.conv.weight',
        'conv_3.weight',
    ],
)
def test_a_tensor_too_many_is_refused(refuse, name, extra):
    state = NETWORKS[name]().state_dict()
    error = refuse({**state, extra: torch.zeros(4, 4, 3, 3)})
    assert name.partition(' ')[0] in error
    assert (UNKNOWN in error) == (extra.split('.')[0] not in {key.split('.')[0] for key in state})


def test_blocks_are_counted_before_they_are_built(refuse):
    state = NETWORKS['DISP']().state_dict()
    first = {key[len('blocks.0.') :]: value for key, value in state.items() if key.startswith('blocks.0.')}
    blocks = {f'blocks.{index}.{key}': value for index in range(2, 300) for key, value in first.items()}
    assert 'the blocks of DISP must be at most 200, got 300' in refuse({**state, **blocks})


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('channels', [0, 1, 4, 13, 16])
def test_images_other_than_rgb_are_told(refuse, name, channels):
    state = NETWORKS[name]().state_dict()
    key = 'conv_near.weight' if 'conv_near.weight' in state else 'upsampler.0.weight'
    family = name.partition(' ')[0]
    sentence = f'that {family} shuffles into pixels must be 3 times the square of its scale, got {channels}.'
    assert sentence in refuse({**state, key: torch.zeros(channels, *state[key].shape[1:])})
