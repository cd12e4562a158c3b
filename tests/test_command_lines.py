"""Command lines with a wrong value in each place: a sentence for each, and nothing that is not asked for."""

import contextlib
import errno
import os
import re
import stat
import sys
import time

import pytest
from tiny_commands import write_inputs

from lora_sr.cli.main import build_parser, main

LINES = {
    'prepare': 'prepare images --lr lq -o {out} --scale 2 --size 24 --step 12 --threshold 0 --workers 1',
    'degrade': 'degrade images -o {out} --scale 2 --seed 1 --workers 1',
    'adapt': 'adapt base.pth --pairs images lq -o {out} --minutes 1 --share 30% -opt adapt.yml --param-key params',
    'photos': 'adapt base.pth --photos images -o {out}',
    'teacher': 'adapt base.pth --lr lq --teacher base.pth -o {out}',
    'inspect': 'inspect base.pth --param-key params --adapter a.safetensors=0.5',
    'allocate': 'allocate -opt adapt.yml --budget 20% --batches 1 --max-rank 2 -o {out}/new.yml --chart {out}/c.png',
    'merge': 'merge lora.pth -o {out}/m.pth --param-key params',
    'extract': 'adapter extract lora.pth -o {out}/a.safetensors',
    'apply': 'adapter apply base.pth a.safetensors=1 -o {out}/a.pth',
    'adapter': 'adapter merge base.pth a.safetensors=0.5 -o {out}/m.safetensors',
    'info': 'adapter info a.safetensors',
    'upscale': 'upscale images -m base.pth -o {out} --tile 64 --dtype float32 --format png --quality 90',
    'chainner': 'export chainner base.pth -o {out}/c.pth',
    'torchscript': 'export torchscript base.pth -o {out}/c.pt',
    'submission': 'submission -m base.pth --team 7 --name Tiny -o {out}',
    'compare': 'compare a=base.pth --set s=images,lq -o {out}/t.md --picture {out}/p.png -opt adapt.yml',
    'attribution': 'attribution a=base.pth lq/000.png -o {out}/a.png --window 8 8 4 --steps 2 --context 12',
    'curves': 'curves run=run -o {out}/c.png --metric psnr --dataset val',
    'report': 'report run -o {out}/r.html --metric psnr',
    'bench': 'bench runtime --size 8 8',
    'affinity': 'bench affinity --size 8',
    'train': 'train -opt adapt.yml --force_yml name=other',
}
WRONG = (
    '', '-1', '0', '2147483648', '1e309', 'nan', '\x1b[31mred\nerror: forged', 'x' * 5000, '\udcff\udcfe', '--',
    '.', '~', 'nowhere/file', 'pipe', 'run', 'a=b=c', '{out}', 'base.pth', 'lq',
)  # fmt: skip
LONGEST = 300  # letters of a problem
SECONDS = 120  # against what would never end; a few are usual


@pytest.fixture
def inputs(tmp_path):
    write_inputs(tmp_path / 'inputs')
    os.mkfifo(tmp_path / 'inputs/pipe')
    return tmp_path / 'inputs'


def values(line):
    """Places of a command line whose values can be wrong."""
    words = line.split()
    first = 2 if words[0] in ('adapter', 'export', 'bench') else 1
    return [place for place in range(first, len(words)) if not words[place].startswith('-')]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with names')
@pytest.mark.parametrize('name', LINES)
def test_wrong_values(inputs, tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr('lora_sr.deploy.submission._verify', lambda *args: 0.0)  # a process that takes seconds
    before = {path: path.read_bytes() for path in inputs.rglob('*') if path.is_file()}
    cases = [(place, wrong) for place in values(LINES[name]) for wrong in WRONG]
    for number, (place, wrong) in enumerate(cases):
        out = tmp_path / str(number)
        out.mkdir()
        words = LINES[name].split()
        words[place] = wrong
        argv = [word.replace('{out}', str(out)) for word in words]
        start = time.perf_counter()
        try:
            status = main(argv)
        except SystemExit as error:  # of argparse
            status = error.code
        told = capfd.readouterr()
        err = told.err.replace(str(tmp_path), 'tmp')
        case = (argv, status, err[-2000:])
        assert status in (0, 1, 2), case
        assert time.perf_counter() - start < SECONDS, case
        errors = [line for line in err.splitlines() if 'error: ' in line]
        assert status == 0 or 1 <= len(errors) <= 21, case
        assert 'Traceback' not in told.err and all(
            len(part) <= LONGEST for line in errors for part in line.split('; ')
        ), case
        assert re.fullmatch(r'[\n\r\t -~\u00a0-\U0010ffff]*', told.err + told.out), case
        assert stat.S_ISFIFO((inputs / 'pipe').stat().st_mode), case
        assert not any(line.startswith('error: forged') for line in (told.err + told.out).splitlines()), case
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize('option', ['threshold', 'workers', 'border'])
def test_two_dashes_are_no_value(capsys, option):
    """Of which argparse makes an empty list before Python 3.13."""
    with pytest.raises(SystemExit, match='2'):
        main(['prepare', 'images', '-o', 'out', f'--{option}=--'])
    assert f'error: argument --{option}: expected one argument' in capsys.readouterr().err


def test_names_of_outputs_bring_no_color(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    assert main(['merge', 'lora.pth', '-o', '\x1b[31mred\nwrote.pth']) == 0
    told = capsys.readouterr().out
    assert 'wrote \\x1b[31mred\\nwrote.pth' in told


def test_every_command_is_tried():
    """Of those that only measure, two."""
    parser = build_parser()
    (commands,) = (action.choices for action in parser._actions if action.dest == 'command')
    assert {line.split()[0] for line in LINES.values()} == set(commands) - {'test'}


@pytest.mark.parametrize('line', ['upscale a.png -m b.pth -o c', 'prepare images -o c --scale 2', 'inspect b.pth'])
def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys, line):
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir(tmp_path / 'gone')
    (tmp_path / 'gone').rmdir()
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith('lora-sr: error: ') and error.count('\n') == 1


@pytest.mark.parametrize('line', ['merge {} -o x.pth', 'prepare . -o x --scale {}', '{}', 'merge x --adapter {}=1'])
def test_long_words_are_cut(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        assert main([word.format('a b ' * 1500) for word in line.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()[-1]) < 400


def test_what_an_error_of_the_system_names(tmp_path, monkeypatch, capsys):
    """A path that was given is the user's; any other a fault of ours, which its traceback tells."""
    monkeypatch.setattr('lora_sr.report.summary.inspect_file', lambda *_, **__: os.mkdir(tmp_path / 'x/below/it'))
    assert main(['inspect', str(tmp_path / 'x')]) == 2
    assert (
        capsys.readouterr().err == f'lora-sr: error: {tmp_path}/x/below/it cannot be used: No such file or directory\n'
    )
    with pytest.raises(FileNotFoundError):
        main(['inspect', 'y'])


@pytest.mark.parametrize(
    'line',
    [
        ['compare', 'a=b.pth', '--set', 's=x\ny,lq'], ['compare', 'a=b.pth', '--set', 's=images,x\ny'],
        ['adapter', 'merge', 'b.pth', 'a\nb=1', '-o', 'x.pth'],
        ['inspect', 'b.pth', '--adapter', 'a\nb.safetensors=0.5'],
        ['compare', 'a\nb=b.pth', 'a\nb=c.pth'], ['curves', 'a=run', '-o', '../x\ny/x.png'],
        ['merge', 'x\n/y', '-o', 'z.pth'],
    ],
)  # fmt: skip
def test_names_make_no_lines(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith('lora-sr: error: ') and error.count('\n') == 1


@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_closed_streams(inputs, tmp_path, monkeypatch, closed):
    """As Python finds them after `>&-`."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys, closed, None)
    assert main(['upscale', 'images', '-m', 'base.pth', '-o', str(tmp_path / 'out')]) == 0
    assert any((tmp_path / 'out').iterdir())


def test_a_full_disk_behind_the_output(inputs, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys.stdout, 'write', fail)
    assert main(['inspect', 'base.pth']) == 2
    assert capsys.readouterr().err == 'lora-sr: error: the output cannot be written: No space left on device\n'
