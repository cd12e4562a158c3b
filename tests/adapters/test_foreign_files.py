"""Files of adapters of other programs: told apart, and damaged or hostile ones in a sentence."""

import json
import math
import os
import re
import time

import pytest
import torch
from others import SPAN_FACTORS, SPAN_LAYER, SPAN_STATE, pair, random, write

from lora_sr.adapters import (
    read_adapter,
)
from lora_sr.checkpoints import AdapterFile
from lora_sr.errors import InputError


def test_adapters_of_others_are_told_apart(tmp_path):
    one = AdapterFile.read(write(tmp_path, pair('tail'), name='one.safetensors'))
    other = AdapterFile.read(write(tmp_path, pair('tail', rank=3), name='other.safetensors'))
    same = AdapterFile.read(write(tmp_path, pair('tail'), name='same.safetensors'))
    assert one.fingerprint == same.fingerprint != other.fingerprint


CONFIG = {'r': 4, 'lora_alpha': 8}

CONFIGS = {
    json.dumps(
        {'r': 10**9, 'lora_alpha': 8}
    ): 'must have the rank 4 for conv_2.eval_conv, as its tensors have, got 1000000',
    '{"r": 4, "lora_alpha": 1e999}': 'alpha of conv_2.eval_conv must be a number of at most .* other than 0, got inf',
    '{"r": 4, "lora_alpha": NaN}': 'other than 0, got nan',
    '{"r": 4, "lora_alpha": 0}': 'other than 0, got 0',
    '{"r": 4, "lora_alpha": "8"}': "other than 0, got '8'",
    '{"r": 4, "lora_alpha": true}': 'other than 0, got True',
    '[' * 200_000: 'adapter_config.json beside it must be a JSON object of at most 1,048,576 bytes',
    '{"a":' * 200_000: 'must be a JSON object',
    json.dumps({'a': 'x' * 2**20}): 'must be a JSON object',
    '[4]': 'must be a JSON object',
    '': 'must be a JSON object',
    json.dumps({'rank_pattern': {'(a+)+$': 4}}): r"The pattern '\(a\+\)\+\$' must be simpler",
    json.dumps({'rank_pattern': {'(': 4}}): r"the pattern '\(' is not a regular expression",
    json.dumps({'rank_pattern': [4]}): r'"rank_pattern" of adapter_config.json must map at most .* patterns, got \[4\]',
    json.dumps({'alpha_pattern': {'.*': []}}): r'other than 0, got \[\]',
}

REFUSED = {
    'peft_type': ('LOHA', '"peft_type" of adapter_config.json must be "LORA", got \'LOHA\''),
    'init_lora_weights': ('pissa_niter_4', "must leave the base as it is, got 'pissa_niter_4'"),
    'target_parameters': (['weight'], '"target_parameters" of adapter_config.json must not be set'),
    'use_qalora': (True, '"use_qalora" of adapter_config.json must not be set'),
}


@pytest.mark.parametrize('config', CONFIGS, ids=range(len(CONFIGS)))
def test_wrong_configurations_are_one_sentence(tmp_path, config):
    path = write(tmp_path, SPAN_FACTORS, config)
    with pytest.raises(InputError, match=CONFIGS[config]) as raised:
        read_adapter(path, SPAN_STATE)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize('key', REFUSED)
def test_what_is_more_than_lora_is_refused_by_name_and_shown(tmp_path, key):
    value, message = REFUSED[key]
    file = AdapterFile.read(write(tmp_path, SPAN_FACTORS, {**CONFIG, key: value}))
    assert file.adapter.layers == ['conv_2.eval_conv']
    with pytest.raises(InputError, match=message):
        file.adapter_for(SPAN_STATE, 'base')


def test_nothing_that_a_configuration_names_is_looked_at(tmp_path):
    """`base_model_name_or_path` would be downloaded by PEFT, `auto_mapping` imported."""
    mapping = {'base_model_class': 'system', 'parent_library': 'os'}
    config = {**CONFIG, 'base_model_name_or_path': '/nowhere', 'auto_mapping': mapping, 'a key to come': 1}
    assert read_adapter(write(tmp_path, SPAN_FACTORS, config), SPAN_STATE).alpha_of('conv_2.eval_conv') == 8


def test_a_configuration_that_is_no_file_is_not_waited_for(tmp_path):
    path = write(tmp_path, SPAN_FACTORS)
    os.mkfifo(tmp_path / 'adapter_config.json')
    with pytest.raises(InputError, match='adapter_config.json cannot be read: it must be a file, got a pipe'):
        read_adapter(path, SPAN_STATE)


def test_a_long_configuration_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path, SPAN_FACTORS, '{}')
    os.truncate(tmp_path / 'adapter_config.json', 2**38)  # on the disk it has some bytes, in memory it would have all
    with pytest.raises(InputError, match='must be a JSON object of at most 1,048,576 bytes'):
        read_adapter(path, SPAN_STATE)


def changed(**changes):
    parts = {f'{SPAN_LAYER}{name}.weight': value for name, value in changes.items()}
    return {key: value for key, value in {**SPAN_FACTORS, **parts}.items() if value is not None}


NAN = torch.full((26, 4, 1, 1), math.nan)

DAMAGED = {
    'another width': (changed(lora_A=random(4, 25, 3, 3)), 'is 26x26x3x3 here, the adapter is for 26x25x3x3'),
    'another kernel': (changed(lora_A=random(4, 26, 1, 1)), 'is 26x26x3x3 here, the adapter is for 26x26x1x1'),
    'ranks': (changed(lora_A=random(3, 26, 3, 3)), '3x26x3x3 and 26x4x1x1 do not go with each other'),
    'half': (changed(lora_B=None), 'it lacks lora_B of the layer conv_2.eval_conv'),
    'a number': (changed(lora_A=torch.tensor(1.0)), 'a number and 26x4x1x1 do not go'),
    'nothing': (changed(lora_A=torch.zeros(0, 26, 3, 3), lora_B=torch.zeros(26, 0, 1, 1)), '26x0x1x1 do not go'),
    'integers': (changed(lora_A=torch.ones(4, 26, 3, 3, dtype=torch.int64)), 'floating-point numbers, got torch.int64'),
    'whole integers': (
        {**changed(), 'base_model.model.conv_2.eval_conv.bias': torch.ones(26, dtype=torch.int32)},
        'conv_2.eval_conv.bias is of torch.float32 here, got torch.int32',
    ),
    'groups of kohya': (
        {'tail.lora_down.weight': random(4, 8), 'tail.lora_up.weight': random(5, 2)},
        '4x8 and 5x2 do not go with each other',
    ),
    'not finite': (changed(lora_B=NAN), 'has values that are not finite, in conv_2.eval_conv'),
    'two adapters': (
        {key.replace('.weight', f'.{name}.weight'): value + 1 for key, value in SPAN_FACTORS.items() for name in 'ab'},
        'it must hold one adapter, got a and b',
    ),
    'twice': (
        {**SPAN_FACTORS, **{key[len('base_model.model.') :]: value.clone() for key, value in SPAN_FACTORS.items()}},
        'it must have each name once, got two of conv_2.eval_conv.lora_A.weight',
    ),
    'one layer by two names': (
        {**pair('conv_2.eval_conv'), **pair('conv_2_eval_conv')},
        'conv_2.eval_conv and conv_2_eval_conv are both for conv_2.eval_conv',
    ),
    'OFT': ({'tail.oft_blocks': random(2, 2)}, 'must hold LoRA, LoHa or LoKr alone, got tail.oft_blocks, i.e. OFT'),
    'a weight besides': ({**pair('tail'), 'head.weight': random(3)}, 'LoRA, LoHa or LoKr alone, got head.weight'),
    'two kinds': ({**pair('tail'), 'tail.lokr_w1': random(2, 2)}, 'updates of several kinds for the layer tail'),
    'alphas': ({**pair('tail'), 'tail.alpha': random(3)}, 'alpha of tail must be a number, got torch.float32 of 3'),
    'half of LoHa': (
        {'tail.hada_w1_a': random(2, 2)},
        'it lacks hada_w1_b and hada_w2_a and hada_w2_b of the layer tail',
    ),
    'LoKr of numbers': ({'tail.lokr_w1': random(1), 'tail.lokr_w2': random(1)}, 'lokr_w1 of tail must be a matrix'),
    'long LoKr': (
        {'conv_2.eval_conv.lokr_w1': random(30_000, 1), 'conv_2.eval_conv.lokr_w2': random(30_000, 1)},
        'is 26x26x3x3 here, which its LoKr is not for',
    ),
    'magnitudes': (
        {**changed(), f'{SPAN_LAYER}lora_magnitude_vector': random(3)},
        'is 26x26x3x3 here, its magnitudes are 3',
    ),
    'names': ({f'{"é_" * 200}{key}': value for key, value in pair('x').items()}, '1 of its 1 layers differ: é_é_é_'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_files_are_one_sentence(tmp_path, case):
    tensors, message = DAMAGED[case]
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        AdapterFile.read(write(tmp_path, tensors, CONFIG)).adapter_for(SPAN_STATE, 'base.pth')
    assert str(raised.value).endswith('.') and '\n' not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize('name', ['_' * 2_000_000, 'tail\n\x1b[31m'])
def test_names_that_no_module_has_are_one_sentence_at_once(base, tmp_path, name):
    """All ends of a name are looked up: of two million letters that would be minutes."""
    path = write(tmp_path, pair(name), name='a.safetensors')
    start = time.process_time()
    for read in (read_adapter, AdapterFile.read):
        with pytest.raises(InputError, match='a name must be of at most 512 printable letters, got ') as raised:
            read(path)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 600
    assert time.process_time() - start < 20


@pytest.mark.skipif(not hasattr(torch, 'float8_e4m3fn'), reason='torch has no numbers of 8 bits')
def test_numbers_of_8_bits_are_told_where_the_reader_does_not_widen_them(tmp_path):
    path = write(tmp_path, changed(lora_A=random(4, 26, 3, 3).to(torch.float8_e4m3fn)), CONFIG)
    with pytest.raises(InputError, match='must be of floating-point numbers, got torch.float8_e4m3fn of 4x26x3x3'):
        read_adapter(path, SPAN_STATE)
    assert AdapterFile.read(path).adapter_for(SPAN_STATE, 'base').layers == ['conv_2.eval_conv']


def test_large_ranks_take_no_more_memory_than_the_weight(tmp_path):
    """As factors of our layout the update would have 117 million values."""
    rank = 50_000
    tensors = {
        f'conv_2.eval_conv.lora_{end}.weight': value
        for end, value in (('down', random(rank, 26, 3, 3) / rank), ('up', random(26, rank, 1, 1)))
    }
    adapter = read_adapter(write(tmp_path, tensors), SPAN_STATE)
    assert sum(value.numel() for value in adapter.tensors.values()) == 26 * 26 * 9
    down, up = (value.double().flatten(1) for value in tensors.values())
    assert torch.allclose(adapter.deltas['conv_2.eval_conv.weight'].flatten(1).double(), up @ down, atol=1e-6)


def test_thousands_of_layers_and_patterns_take_seconds(tmp_path):
    count = 4000
    state = {f'layers.{i}.conv.weight': torch.zeros(2, 2) for i in range(count)}
    tensors = {
        f'base_model.model.layers.{i}.conv.lora_{end}.weight': torch.ones(shape)
        for i in range(count)
        for end, shape in (('A', (1, 2)), ('B', (2, 1)))
    }
    patterns = {f'layers.{i}.conv': i + 1 for i in range(200)}
    path = write(tmp_path, tensors, {'r': 1, 'lora_alpha': 8, 'alpha_pattern': patterns})
    start = time.process_time()
    adapter = read_adapter(path, state)
    assert time.process_time() - start < 20
    assert [adapter.alpha_of(f'layers.{i}.conv') for i in (0, 199, 200)] == [1, 200, 8]
    write(tmp_path, tensors, {'r': 1, 'alpha_pattern': {f'.*{i}.*x.*': 1 for i in range(200)}})
    with pytest.raises(InputError, match='with so many names, and as long ones, it takes too long'):
        read_adapter(path, state)
