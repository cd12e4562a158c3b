"""Work that processes share: which is whose, and that all together make what one makes, whoever dies."""

import contextlib
import csv
import functools
import os
import subprocess
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch
from tiny_run import python_environment, run_python

from lora_sr import share as module
from lora_sr.archs.span import SPAN
from lora_sr.cli.main import main
from lora_sr.data import degrade as degrade_module
from lora_sr.data import prepare as prepare_module
from lora_sr.data.degrade import degrade_folder
from lora_sr.data.prepare import prepare_databases
from lora_sr.deploy.upscale import upscale
from lora_sr.errors import InputError
from lora_sr.report import comparison as comparison_module
from lora_sr.report.comparison import compare
from lora_sr.share import NotLastError, Parts, Share, own_share, pieces_of

COUNT = 7  # images
TORCHRUN = {'WORLD_SIZE': '4', 'RANK': '2', 'LOCAL_RANK': '0'}
SRUN = {'SLURM_STEP_NUM_TASKS': '3', 'SLURM_NTASKS': '3', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '1'}
BATCH = {'SLURM_NTASKS': '3', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'}  # a script of slurm's, outside of any srun
ARRAY = {
    'SLURM_ARRAY_TASK_ID': '7', 'SLURM_ARRAY_TASK_MIN': '3', 'SLURM_ARRAY_TASK_STEP': '2',
    'SLURM_ARRAY_TASK_COUNT': '5',
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*TORCHRUN, *SRUN, *ARRAY):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def images(make_images, tmp_path):
    return make_images(tmp_path / 'images', [(32 + 4 * number, 36) for number in range(COUNT)])


@pytest.fixture
def span(tmp_path):
    torch.manual_seed(0)
    torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), tmp_path / 'span.pth')
    return tmp_path / 'span.pth'


# Which is whose


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        (TORCHRUN, Share(2, 4, 0)),
        ({**TORCHRUN, 'WORLD_SIZE': '1', 'RANK': '0'}, Share(0, 1)),
        (SRUN, Share(1, 3, 1)),
        ({**SRUN, **TORCHRUN}, Share(2, 4, 0)),  # torchrun on each machine of a job
        (ARRAY, Share(2, 5)),
        ({**ARRAY, **BATCH}, Share(2, 5)),
        ({**ARRAY, **SRUN}, Share(7, 15, 1)),
    ],
)
def test_the_environment_says_which(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_share(True) == expected


@pytest.mark.parametrize(
    ('environment', 'wanted', 'sentence'),
    [
        ({}, True, '--share needs a start by torchrun, by srun or as a job array of slurm'),
        (BATCH, True, '--share needs a start by torchrun, by srun or as a job array of slurm'),
        (TORCHRUN, False, '--share must be given where torchrun starts 4 processes: each would do all of the work'),
        (SRUN, False, '--share must be given where srun starts 3 processes'),
        ({**TORCHRUN, 'RANK': '4'}, True, "RANK must be a whole number from 0 to 3 for --share, got '4'"),
        ({**TORCHRUN, 'WORLD_SIZE': '²'}, True, "WORLD_SIZE must be a whole number from 1 .*, got '²'"),
        ({'WORLD_SIZE': '4'}, True, "RANK must be .*, got ''"),
        ({**ARRAY, 'SLURM_ARRAY_TASK_ID': '8'}, True, 'The array of --share must be a range, such as --array=0-4, got'),
        ({**ARRAY, 'SLURM_ARRAY_TASK_ID': '13'}, True, 'The array of --share must be a range'),
    ],
)
def test_wrong_environments(monkeypatch, environment, wanted, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        own_share(wanted)


@pytest.mark.parametrize('environment', [{}, BATCH, ARRAY, {**TORCHRUN, 'WORLD_SIZE': '1'}])
def test_an_array_alone_shares_nothing(monkeypatch, environment):
    """Its tasks may have folders of their own."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert own_share(False) is None


@pytest.mark.parametrize('world', [1, 2, 5, 9])
def test_each_item_is_one_process_s(world):
    items = [one for rank in range(world) for one in Share(rank, world).of(range(COUNT))]
    assert sorted(items) == list(range(COUNT))


@pytest.mark.parametrize('count', [1, 255, 256, 257, 84_991])
def test_pieces_are_all_items_in_their_order(count):
    pieces = pieces_of(range(count))
    assert [one for piece in pieces for one in piece] == list(range(count))
    assert min(count, 128) <= len(pieces) <= module.MOST_PARTS and all(pieces)


# Parts


def test_a_part_is_whole_or_not_there(tmp_path):
    parts = Parts(tmp_path / 'parts', ['a', 'b'], 'job')
    with pytest.raises(RuntimeError), parts.make(0) as folder:
        (folder / 'file').write_text('half')
        raise RuntimeError
    assert parts.made == 0 and list((tmp_path / 'parts').iterdir()) == []
    with parts.make(1) as folder:
        (folder / 'file').write_text('b')
    assert parts.made == 1 and (parts.paths[1] / 'file').read_text() == 'b'
    with pytest.raises(NotLastError), parts.joining():
        pass
    assert Parts(tmp_path / 'parts', ['b', 'changed'], 'job').made == 1


def test_one_process_puts_parts_together(tmp_path):
    parts = Parts(tmp_path / 'parts', ['a'], 'job')
    with parts.make(0):
        pass
    with parts.joining():
        with pytest.raises(NotLastError), Parts(tmp_path / 'parts', ['a'], 'job').joining():
            pass
        assert parts.record() is None
        parts.mark_joined({'images': 1})
    assert [path.name for path in parts.folder.iterdir()] == [module.RECORD]
    late = Parts(tmp_path / 'parts', ['a'], 'job')
    assert late.record() == {'images': 1}
    with late.joining():
        pass
    assert Parts(tmp_path / 'parts', ['a'], 'another').record() is None
    late.forget()
    assert late.record() is None


# The commands


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def databases_in(folder):
    """{name: (entries, meta file)} of all databases."""
    found = {}
    for path in folder.glob('*.lmdb'):
        with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
            found[path.name] = dict(transaction.cursor()), (path / 'meta_info.txt').read_text()
    return found


def test_upscaled_images_are_those_of_one_process(images, span, tmp_path):
    (tmp_path / 'images/no_image.txt').write_text('')
    upscale([images], span, tmp_path / 'whole')
    out = tmp_path / 'shared'
    reports = [upscale([images], span, out, share=Share(rank, 3)) for rank in (0, 2)]  # 1 has died
    assert [report.images for report in reports] == [3, 2] and len(list(out.iterdir())) == 5
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(InputError, match='go on with the rest with --skip-existing'):
        upscale([images], span, out, share=Share(0, 2))
    again = [upscale([images], span, out, skip_existing=True, share=Share(rank, 10)) for rank in range(10)]
    assert sum(report.images for report in again) == 2 and all(not report.failures for report in again)
    assert files_in(out) == files_in(tmp_path / 'whole')
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_process_that_fails_tells_its_own_failures(images, span, tmp_path):
    (images / '0003.png').write_bytes(b'no image')
    reports = [upscale([images], span, tmp_path / 'out', share=Share(rank, 2)) for rank in range(2)]
    assert [list(report.failures) for report in reports] == [[str(images / '0003.png')], []]
    assert [report.images for report in reports] == [3, 3]


def degrade(images, out, share=None, **options):
    return degrade_folder(images, out, 2, progress=False, share=share, **options)


def shown_in(folder):
    return {name: content for name, content in files_in(folder).items() if not name.startswith('.')}


def test_degraded_images_are_those_of_one_process(images, tmp_path, monkeypatch):
    degrade(images, tmp_path / 'whole')
    made = []
    make = degrade_module.camera_degradation
    monkeypatch.setattr(degrade_module, 'camera_degradation', lambda *args: made.append(args) or make(*args))
    out = tmp_path / 'out'
    assert [degrade(images, out, Share(rank, 3)).images for rank in (0, 2)] == [3, 2]  # 1 has died
    assert len(shown_in(out)) == len(made) == 5
    assert [degrade(images, out, Share(rank, 5)).images for rank in range(5)] == [2, 2, 1, 1, 1] and len(made) == 7
    assert shown_in(out) == files_in(tmp_path / 'whole')
    assert degrade(images, out, Share(0, 1)).images == 7 and degrade(images, out, Share(8, 9)).images == 0
    assert len(made) == 7 and [path.name for path in out.rglob('.*/*')] == [module.RECORD]
    os.remove(out / '0003.png')
    assert degrade(images, out, Share(0, 1)).images == 7 and len(made) == 8
    assert shown_in(out) == files_in(tmp_path / 'whole')


def test_degraded_images_of_another_seed_are_not_taken_for_these(images, tmp_path):
    degrade(images, tmp_path / 'whole')
    out = tmp_path / 'out'
    for share in (None, Share(0, 1)):
        degrade(images, out, Share(0, 1), overwrite=True)
        degrade(images, out, share, seed=1, overwrite=True)
        with pytest.raises(InputError, match='exists and is not the image that is made here'):
            degrade(images, out, Share(0, 1))
    degrade(images, out, Share(0, 1), overwrite=True)
    assert shown_in(out) == files_in(tmp_path / 'whole')


def test_a_process_tells_which_of_its_images_cannot_be_used(images, tmp_path):
    for name in ('0002', '0004', '0005'):
        (images / f'{name}.png').write_bytes(b'no image')
    out = tmp_path / 'out'
    assert degrade(images, out, Share(0, 2), skip_broken=True).images == 3  # 1, 3, 5, 7
    with pytest.raises(InputError, match='2 of 3 images cannot be used, which --skip-broken leaves out'):
        degrade(images, out, Share(1, 2))
    assert len(shown_in(out)) == 4  # 6, which is not one of them, has come into its place
    done = degrade(images, out, Share(1, 2), skip_broken=True)
    assert [Path(path).stem for path in done.left_out] == ['0002', '0004'] and done.images == 1
    assert len(degrade(images, out, Share(0, 1), skip_broken=True).left_out) == 3
    degrade(images, tmp_path / 'whole', skip_broken=True)
    assert shown_in(out) == files_in(tmp_path / 'whole')


PREPARE = dict(scales=[2, 3], size=24, step=12, workers=1, progress=False)


def shared_prepare(images, out, share=None, **options):
    """What has been made; None where another process has, or will."""
    with contextlib.suppress(NotLastError):
        return prepare_databases([images], out, **{**PREPARE, **options}, share=share)


@pytest.mark.parametrize('form', [{}, {'raw': True, 'size': None}])
def test_prepared_databases_are_those_of_one_process(images, tmp_path, monkeypatch, form):
    """A process dies; others, more or fewer of them, make its part and no other."""
    monkeypatch.setattr(module, 'MOST_PARTS', 4)  # of two images each
    prepare = functools.partial(shared_prepare, **form)
    whole = prepare(images, tmp_path / 'whole')
    built = []
    build = prepare_module._build
    monkeypatch.setattr(prepare_module, '_build', lambda *args, **options: built.append(1) or build(*args, **options))
    out = tmp_path / 'out'
    assert prepare(images, out, Share(1, 3)) is None  # the second part
    assert prepare(images, out, Share(2, 3)) is None and len(built) == 2
    assert list(out.glob('*.lmdb')) == []
    assert prepare(images, out, Share(0, 2)) is None and len(built) == 3  # the third is there
    done = prepare(images, out, Share(1, 2))
    assert len(built) == 4
    assert (done.images, done.entries, done.smallest) == (whole.images, whole.entries, whole.smallest)
    assert databases_in(out) == databases_in(tmp_path / 'whole')
    late = prepare(images, out, Share(7, 8))
    assert late == done and len(built) == 4
    database = 'HR_raw' if form else 'HR_sub'
    assert [str(path.relative_to(out)) for path in out.rglob('.*/*')] == [f'.{database}.lmdb.parts/{module.RECORD}']
    assert done.bytes.keys() == {'png', 'raw'} and done.bytes['raw'] == whole.bytes['raw']


def test_what_one_process_makes_anew_is_not_taken_for_shared(images, tmp_path):
    out = tmp_path / 'out'
    assert shared_prepare(images, out, Share(0, 1)).entries
    shared_prepare(images, out, size=48, step=48, overwrite=True)
    with pytest.raises(InputError, match='already exist: choose another output folder'):
        shared_prepare(images, out, Share(0, 1))
    shared_prepare(images, out, Share(0, 1), overwrite=True)
    shared_prepare(images, tmp_path / 'whole')
    assert databases_in(out) == databases_in(tmp_path / 'whole')
    for path in out.glob('*.lmdb'):
        os.rename(path, tmp_path / path.name)
    assert shared_prepare(images, out, Share(0, 1)).entries
    assert databases_in(out) == databases_in(tmp_path / 'whole')


def test_all_that_cannot_be_used_is_told_at_the_end(images, tmp_path):
    for name in ('0002', '0005'):
        (images / f'{name}.png').write_bytes(b'no image')
    out = tmp_path / 'out'
    assert shared_prepare(images, out, Share(0, 2)) is None
    with pytest.raises(InputError, match='2 of 7 images cannot be used, which --skip-broken leaves out') as told:
        shared_prepare(images, out, Share(1, 2))
    assert '0002.png' in str(told.value) and '0005.png' in str(told.value) and list(out.glob('*.lmdb')) == []
    assert shared_prepare(images, out, Share(0, 3), skip_broken=True).images == 5  # whoever comes first: all is there
    shared_prepare(images, tmp_path / 'whole', skip_broken=True)
    assert databases_in(out) == databases_in(tmp_path / 'whole')


def test_an_image_that_has_changed_is_read_again(images, tmp_path):
    out = tmp_path / 'out'
    assert shared_prepare(images, out, Share(0, 2)) is None
    cv2.imwrite(str(images / '0001.png'), np.zeros((48, 48, 3), np.uint8))
    assert shared_prepare(images, out, Share(1, 2)) is None
    assert shared_prepare(images, out, Share(0, 2)) is not None
    shared_prepare(images, tmp_path / 'whole')
    assert databases_in(out) == databases_in(tmp_path / 'whole')


def compared(images, span, folder, share=None, **options):
    """The table; None where another process writes it, or has."""
    folder.mkdir(exist_ok=True)
    outputs = [folder / 'table.csv', folder / 'table.json']
    with contextlib.suppress(NotLastError):
        return compare(
            {'span': span}, {'a': (images, None), 'b': (images, None)}, rgb=True, outputs=outputs,
            picture=folder / 'details.png', share=share, **options,
        )  # fmt: skip


def test_a_comparison_is_that_of_one_process(images, span, tmp_path, monkeypatch):
    """Every digit of it, and every pixel of its picture."""
    whole = compared(images, span, tmp_path / 'whole')
    measured = []
    measure = comparison_module.measure_fidelity
    monkeypatch.setattr(comparison_module, 'measure_fidelity', lambda *args: measured.append(args) or measure(*args))
    out = tmp_path / 'out'
    assert compared(images, span, out, Share(0, 3)) is None and len(measured) == 5
    assert compared(images, span, out, Share(1, 3)) is None and len(measured) == 10
    assert [path.name for path in out.iterdir()] == ['.table.csv.parts']
    assert compared(images, span, out, Share(0, 1)) == whole and len(measured) == 2 * COUNT
    assert shown_in(out) == files_in(tmp_path / 'whole') and len(shown_in(out)) == 3
    assert compared(images, span, out, Share(4, 5)) is None and len(measured) == 2 * COUNT  # it comes late
    with pytest.raises(InputError, match='exists: choose another name'):
        compare({'span': span}, {'a': (images, None)}, outputs=[out / 'table.csv'], share=Share(0, 2))


def test_other_weights_are_measured_anew(images, span, tmp_path):
    out = tmp_path / 'out'
    assert compared(images, span, out, Share(0, 2)) is None
    torch.manual_seed(1)
    torch.save(SPAN(feature_channels=6, upscale=2, deploy=True).state_dict(), span)
    assert compared(images, span, out, Share(1, 2)) is None
    assert compared(images, span, out, Share(0, 2)) == compared(images, span, tmp_path / 'whole')


def test_a_shared_comparison_names_what_is_left_out(images, span, tmp_path):
    (images / '0002.png').write_bytes(b'no image')
    out = tmp_path / 'out'
    assert compared(images, span, out, Share(0, 2)) is None
    with pytest.raises(InputError, match='2 of 14 images cannot be used, which --skip-broken leaves out'):
        compared(images, span, out, Share(1, 2))
    whole = compared(images, span, tmp_path / 'whole', skip_broken=True)
    assert compared(images, span, out, Share(1, 2), skip_broken=True) == whole
    assert whole.sets == ['a (6 of 7)', 'b (6 of 7)']


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['--set', 's={images}', '-o', '{out}/t.md', '--runtime'], '--share must be left out with --runtime'),
        (['--set', 's={images}'], '--share needs images, by --set, and a file for the table, by --output'),
        (['-o', '{out}/t.md'], '--share needs images, by --set, and a file for the table, by --output'),
    ],
)
def test_comparisons_that_cannot_be_shared(images, span, tmp_path, monkeypatch, capsys, arguments, sentence):
    for name, value in ARRAY.items():
        monkeypatch.setenv(name, value)
    words = [word.format(images=images, out=tmp_path) for word in arguments]
    assert main(['compare', f'span={span}', *words, '--share']) == 2
    assert sentence in capsys.readouterr().err


def test_command_lines_of_an_array(images, span, tmp_path, monkeypatch, capsys):
    commands = {
        'upscale': f'upscale {images} -m {span} -o {tmp_path}/up --share',
        'degrade': f'degrade {images} -o {tmp_path}/lr --scale 2 --share',
        'prepare': f'prepare {images} -o {tmp_path}/db --scale 2 --size 24 --step 12 --share',
        'compare': f'compare span={span} --set s={images} -o {tmp_path}/table.csv --share',
    }
    told = {}
    for task in ('3', '5'):
        array = {**ARRAY, 'SLURM_ARRAY_TASK_ID': task, 'SLURM_ARRAY_TASK_COUNT': '2'}
        for name, value in array.items():
            monkeypatch.setenv(name, value)
        for name, command in commands.items():
            assert main(command.split()) == 0
            told[name, task] = capsys.readouterr().out
    assert '4 images in ' in told['upscale', '3'] and told['upscale', '5'].endswith(', share 2 of 2\n')
    assert told['degrade', '5'] == f'{tmp_path}/lr: 3 images at scale 2, share 2 of 2\n'
    assert (
        told['prepare', '3'] == f'{tmp_path}/db: share 1 of 2 is done; the process that comes last puts all together\n'
    )
    assert 'of 7 images' in told['prepare', '5']
    assert told['compare', '3'] == 'share 1 of 2 is done; the process that comes last writes the table\n'
    (line,) = [line for line in csv.DictReader((tmp_path / 'table.csv').open()) if line['name'] == 'span']
    assert 'bicubic' in told['compare', '5'] and len(list((tmp_path / 'up').iterdir())) == COUNT and line


@pytest.mark.slow
def test_processes_of_torchrun(images, tmp_path):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command = ['-m', 'lora_sr.cli.main', 'prepare', 'images', '--scale', '2', '3', '--size', '24', '--step', '12']
    done = run_python(*launcher, *command, '-o', 'out', '--share', cwd=tmp_path)
    assert 'of 7 images' in done.stdout
    shared_prepare(images, tmp_path / 'whole')
    assert databases_in(tmp_path / 'out') == databases_in(tmp_path / 'whole')
    refused = subprocess.run(
        [sys.executable, *launcher, *command, '-o', 'other'], cwd=tmp_path, env=python_environment(),
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert '--share must be given where torchrun starts 2 processes' in refused.stderr
    assert not Path(tmp_path / 'other').exists()
