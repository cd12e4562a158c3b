"""The check of what `train:` says of the step."""

import pytest
import yaml
from option_check import check
from tiny_run import TINY_OPTIONS, change

from lora_sr.option_file import OptionLoader


@pytest.fixture
def options(pairs):
    return yaml.load(TINY_OPTIONS.format(root=pairs, suffix='', backend='disk'), Loader=OptionLoader)


def test_all_keys_at_once(options, tmp_path):
    options['network_g']['num_block'] = 4
    options['train'].update(amp='bf16', memory_format='channels_last', compile={'mode': 'default'}, tf32=True)
    options['train'].update(accumulate_iter=2, clip_grad_norm=0.1, checkpointing=True, graph=True)
    assert check(options, tmp_path) == []
    options['train'].update(dict.fromkeys(('amp', 'memory_format', 'clip_grad_norm', 'tf32')), compile=True)
    assert check(options, tmp_path) == []


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('amp', 'half', "train.amp: there is no 'half'; it is one of bf16, fp16, ~"),
        ('amp', True, "train.amp: there is no 'True'; it is one of bf16, fp16, ~"),
        ('memory_format', 'nhwc', "train.memory_format: there is no 'nhwc'; it is one of contiguous, channels_last, ~"),
        (
            'compile',
            'yes',
            "train.compile has to be true, false, or a section of arguments of torch.compile, not 'yes'",
        ),
        ('compile', {'mod': 'default'}, "train.compile.mod is not a known key; did you mean 'mode'?"),
        ('compile', {'backend': 'inducto'}, "train.compile.backend: there is no 'inducto'; did you mean inductor?"),
        ('compile', {'mode': 'fast'}, "train.compile.mode: there is no 'fast'; it is one of default, "),
        (
            'compile',
            {'mode': 'default', 'options': {}},
            'train.compile does not suit torch.compile: Either mode or options can be specified',
        ),
        (
            'compile',
            {'options': {'foo': 1}},
            'train.compile does not suit torch.compile: Unexpected optimization option foo',
        ),
        ('accumulate_iter', 0, 'train.accumulate_iter has to be a whole number of at least 1, not 0'),
        (
            'accumulate_iter',
            41,
            'datasets.train.batch_size_per_gpu must be at most 80, the patches of an epoch, got 82',
        ),
        ('clip_grad_norm', 0, 'train.clip_grad_norm has to be a number more than 0 or ~, not 0'),
        ('checkpointing', 1, 'train.checkpointing has to be true or false, not 1'),
        ('checkpointing', True, 'train.checkpointing must be false for network_g: MSRResNet is not made of blocks'),
        ('tf32', 'no', "train.tf32 has to be true or false or ~, not 'no'"),
        ('graph', 'yes', "train.graph has to be true or false, not 'yes'"),
    ],
)
def test_wrong_values(options, tmp_path, path, value, sentence):
    change(options, f'train.{path}', value)
    (problem,) = check(options, tmp_path)
    assert problem.startswith(sentence)


def test_a_graph_is_recorded_once(options, tmp_path):
    options['train'].update(graph=True, compile={'mode': 'reduce-overhead'})
    assert check(options, tmp_path) == [
        'train.graph must be false with train.compile.mode reduce-overhead, which records by itself.'
    ]


@pytest.mark.parametrize('change_to', [{'amp': 'bf16'}, {'accumulate_iter': 2}, {'graph': True}, {'compile': True}])
def test_one_process_for_several_gpus(options, tmp_path, change_to):
    change(options, 'num_gpu', 2)
    refused = 'train.amp, compile, accumulate_iter, checkpointing and graph need a process for each GPU'
    assert not any(problem.startswith(refused) for problem in check(options, tmp_path))
    options['train'].update(change_to)
    assert any(problem.startswith(refused) for problem in check(options, tmp_path))
