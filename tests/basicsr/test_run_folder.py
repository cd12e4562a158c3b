"""One run at a time in a folder."""

import subprocess
import sys
import threading

import pytest
from tiny_run import python_environment, run_python

from lora_sr import files
from lora_sr.basicsr import run_folder
from lora_sr.errors import InputError

pytestmark = pytest.mark.skipif(files.fcntl is None, reason='this system has no locks')

HOLD = """
import os, sys
from lora_sr.basicsr import run_folder
run_folder.claim(sys.argv[1])
os.makedirs(sys.argv[1], exist_ok=True)
run_folder.hold(sys.argv[1])
if not os.fork():  # a worker
    sys.stdin.read()
    os._exit(0)
print('held', flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds a folder, and has a worker."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path / 'experiments/run')],
        env=python_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.wait()
    process.stdin.close()  # which ends the worker
    process.stdout.close()


@pytest.fixture(autouse=True)
def released():
    yield
    run_folder.release()


def test_a_run_at_work_keeps_its_folder(tmp_path, other):
    folder = tmp_path / 'experiments/run'
    with pytest.raises(
        InputError, match='A run is at work in .*experiments/run: stop it, wait for it, or give this one'
    ):
        run_folder.claim(folder)
    run_folder.claim(folder.with_name('another'))
    other.kill()
    other.wait()
    run_folder.claim(folder)  # though its worker lives


def test_what_is_given_up_is_waited_for(tmp_path, other):
    folder = tmp_path / 'experiments/run'
    killing = threading.Timer(0.3, other.kill)
    killing.start()
    run_folder.claim(folder, wait=60)
    killing.join()


@pytest.mark.parametrize('is_moved', [True, False])
def test_the_folder_is_held_to_the_end(tmp_path, is_moved):
    """Also that of a run that goes on, which was there before."""
    folder = tmp_path / 'run'
    folder.mkdir()
    run_folder.claim(folder)
    if is_moved:
        folder.rename(tmp_path / 'archived')
        folder.mkdir()
    run_folder.hold(folder)
    assert not run_folder._take('another', folder) and run_folder._take('above', tmp_path)
    run_folder.release()
    assert run_folder._take('another', folder)


def test_a_run_that_is_over_does_not(tmp_path):
    folder = tmp_path / 'experiments/run'
    for _ in range(2):
        run_folder.claim(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.hold(folder)


def test_nobody_begins_between_the_two(tmp_path, monkeypatch):
    """BasicSR looks for the folder, and makes it then."""
    folder = tmp_path / 'run'
    run_folder.claim(folder)
    assert not run_folder._take('another', tmp_path)
    folder.mkdir()
    run_folder.hold(folder)
    assert run_folder._take('another', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [[], ['--auto_resume']])
def test_a_second_run_of_that_name(tiny_options, tmp_path, other, arguments):
    command = ['-m', 'lora_sr.train', '-opt', 'tiny.yml', *arguments, '--force_yml', 'name=run']
    done = run_python(*command, cwd=tmp_path, status=2)
    assert 'A run is at work in ' in done.stderr and done.stderr.count('error: ') == 1
    assert [path.name for path in (tmp_path / 'experiments').iterdir()] == ['run']
    assert list((tmp_path / 'experiments/run').iterdir()) == []
