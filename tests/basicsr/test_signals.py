"""Signals, and minutes, that end a run."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.models.base_model import BaseModel
from basicsr.utils.logger import MessageLogger
from tiny_run import REPOSITORY, python_environment

from lora_sr.basicsr import signals
from lora_sr.basicsr.samples import SampleStream


class Model:
    """Notes what it is told to save."""

    def __init__(self):
        self.saved = []
        self.opt = {'rank': 0}

    def save(self, epoch, iteration):
        self.saved.append((epoch, iteration))


@pytest.fixture
def listening():
    before = {name: signal.getsignal(getattr(signal, name)) for name in signals.NAMES}
    signals.listen()
    yield
    signals.ignore()
    assert {name: signal.getsignal(getattr(signal, name)) for name in signals.NAMES} == before
    signals.stop_if_told(Model(), 0, 1, 0)


@pytest.mark.parametrize('name', signals.NAMES)
@pytest.mark.parametrize(
    ('iteration', 'begun', 'saved', 'words'),
    [
        (7, 0, [(2, 7)], 'iteration 7 is saved; --auto_resume goes on from it'),
        (7, 7, [], 'iteration 7 is saved; --auto_resume goes on from it'),
        (0, 0, [], 'nothing has been trained'),
    ],
)
def test_a_signal_saves_and_ends(listening, capsys, name, iteration, begun, saved, words):
    model, number = Model(), getattr(signal, name)
    signals.stop_if_told(model, 2, iteration, begun)
    assert model.saved == []
    os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as ended:
        signals.stop_if_told(model, 2, iteration, begun)
    assert ended.value.code == 0 and model.saved == saved
    assert capsys.readouterr().err == f'stopped by {name}: {words}\n'
    if name != 'SIGINT':
        os.kill(os.getpid(), number)  # as torchrun hands it on; this process is still here


def test_a_second_interrupt_ends_at_once(listening, capfd):
    os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == '\nstopping after what is at hand; Ctrl-C again ends at once\n'
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_under_torchrun_an_interrupt_comes_twice(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    signals.listen()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    finally:
        signals.ignore()


@pytest.mark.parametrize(('minutes', 'ends'), [(None, False), (2, False), (1, True)])
def test_its_minutes_end_a_run(monkeypatch, capsys, minutes, ends):
    model = Model()
    signals.begin()
    signals.listen(minutes)
    try:
        now = time.monotonic()
        monkeypatch.setattr(signals.time, 'monotonic', lambda: now + 90)
        with pytest.raises(SystemExit) if ends else contextlib.nullcontext() as ended:
            signals.stop_if_told(model, 2, 7, 0)
    finally:
        signals.ignore()
    assert model.saved == [(2, 7)] * ends
    if ends:
        told = capsys.readouterr().err
        assert ended.value.code == 0
        assert told == 'stopped by train.max_minutes: iteration 7 is saved; --auto_resume goes on from it\n'


@pytest.mark.parametrize(
    ('when', 'expected'), [('within', ['0 6 [6]', '1 6 []']), ('before', ['0 None SIGUSR1', '1 None SIGUSR1'])]
)
def test_processes_end_after_the_same_iteration(when, expected):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    command = [sys.executable, REPOSITORY / 'tests/told_to_stop.py']
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), when], env=python_environment(), stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    assert told == expected
    assert [process.returncode for process in processes] == [0, 0]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return os.getpid(), index


def shield(worker_id):
    signals.shield_worker()


@pytest.mark.parametrize('name', signals.NAMES)
def test_workers_live_until_their_run_ends_them(name):
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, worker_init_fn=shield, prefetch_factor=1)
    batches = iter(loader)
    ((worker,), first) = next(batches)
    # From another process: as that of torch itself, who reads has the right to end it.
    subprocess.run(
        [sys.executable, '-c', f'import os; os.kill({int(worker)}, {int(getattr(signal, name))})'], check=True
    )
    assert [int(first), *(int(index) for _, index in batches)] == list(range(6))
    del batches
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)


def test_a_worker_is_ended_by_its_parent():
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=1, worker_init_fn=shield)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_forked_worker_dies_of_it(listening):
    worker = os.fork()
    if worker == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM


def test_handlers_of_others_are_left_alone(monkeypatch):
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        signals.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [signal.SIGUSR1]
        signals.stop_if_told(Model(), 0, 1, 0)
        signals.ignore()
        assert isinstance(signal.getsignal(signal.SIGUSR1), types.FunctionType)
    finally:
        signal.signal(signal.SIGUSR1, before)


WRITER = types.SimpleNamespace(close=lambda: None)  # of TensorBoard


class Validating(BaseModel):
    """Is terminated at the second of its images."""

    def __init__(self, opt):
        super().__init__(opt)
        self.validated_images, self.saved = [], []

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        for image in dataloader:
            self.validated_images.append((current_iter, tb_logger, image))
            if image == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def save(self, epoch, iteration):
        self.saved.append((epoch, iteration))


def begun(folder, **state):
    """A model that validates, and the samples of its run, of which it has done some."""
    opt = {'num_gpu': 0, 'is_train': True, 'rank': 0, 'dist': False, 'path': {'training_states': str(folder)}}
    opt.update(train={'total_iter': 9}, val={'val_freq': 7, 'save_img': False}, name='run')
    opt['logger'] = {'print_freq': 1, 'use_tb_logger': False}
    model, stream = Validating(opt), SampleStream(EnlargedSampler([0] * 8, 1, 0), 0)
    stream.begin(opt, 1, state, None)
    stream.val_loaders = [[0, 1, 2]]
    return model, stream


def test_a_signal_ends_a_validation(listening, tmp_path):
    model, stream = begun(tmp_path)
    with pytest.raises(SystemExit):
        model.validation(stream.val_loaders[0], 7, None)
    assert model.saved == [(0, 7)]
    assert model.validated_images == [(7, None, 0), (7, None, 1)]


@pytest.mark.parametrize(('iteration', 'images'), [(7, [(7, WRITER, 0), (7, WRITER, 1)]), (6, [])])
def test_a_run_that_goes_on_makes_up_for_its_validation(listening, tmp_path, iteration, images):
    model, stream = begun(tmp_path, iter=iteration, epoch=0)
    MessageLogger(model.opt, iteration, WRITER)
    with pytest.raises(SystemExit) if images else contextlib.nullcontext():
        model.update_learning_rate(iteration + 1)
    assert model.validated_images == images and model.saved == []  # the iteration has been saved


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_that_is_terminated_goes_on(tiny_options, tmp_path, processes):
    """As a scheduler does it, which ends all processes."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'] * (processes > 1)
    command = [sys.executable, *launcher, '-m', 'lora_sr.train', '-opt', 'tiny.yml']
    command += ['--launcher', 'pytorch'] * (processes > 1)
    # What is sent to all processes comes to those that read samples, too.
    changes = [
        '--force_yml',
        'datasets:train:num_worker_per_gpu=1',
        'train:total_iter=100000',
        'val:val_freq=100000',
        'logger:save_checkpoint_freq=100000',
    ]
    environment = {**python_environment(), 'PYTHONUNBUFFERED': '1'}
    process = subprocess.Popen(
        [*command, *changes], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    told = []
    for line in process.stderr:  # to its end
        told.append(line)
        if 'iter:       5,' in line:
            os.killpg(process.pid, signal.SIGTERM)
    status = process.wait(timeout=300)
    text = ''.join(told)
    (iteration,) = re.findall(r'stopped by SIGTERM: iteration (\d+) is saved; --auto_resume goes on from it', text)
    states = os.listdir(tmp_path / 'experiments/tiny/training_states')
    assert states == [f'{iteration}.state'] and int(iteration) >= 5
    if processes == 1:
        assert status == 0 and 'Traceback' not in text
    last = json.loads((tmp_path / 'experiments/tiny/metrics.jsonl').read_text().splitlines()[-1])
    assert last == {'iter': int(iteration), 'stopped': 'SIGTERM'}
