"""Commands that are killed at their file operations: the same command again completes, and nothing old is lost."""

import os
import shutil
import signal
import sys
from pathlib import Path

import cv2
import pytest
import torch
from tiny_commands import write_inputs

from lora_sr import files
from lora_sr.cli.main import main

# Of `open` only what may write; `os.replace` is told as a rename.
EVENTS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')
SECONDS = 120  # against what would never end
KILLS = 9  # of a command, the last five of its operations among them
# {new} is a folder that the command makes, {out} one that is there; what it writes there by itself.
COMMANDS = {
    'merge': ('merge lora.pth -o {out}/m.pth', ['m.pth']),
    'adapter': ('adapter merge base.pth a.safetensors=0.5 -o {out}/m.safetensors', ['m.safetensors']),
    'extract': ('adapter extract lora.pth -o {out}/a.safetensors', ['a.safetensors']),
    'export': ('export chainner base.pth -o {out}/c.pth', ['c.pth']),
    'degrade': ('degrade images -o {new} --scale 2 --workers 2', []),
    'prepare': ('prepare images -o {new} --scale 2 --size 24 --step 12 --workers 1', []),
    'upscale': ('upscale images -m base.pth -o {new} --skip-existing', []),
    'compare': (
        'compare a=base.pth b=lora.pth --set s=images -o {out}/t.md --plot {out}/f.svg --picture {out}/p.png',
        ['t.md', 'f.svg', 'p.png'],
    ),
    'curves': ('curves run=run -o {out}/c.png', ['c.png']),
    'allocate': (
        'allocate -opt adapt.yml --budget 20% --batches 1 -o {out}/new.yml --chart {out}/c.png',
        ['new.yml', 'c.png'],
    ),
    'submission into a new folder': ('submission -m base.pth --team 7 --name Tiny -o {new}', []),
    'submission': (
        'submission -m base.pth --team 7 --name Tiny -o {out}',
        [
            'models/team07_Tiny.py', 'model_zoo/team07_Tiny.pth', 'team07_Tiny_select_model.txt',
            'team07_Tiny_factsheet.md',
        ],
    ),
}  # fmt: skip


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """The folder in which the commands run."""
    folder = tmp_path_factory.mktemp('inputs')
    write_inputs(folder)
    return folder


def start(argv, out, kill_at=None):
    """Run a command in another process, and kill it before one of its file operations under a folder.

    Returns:
        Its status, negative after a signal; and how many such operations it began.
    """
    read_end, write_end = os.pipe()
    process = os.fork()
    if process:
        os.close(write_end)
        with os.fdopen(read_end, 'rb') as pipe:
            count = len(pipe.read())
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), count
    try:
        signal.alarm(SECONDS)
        # The other threads of their pools are not in this process.
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        files._found_first.cache_clear()
        own, seen = os.getpid(), [0]

        def watch(event, arguments):
            if event not in EVENTS or os.getpid() != own or not is_written(event, arguments, out):
                return
            if seen[0] == kill_at:
                os.kill(own, signal.SIGKILL)
            seen[0] += 1
            os.write(write_end, b'.')

        sys.addaudithook(watch)
        status = main(argv)
        if kill_at is not None:  # more than there are: after the last
            os.kill(own, signal.SIGKILL)
        os._exit(status)
    finally:
        os._exit(99)


def is_written(event, arguments, out):
    paths = [os.fspath(path) for path in arguments[:2] if isinstance(path, (str, os.PathLike))]
    if event == 'open' and not (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        return False
    return any(os.path.abspath(path).startswith(str(out)) for path in paths)


def contents(folder):
    """What is in a folder: name -> bytes, or ``None`` for an empty folder."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif not any(path.iterdir()):
            found[str(path.relative_to(folder))] = None
    return found


def is_hidden(name):
    return any(part.startswith('.') for part in Path(name).parts)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
@pytest.mark.parametrize('old', [False, True], ids=['new', 'overwrite'])
@pytest.mark.parametrize('name', COMMANDS)
def test_killed_commands(inputs, tmp_path, monkeypatch, name, old):
    words, names = COMMANDS[name]
    if old and not names:
        pytest.skip('what it writes into is its own folder')
    monkeypatch.setattr('lora_sr.deploy.submission._verify', lambda *args: 0.0)  # a process that takes seconds
    out = tmp_path / 'out'

    def arrange():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / 'mine.txt').write_text('mine')
        for file in names if old else ():
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_text('old')

    argv = words.format(out=out, new=out / 'new').split() + ['--overwrite'] * old
    arrange()
    before = contents(out)
    monkeypatch.chdir(inputs)
    assert main(argv) == 0  # here, so that what it imports is there for all others
    arrange()
    status, count = start(argv, out)
    complete = contents(out)
    assert status == 0 and count > 0 and not any(map(is_hidden, complete)) and complete != before
    points = sorted({*range(max(0, count - 5), count + 1), *range(0, count, max(1, count // (KILLS - 5)))})
    for point in points:
        arrange()
        assert start(argv, out, point)[0] == -signal.SIGKILL
        left = contents(out)
        for file, content in left.items():
            if not is_hidden(file) and content is not None:
                assert content in (complete[file], before.get(file)), (point, file)
        assert all(file in left for file in before), point
        status, _ = start(argv, out)
        is_done = {file: content for file, content in left.items() if not is_hidden(file)} == complete
        assert status == 0 or (status == 2 and is_done), (point, sorted(left))
        assert contents(out) == complete, point
