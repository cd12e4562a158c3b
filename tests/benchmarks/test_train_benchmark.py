"""`lora-sr bench train`: what it compares is alike, stock BasicSR is stock, and its table is whole."""

import multiprocessing
import re

import pytest
import torch
from tiny_run import run_python

from lora_sr.adapters import lora_layers
from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.benchmarks import train as train_benchmark
from lora_sr.benchmarks.train import Form, Row, Subject, forms_of
from lora_sr.benchmarks.training_process import Started, with_peft
from lora_sr.cli import bench
from lora_sr.errors import InputError

SMALL = {
    'SPAN': Subject({'type': 'SPAN', 'feature_channels': 6, 'upscale': 4}),
    'DSCLoRA-LKDN': Subject(
        {'type': 'DSCLoRA', 'feature_channels': 6, 'upscale': 4, 'rank': 1},
        'DistillationModel',
        teacher={'type': 'LKDN', 'num_feat': 4, 'num_atten': 4, 'num_block': 1, 'upscale': 4},
    ),
}
WITHOUT_US = """
from lora_sr.archs.reparam import Foldable
from lora_sr.benchmarks.training_process import _add_ours, _leave_basicsr_alone
_leave_basicsr_alone()
import inspect
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import ARCH_REGISTRY
print('NotImplementedError' in inspect.getsource(BaseModel.get_optimizer), 'SPAN' in ARCH_REGISTRY)
_add_ours()
print('SPAN' in ARCH_REGISTRY, Foldable.trains_folded)
"""


@pytest.mark.slow
def test_table(monkeypatch, capsys):
    monkeypatch.setattr(train_benchmark, 'SUBJECTS', {'DSCLoRA-LKDN': SMALL['DSCLoRA-LKDN']})
    monkeypatch.setattr(train_benchmark, 'TURN', {'cpu': 0.01})
    monkeypatch.setattr(train_benchmark, 'ROUNDS', 1)
    train_benchmark.run(keys=['memory_format', 'accumulate_iter', 'graph'], batch=2, patch=16, steps=2, device='cpu')
    printed = capsys.readouterr().out
    number = r' +[\d.,]+'
    row = rf'{number}{number}{number} +(?:[\d.,]+ MB|-) +(\d+\.\d{{6}})$'
    names = ['stock BasicSR', 'lora_sr', r'\+ memory_format: channels_last', r'\+ graph: true']
    names += [r'\+ network_t.precompute', '  beside, without graph: accumulate_iter: 2']
    losses = [float(re.search(rf'^{form}{row}', printed, re.M).group(1)) for form in names]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)
    assert '    train.graph: a CUDA graph needs a GPU; the steps run without.' in printed
    for dtype in ('float32', 'bfloat16'):
        assert re.search(rf'^floor, {dtype}{number}{number}  [\d.,]+ GFLOP a step$', printed, re.M)
    for form in ('stock BasicSR', 'lora_sr, all that is above'):
        assert re.search(rf'^{form}, (png|raw){number}{number}{number}{number} samples/s$', printed, re.M)


class Pretended:
    """A process that trains, of which the tests say how it ends; `here` tells how many were at work when it began."""

    at_work = 0

    def __init__(self, started, is_ready=True):
        self.connection, self.theirs = multiprocessing.Pipe()
        self.started, self.ends, self.is_ready, self.here = None, started, is_ready, 0

    def begin(self):
        if not self.is_ready:
            self.started = self.ends
            return False
        Pretended.at_work += 1
        self.here = Pretended.at_work
        self.theirs.close()  # as one that has died, or has answered
        return True

    def wait(self):
        Pretended.at_work -= 1
        self.started = self.ends


@pytest.mark.parametrize('at_a_time', [1, 2, 5])
def test_all_start_whatever_becomes_of_some(at_a_time):
    ends = [Started(1.0, ()), 'the process ended with status -9', Started(2.0, ()), 'no memory', Started(3.0, ())]
    processes = [Pretended(one, is_ready=one != 'no memory') for one in ends]
    train_benchmark._start(list(processes), at_a_time)
    assert [process.started for process in processes] == ends
    assert max(process.here for process in processes) == min(at_a_time, 4) and Pretended.at_work == 0


def test_as_many_start_as_a_gpu_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (80, 100))
    held = {one: train_benchmark._at_a_time(Started(1.0, (), one)) for one in (1, 27, 28, 29, 100, 0)}
    assert held == {1: 56, 27: 2, 28: 2, 29: 1, 100: 1, 0: 1}
    assert train_benchmark._at_a_time('it has failed') == 1


@pytest.mark.slow
def test_stock_basicsr_is_without_our_patches(tmp_path):
    assert run_python('-c', WITHOUT_US, cwd=tmp_path).stdout == 'True False\nTrue False\n'


@pytest.mark.slow
def test_a_form_that_fails_is_told(monkeypatch, capsys):
    monkeypatch.setattr(train_benchmark, 'SUBJECTS', {'SPAN': Subject({**SMALL['SPAN'].network, 'upscale': 'x'})})
    monkeypatch.setattr(train_benchmark, 'floor_of', lambda *_: 1.0)
    with pytest.raises(RuntimeError, match='SPAN, stock BasicSR: InputError: .*; SPAN, lora_sr: InputError: '):
        train_benchmark.run(keys=[], batch=1, patch=8, steps=1, device='cpu')
    assert re.search('^stock BasicSR +InputError: ', capsys.readouterr().out, re.M)


def test_a_loss_that_differs_is_a_fault():
    def row(loss):
        return Row(Started(loss, ()))

    forms = [Form('stock', is_stock=True), Form('ours'), Form('amp', {'amp': 'bf16'}), Form('rival', is_rival=True)]
    rows = dict(zip(forms, map(row, (1.0, 1.0001, 1.01, 2.0))))
    assert train_benchmark._faults(rows) == []
    rows = dict(zip(forms, map(row, (1.0, 1.01, 1.1, float('nan')))))
    assert [fault.partition(':')[0] for fault in train_benchmark._faults(rows)] == ['ours', 'amp']


def test_keys_are_added_one_by_one():
    forms = {form.name: form.train for form in forms_of(SMALL['SPAN'], ['checkpointing', 'graph', 'amp'])}
    assert list(forms.values()) == [
        {},
        {},
        {'amp': 'bf16'},
        {'amp': 'bf16', 'graph': True},
        {'amp': 'bf16', 'checkpointing': True},
    ]


def test_peft_adapts_the_same_layers():
    pytest.importorskip('peft')
    base = {'type': 'SwinIR', 'depths': [2], 'embed_dim': 8, 'num_heads': [2], 'window_size': 4, 'img_size': 8,
            'upscale': 2, 'upsampler': 'pixelshuffledirect'}  # fmt: skip
    lora = {'groups': ['all'], 'rank': 2, 'alpha': 2}
    torch.manual_seed(0)
    network = with_peft(base, lora)
    adapted = {name.partition('.lora_A')[0] for name, _ in network.named_parameters() if '.lora_A' in name}
    assert adapted == {name for name, _ in lora_layers(AdaptSR(base, lora))}
    assert all(value.requires_grad == ('lora_' in name) for name, value in network.named_parameters())


def test_names_are_those_of_the_command():
    assert bench.NETWORKS == tuple(train_benchmark.SUBJECTS) and set(bench.KEYS) == set(train_benchmark.KEYS)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'patch': 50}, '--patch must be a multiple of 8 up to 120, got 50.'),
        ({'patch': 128}, '--patch must be a multiple of 8 up to 120, got 128.'),
        ({'batch': 0}, '--batch must be a whole number of at least 1, got 0.'),
        ({'steps': -1}, '--iterations must be a whole number of at least 1, got -1.'),
    ],
)
def test_wrong_values(options, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        train_benchmark.run(device='cpu', **options)


def test_small_images_are_refused(make_images, tmp_path):
    folder = make_images(tmp_path / 'photos', [(400, 600)])
    with pytest.raises(InputError, match='must have 480 x 480 pixels, as sub-images have, got 600 x 400 in '):
        train_benchmark.run([folder], device='cpu')
