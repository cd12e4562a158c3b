"""Commands that are killed at their file operations: the same command again completes, and nothing old is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_commands import write_inputs
from tiny_run import python_environment

from lora_sr.share import RECORD

LAST, OTHERS = 4, 3  # operations before which a command is killed
# {new} is a folder that the command makes, {out} one that is there; what it writes there by itself.
COMMANDS = {
    'merge': ('merge lora.pth -o {out}/m.pth', ['m.pth']),
    'adapter': ('adapter merge base.pth a.safetensors=0.5 -o {out}/m.safetensors', ['m.safetensors']),
    'extract': ('adapter extract lora.pth -o {out}/a.safetensors', ['a.safetensors']),
    'export': ('export chainner base.pth -o {out}/c.pth', ['c.pth']),
    'degrade': ('degrade images -o {new} --scale 2 --workers 2', []),
    'prepare': ('prepare images -o {new} --scale 2 --size 24 --step 12 --workers 1', []),
    'prepare raw': ('prepare images -o {new} --scale 2 --raw --workers 1', []),
    'upscale': ('upscale images -m base.pth -o {new} --skip-existing', []),
    'compare': (
        'compare a=base.pth b=lora.pth --set s=images -o {out}/t.md --plot {out}/f.svg --picture {out}/p.png',
        ['t.md', 'f.svg', 'p.png'],
    ),
    'degrade, shared': ('degrade images -o {new} --scale 2 --workers 1 --share', []),
    'prepare, shared': ('prepare images -o {new} --scale 2 --size 24 --step 12 --workers 1 --share', []),
    'compare, shared': (
        'compare a=base.pth --set s=images -o {out}/t.md --picture {out}/p.png --share',
        ['t.md', 'p.png'],
    ),
    'curves': ('curves run=run -o {out}/c.png', ['c.png']),
    'report': ('report run -o {out}/r.html', ['r.html']),
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


# One process of one, where a command has --share.
ARRAY = {'SLURM_ARRAY_TASK_ID': '0', 'SLURM_ARRAY_TASK_MIN': '0', 'SLURM_ARRAY_TASK_COUNT': '1'}


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """The folder in which the commands run."""
    folder = tmp_path_factory.mktemp('inputs')
    write_inputs(folder)
    return folder


@pytest.fixture(scope='module')
def start(inputs):
    """A function: run a command in a process of its own, killed before a file operation under a folder or not."""
    environment = {**python_environment(), **ARRAY}
    command = [sys.executable, str(Path(__file__).with_name('kill_server.py'))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def ask(argv, out, kill_at=None):
            request = {'argv': argv, 'inputs': str(inputs), 'out': str(out), 'kill_at': kill_at}
            server.stdin.write(json.dumps(request) + '\n')
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask


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
    """Whether something is unfinished; the record of a job that was shared stays."""
    return any(part.startswith('.') for part in Path(name).parts) and Path(name).name != RECORD


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
@pytest.mark.parametrize(
    ('name', 'old'),
    [(name, False) for name in COMMANDS] + [(name, True) for name in ('merge', 'curves', 'submission')],
)
def test_killed_commands(start, tmp_path, name, old):
    words, names = COMMANDS[name]
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
    status, count = start(argv, out)
    complete = contents(out)
    assert status == 0 and count > 0 and not any(map(is_hidden, complete)) and complete != before
    points = sorted({*range(max(0, count - LAST), count + 1), *range(0, count, max(1, count // OTHERS))})
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
