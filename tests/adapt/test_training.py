"""How a training is watched: with programs in its place that record what a training would, and end as it might."""

import json
import subprocess
import sys

import pytest

from lora_sr import threads
from lora_sr.adapt import training
from lora_sr.adapt.training import train
from lora_sr.errors import InputError

PROGRAM = """
import json, signal, sys, time
from pathlib import Path
values, status, stays = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == 'stays'
told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
path = Path('experiments/adapt')
path.mkdir()
with open(path / 'metrics.jsonl', 'a') as file:
    for number, value in enumerate(values, 1):
        line = {'iter': 10 * number, 'validation': 'held', 'metrics': {'psnr': value}}
        print(json.dumps(line), file=file, flush=True)
    end = time.monotonic() + 30  # who does not end it is told so, and does not wait for ever
    while stays and not told and time.monotonic() < end:
        time.sleep(0.01)
    print(json.dumps({'iter': 10 * len(values), **({'stopped': 'SIGTERM'} if told else {'finished': True})}), file=file)
print('error: the last line')
sys.exit(status)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: watch a program that validates with these values."""
    monkeypatch.setattr(training, 'LOOK', 0.05)

    def watched(values, status=0, stays=False, patience=2, told=lambda iteration, psnr: None):
        def begin(folder):
            (folder / 'experiments').mkdir()
            arguments = [json.dumps(values), str(status), 'stays' if stays else 'ends']
            with open(folder / training.LOG, 'ab') as log:
                return subprocess.Popen([sys.executable, '-c', PROGRAM, *arguments], cwd=folder, stdout=log, stderr=log)

        monkeypatch.setattr(training, '_begin', begin)
        return train(tmp_path, patience, told)

    return watched


def test_the_best_of_a_run_to_its_end(run):
    told = []
    found = run([30, 32, 31], told=lambda iteration, psnr: told.append((iteration, psnr)))
    assert told == [(10, 30), (20, 32), (30, 31)]
    assert (found.psnr, found.best, found.iterations, found.ended) == ({10: 30, 20: 32, 30: 31}, 20, 30, 'finished')


def test_an_hour_for_what_is_learned_in_a_minute(run):
    found = run([30, 32, 31.9, 32.001], stays=True)
    assert found.ended == 'no_rise' and found.best == 40


def test_a_rise_counts_while_it_is_one(run):
    assert run([30, 30.01, 30.02, 30.03]).ended == 'finished'
    assert not training._has_stopped_rising({10: 30.0, 20: 30.0}, 2)  # too few to tell


def test_what_has_stopped_rising_is_not_begun_again(run, tmp_path, monkeypatch):
    run([30, 30, 30], stays=True)
    monkeypatch.setattr(training, '_begin', None)
    assert train(tmp_path, 2).ended == 'no_rise'


@pytest.mark.parametrize(('status', 'values'), [(2, []), (2, [30]), (1, []), (-9, [30])])
def test_what_could_not_be_done(run, status, values):
    """Also with validations, as of a run that somebody else has at work there: a later call goes on."""
    with pytest.raises(InputError, match=r'^The training could not be done: the last line$'):
        run(values, status=status % 256)


def test_what_diverges_keeps_its_best(run):
    found = run([30, 20], status=1)
    assert found.ended == 'failed' and found.best == 10


@pytest.mark.parametrize('is_chosen', [True, False])
def test_how_it_begins(tmp_path, monkeypatch, is_chosen):
    """The threads that this process has chosen are not handed on, those of the user are."""
    seen = {}

    def begin(command, **options):
        seen.update(options, command=command, has_folder=(tmp_path / 'experiments').is_dir())

    monkeypatch.setattr(subprocess, 'Popen', begin)
    monkeypatch.setattr(threads, '_chosen', is_chosen)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    training._begin(tmp_path)
    assert seen['command'][1:] == ['-m', 'lora_sr.train', '-opt', 'train.yml', '--auto_resume']
    assert ('OMP_NUM_THREADS' in seen['env']) != is_chosen
    assert seen['cwd'] == tmp_path and seen['has_folder']  # whose lock the run would wait for
