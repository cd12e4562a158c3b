"""Outputs of a teacher that are made once, against the live teacher."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.data import build_dataset
from basicsr.models import build_model
from test_distillation_model import checkpoints, options  # noqa: F401  (fixtures)
from test_resume import keep, same
from tiny_run import TINY_OPTIONS, python_environment, run_python

from lora_sr.archs import fold
from lora_sr.archs.span import SPAN
from lora_sr.basicsr import precompute as module
from lora_sr.basicsr import signals
from lora_sr.basicsr.integer_images import with_floats
from lora_sr.basicsr.precompute import place_of, precompute, teacher_key, to_stored, upscaler
from lora_sr.checkpoints.content import read_checkpoint
from lora_sr.data import prepare_databases
from lora_sr.data.lmdb_store import LmdbWriter, RawDatabase
from lora_sr.errors import InputError
from lora_sr.files import lock_path

CPU = torch.device('cpu')
STEP = 2 / 65535


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Three pairs as raw databases, of 8 bits."""
    root = tmp_path_factory.mktemp('pairs')
    rng = np.random.default_rng(0)
    (root / 'photos').mkdir()
    for number, size in enumerate([(80, 72), (104, 96), (88, 120)]):
        image = cv2.resize(rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8), size[::-1])
        cv2.imwrite(f'{root}/photos/{number}.png', image)
    prepare_databases([root / 'photos'], root, [2], raw=True, progress=False)
    return root


def copied(pairs, folder):
    """The same in a folder of its own, where outputs may go."""
    for name in ('HR_raw.lmdb', 'LR_bicubic_X2_raw.lmdb'):
        writer = LmdbWriter(folder / name)
        database = RawDatabase(pairs / name)
        for key in database.images:
            writer.put_raw(key, database.view(key)[:, :])
        writer.finish()
    return folder / 'LR_bicubic_X2_raw.lmdb'


def section(root, kind='RawPairedImageDataset'):
    opt = {'name': 'x', 'type': kind, 'phase': 'train', 'scale': 2, 'io_backend': {'type': 'lmdb'}}
    roots = {'dataroot_gt': f'{root}/HR_raw.lmdb', 'dataroot_lq': f'{root}/LR_bicubic_X2_raw.lmdb'}
    return {**opt, **roots, 'gt_size': 24, 'lq_size': 12, 'use_hflip': True, 'use_rot': True}


def make_teacher(seed=0, **changes):
    torch.manual_seed(seed)
    network = fold(SPAN(**{'feature_channels': 8, 'upscale': 2, **changes})).eval()
    last = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    for value in last.parameters():  # as random as they are, its outputs would be far beyond black and white
        value.data.mul_(0.05)
    return network


def values_of(path, key):
    """What is stored, as a model gets it: (1, C, H, W)."""
    stored = RawDatabase(path).view(key)[:, :]
    return with_floats({'taught': torch.from_numpy(stored.copy()).permute(2, 0, 1)[None]}, CPU)['taught']


def live(teacher, root, key, self_ensemble):
    """In float64 by torch alone: the mean over the symmetries of the square."""
    image = torch.from_numpy(RawDatabase(root).view(key)[:, :].copy()).permute(2, 0, 1)[None].double() / 255
    teacher, outputs = copy.deepcopy(teacher).double(), []
    with torch.no_grad():
        for transpose in (False, True):
            for axes in ([], [2], [3], [2, 3]):
                given = image.transpose(2, 3) if transpose else image
                output = teacher(given.flip(axes)).flip(axes)
                outputs.append(output.transpose(2, 3) if transpose else output)
    return sum(outputs) / 8 if self_ensemble else outputs[0]


@pytest.mark.parametrize('self_ensemble', [False, True])
def test_outputs_are_those_of_the_live_teacher(pairs, tmp_path, self_ensemble):
    root, teacher = copied(pairs, tmp_path), make_teacher()
    path = place_of(root, teacher_key(teacher.state_dict(), {}, self_ensemble))
    precompute(teacher, root, path, 2, self_ensemble)
    assert list(RawDatabase(path).images) == ['0', '1', '2'] and not list(tmp_path.glob('.*'))
    for key in '012':
        expected = live(teacher, root, key, self_ensemble)
        assert (
            expected.std() > 0.1 and expected.min() < 0 and ((expected > -0.5) & (expected < 1.5)).float().mean() > 0.8
        )
        assert (values_of(path, key).double() - expected.clamp(-0.5, 1.5)).abs().max() < STEP / 2 + 1e-5


def test_what_is_stored_is_rounded_to_the_nearest():
    values = np.array([-3, -0.5, -0.1, 0, 0.3, 1, 1.2, 1.5, 9], np.float32)
    taught = torch.from_numpy(to_stored(values).astype(np.int32)).double() * STEP - 0.5
    assert np.abs(taught.numpy() - np.clip(values, -0.5, 1.5)).max() <= STEP / 2 * 1.01


def test_a_teacher_or_images_that_change_have_outputs_of_their_own(pairs, tmp_path):
    root, teacher = copied(pairs, tmp_path), make_teacher()
    state = teacher.state_dict()
    first = teacher_key(state, {'type': 'SPAN'}, False)
    keys = [
        first,
        teacher_key(make_teacher(1).state_dict(), {'type': 'SPAN'}, False),
        teacher_key(state, {'type': 'SPAN', 'img_range': 2}, False),
        teacher_key(state, {'type': 'SPAN'}, True),
    ]
    places = {place_of(root, key) for key in keys}
    assert len(places) == 4 and place_of(root, teacher_key(dict(state), {'type': 'SPAN'}, False)) in places
    (root / 'meta_info.txt').write_text((root / 'meta_info.txt').read_text()[:-9] + '00000000\n')
    assert place_of(root, first) not in places


@pytest.mark.parametrize('kind', ['RawPairedImageDataset', 'RawLRImageDataset'])
def test_patches_of_outputs_are_where_the_images_patches_are(pairs, tmp_path, kind):
    """Outputs that are the LR image, each pixel four times, turn and move as it does."""
    root = copied(pairs, tmp_path)
    writer, database = LmdbWriter(tmp_path / 'taught.lmdb'), RawDatabase(root)
    for key in database.images:
        writer.put_raw(key, np.kron(database.view(key)[:, :], np.ones((2, 2, 1), np.uint8)).astype(np.uint16) * 257)
    writer.finish()
    plain, dataset = build_dataset(section(tmp_path, kind)), build_dataset(section(tmp_path, kind))
    dataset.teach({str(root): str(tmp_path / 'taught.lmdb')})
    for seed in range(60):
        items = []
        for given in (plain, dataset):
            random.seed(seed)
            np.random.seed(seed)
            items.append(given[seed % 3])
        taught = items[1].pop('taught')
        assert all(same(items[0][key], items[1][key]) for key in items[0]) and len(items[0]) == len(items[1])
        expected = items[1]['lq'].repeat_interleave(2, 1).repeat_interleave(2, 2).int() * 257
        assert taught.shape == (3, 24, 24) and torch.equal(taught.int(), expected)


@pytest.mark.parametrize('affinity', [False, True])
def test_a_step_learns_from_them(options, pairs, tmp_path, affinity):  # noqa: F811
    copied(pairs, tmp_path)
    options['network_t'].update(precompute=True, self_ensemble=True)
    options['datasets']['train'] = section(tmp_path)
    if not affinity:
        del options['train']['affinity_opt']
    model = build_model(copy.deepcopy(options))
    dataset = build_dataset(section(tmp_path))
    model.teach(dataset)
    assert hasattr(model, 'net_t') == affinity
    (path,) = tmp_path.glob('LR_bicubic_X2_raw_taught_*.lmdb')
    random.seed(1)
    item = dataset[1]
    batch = {key: value[None] for key, value in item.items() if torch.is_tensor(value)}
    model.feed_data(batch)
    before = model.net_g(model.lq)
    model.optimize_parameters(1)
    taught = batch['taught'].double() * STEP - 0.5
    expected = 2 * (before.double() - taught).square().mean()
    assert model.log_dict['l_distill'] == pytest.approx(expected.item(), rel=1e-5)
    whole = values_of(path, '1')
    assert whole.min() - 1e-6 <= taught.min() and taught.max() <= whole.max() + 1e-6
    assert ('l_affinity' in model.log_dict) == affinity
    model.feed_data({key: batch[key] for key in ('lq', 'gt')})  # as in a validation
    with pytest.raises(InputError, match=r'network_t.precompute needs samples .*call teach\(dataset\) of the model'):
        model.optimize_parameters(2)


@pytest.mark.parametrize(
    ('teacher', 'scale', 'sentence'),
    [
        ({}, 3, 'network_t.precompute needs a teacher of scale 3, the scale of the file, got 2'),
        (
            {'num_in_ch': 1, 'num_out_ch': 1},
            2,
            'network_t.precompute needs images of 1 channels, as the teacher takes them, got 3 in 0 of ',
        ),
    ],
)
def test_a_teacher_that_does_not_fit(pairs, tmp_path, teacher, scale, sentence):
    root = copied(pairs, tmp_path)
    with pytest.raises(InputError, match=sentence):
        precompute(make_teacher(**teacher), root, tmp_path / 'out.lmdb', scale, False)
    assert not (tmp_path / 'out.lmdb').exists() and not list(tmp_path.glob('.*'))


def test_a_disk_that_is_too_small(pairs, tmp_path, monkeypatch):
    root = copied(pairs, tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=3 << 14))
    with pytest.raises(
        InputError, match='network_t.precompute needs 0.0 GB beside .* for the outputs of the teacher, got 0.0'
    ):
        precompute(make_teacher(), root, tmp_path / 'out.lmdb', 2, False)
    assert not (tmp_path / 'out.lmdb').exists()


@pytest.mark.parametrize('reason', ['a signal', 'its minutes'])
def test_it_ends_between_two_images(pairs, tmp_path, monkeypatch, capsys, reason):
    root, whole = copied(pairs, tmp_path), tmp_path / 'out.lmdb'
    seen = []

    def stored(output):
        seen.append(output)
        if reason == 'a signal':
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.is_told():  # its handler runs in the main thread
                time.sleep(0.01)
        else:
            monkeypatch.setattr(signals, '_began', time.monotonic() - 61)
        return to_stored(output)

    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    signals.begin()
    signals.listen(minutes=1)
    monkeypatch.setattr('lora_sr.basicsr.precompute.to_stored', stored)
    try:
        with pytest.raises(SystemExit):
            precompute(make_teacher(), root, whole, 2, False)
    finally:
        signals.ignore()
    name = {'a signal': 'SIGTERM', 'its minutes': 'train.max_minutes'}[reason]
    told = f'stopped by {name}: 1 of 3 outputs of the teacher are stored; the same command goes on'
    assert told in capsys.readouterr().err
    assert len(seen) == 1 and not whole.exists()
    monkeypatch.undo()
    precompute(make_teacher(), root, whole, 2, False)
    assert len(RawDatabase(whole).images) == 3


# A process is forked for each moment, and kills itself at that call of a function.
KILL = """
import os, signal, sys
import lora_sr
import basicsr
import torch
torch.set_num_threads(1)
from lora_sr.basicsr import precompute as p
from test_precompute import make_teacher
from pathlib import Path

def at_call(function, number):
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

root, folder, *moments = sys.argv[1:]
for moment in moments:
    pid = os.fork()
    if not pid:
        name, number = moment.split('-')
        owner = {'rename': os, 'replace': os, 'fsync': os, 'add': p.Outputs, 'finish': p.Outputs}.get(name, p)
        setattr(owner, name, at_call(getattr(owner, name), int(number)))
        p.precompute(make_teacher(), root, Path(folder, f'{moment}.lmdb'), 2, False)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, moment
"""
MOMENTS = {
    **{'to_stored-1': 0, 'to_stored-3': 2, 'fsync-2': 1, 'replace-1': 0, 'replace-2': 1},  # of the outputs
    **{'add-1': 3, 'raw_values-3': 3, 'finish-1': 3, 'replace-4': 3, 'rename-1': 3},  # of the database
}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_run_goes_on(pairs, tmp_path, caplog):
    root = copied(pairs, tmp_path)
    precompute(make_teacher(), root, tmp_path / 'whole.lmdb', 2, False)
    environment = {**python_environment(), 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, '-c', KILL, root, tmp_path, *MOMENTS], check=True, env=environment)
    for moment, done in MOMENTS.items():
        path = tmp_path / f'{moment}.lmdb'
        assert not path.exists(), moment
        caplog.clear()
        with caplog.at_level('INFO', logger='basicsr'):
            precompute(make_teacher(), root, path, 2, False)
        assert f'The teacher: {3 - done} of 3 images of' in caplog.text, moment
        assert (path / 'meta_info.txt').read_bytes() == (tmp_path / 'whole.lmdb/meta_info.txt').read_bytes()
        for key in '012':
            given, expected = (RawDatabase(folder).view(key)[:, :] for folder in (path, tmp_path / 'whole.lmdb'))
            assert np.array_equal(given, expected), moment
    assert not list(tmp_path.glob('.*'))


def test_a_kill_behind_the_last_move_leaves_nothing(pairs, tmp_path, monkeypatch):
    root, path = copied(pairs, tmp_path), tmp_path / 'out.lmdb'
    monkeypatch.setattr(module._Work, 'clear', lambda self: None)
    precompute(make_teacher(), root, path, 2, False)
    assert list(tmp_path.glob('.*'))
    monkeypatch.undo()
    precompute(make_teacher(), root, path, 2, False)
    assert len(RawDatabase(path).images) == 3 and not list(tmp_path.glob('.*'))


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A raw database of ten images, and what is called for each output that is made: a list of keys."""
    rng = np.random.default_rng(1)
    writer, made = LmdbWriter(tmp_path / 'LR_raw.lmdb'), []
    for number in range(10):
        writer.put_raw(f'{number:02}', rng.integers(0, 256, (14 + number, 20, 3), np.uint8))
    writer.finish()

    def noted(*args):
        make = upscaler(*args)
        return lambda key: made.append(key) or make(key)

    monkeypatch.setattr(module, 'upscaler', noted)
    monkeypatch.setattr(module, 'SECONDS_OF_WAITING', 0.01)
    return tmp_path / 'LR_raw.lmdb', made


def contents(path):
    """All of a database."""
    database = RawDatabase(path)
    images = {key: database.view(key)[:, :].tobytes() for key in database.images}
    return (path / 'meta_info.txt').read_bytes(), images


def start(root, path, teacher=None):
    """As another machine would: in a thread, since locks are between open files."""
    return ThreadPoolExecutor(1).submit(precompute, teacher or make_teacher(), root, path, 2, False)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_machines_share_the_images_and_make_each_once(many, tmp_path):
    root, made = many
    precompute(make_teacher(), root, tmp_path / 'whole.lmdb', 2, False)
    assert sorted(made) == [f'{number:02}' for number in range(10)]
    made.clear()
    for machine in [start(root, tmp_path / 'out.lmdb') for _ in range(3)]:
        machine.result(60)
    assert sorted(made) == [f'{number:02}' for number in range(10)]
    assert contents(tmp_path / 'out.lmdb') == contents(tmp_path / 'whole.lmdb') and not list(tmp_path.glob('.*'))


def test_an_image_that_another_machine_is_at_is_waited_for_and_made_if_that_dies(many, tmp_path):
    root, made = many
    folder = tmp_path / '.out.lmdb.partial'
    folder.mkdir()
    (folder / '4.lock').touch()
    lock = lock_path(folder / '4.lock')
    machine = start(root, tmp_path / 'out.lmdb')
    wait_for(lambda: len(list(folder.glob('*.npy'))) == 9)
    time.sleep(0.1)
    assert '04' not in made and not machine.done()
    os.close(lock)
    machine.result(60)
    assert made[-1] == '04' and len(RawDatabase(tmp_path / 'out.lmdb').images) == 10


def test_without_locks_the_first_process_makes_the_database(many, tmp_path, monkeypatch):
    root, made = many
    teacher = make_teacher()
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    monkeypatch.setattr(module, 'lock_path', lambda path: None)
    monkeypatch.setattr(module, 'get_dist_info', lambda: (1, 2))
    second = start(root, tmp_path / 'out.lmdb', teacher)
    wait_for(lambda: len(list(tmp_path.glob('.out.lmdb.partial/*.npy'))) == 10)
    time.sleep(0.1)
    assert made[:5] == ['01', '03', '05', '07', '09'] and not second.done()  # its share first
    monkeypatch.setattr(module, 'get_dist_info', lambda: (0, 2))
    precompute(teacher, root, tmp_path / 'out.lmdb', 2, False)
    second.result(60)
    assert len(made) == 10 and len(RawDatabase(tmp_path / 'out.lmdb').images) == 10


# A training of which a process kills itself in the middle of an output, and that notes what is made.
PROCESS = """
import os, signal, sys, time
import lora_sr
import basicsr
from lora_sr.basicsr import precompute as module
made, upscaler, rank = [], module.upscaler, os.environ.get('RANK', '0')

def noted(*args):
    make = upscaler(*args)
    def output(key):
        made.append(key)
        time.sleep(float(os.environ['SECONDS']))
        if os.environ.get('KILLED') == rank and len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get('KILLED') == '1' and rank == '0' and len(made) > 1:
            while not os.path.exists('made') or '1 ' not in open('made').read():  # the other one may begin late
                time.sleep(0.1)
            time.sleep(1)  # so that something is left when torchrun sees that it has died
        result = make(key)
        with open('made', 'a') as file:
            file.write(f'{rank} {key}\\n')
        return result
    return output

module.upscaler = noted
from lora_sr.cli.main import run_pipeline
sys.exit(run_pipeline(is_train=True))
"""


@pytest.mark.slow
def test_processes_of_torchrun_share_the_images_and_one_that_dies_is_made_good(many, tmp_path):
    root, _ = many
    torch.manual_seed(0)
    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    opt = yaml.safe_load(TINY_OPTIONS.format(root=tmp_path, suffix='', backend='lmdb').replace('1e-3', '0.001'))
    train = {**opt['datasets']['train'], 'type': 'RawLRImageDataset', 'dataroot_lq': str(root), 'lq_size': 12}
    for key in ('dataroot_gt', 'gt_size'):
        del train[key]
    opt.update(model_type='DistillationModel', val=None, datasets={'train': train})
    opt['network_t'] = {'type': 'SPAN', 'feature_channels': 8, 'upscale': 2, 'precompute': True}
    opt['path'].update(pretrain_network_t='teacher.pth')
    del opt['train']['pixel_opt']
    opt['train'].update(distill_pixel_opt={'type': 'L1Loss'}, total_iter=2, max_minutes=1000)
    (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(opt))
    (tmp_path / 'process.py').write_text(PROCESS)

    def run(count, killed='', status=0, seconds=0, more=()):
        launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(count)]
        done = subprocess.run(
            [*launcher, 'process.py', '-opt', 'tiny.yml', '--launcher', 'pytorch', *more], cwd=tmp_path,
            env={**python_environment(), 'KILLED': killed, 'SECONDS': str(seconds)}, capture_output=True, text=True,
            timeout=900,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr, (tmp_path / 'made').read_text().split('\n')[:-1]

    told, first = run(2, killed='1', status=1)
    assert 'exitcode  : -9' in told and not list(tmp_path.glob('LR_raw_taught_*.lmdb'))
    stored = len(list(tmp_path.glob('.LR_raw_taught_*.partial/*.npy')))
    assert [line[0] for line in first].count('1') == 1 and stored == len(first) <= 9
    told, more = run(2, seconds=4, more=['--force_yml', 'train:max_minutes=0.15'])
    left = 10 - (stored + len(more) - len(first))
    assert f'stopped by train.max_minutes: {10 - left} of 10 outputs of the teacher are stored' in told and left > 0
    lines = [json.loads(line) for line in (tmp_path / 'experiments/tiny/metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['stopped'] == 'train.max_minutes'
    (log,) = (tmp_path / 'experiments/tiny').glob('train_tiny_*.log')
    assert 'Stopped by train.max_minutes before the first iteration.' in log.read_text()
    _, all_made = run(3)
    assert len(all_made) - len(more) == left
    (path,) = tmp_path.glob('LR_raw_taught_*.lmdb')
    teacher = SPAN(feature_channels=8, upscale=2)
    teacher.load_state_dict(torch.load(tmp_path / 'teacher.pth')['params'])
    precompute(fold(teacher).eval(), root, tmp_path / 'whole.lmdb', 2, False)
    assert contents(path) == contents(tmp_path / 'whole.lmdb') and not list(tmp_path.glob('.LR*'))


@pytest.mark.slow
def test_a_run_that_stopped_equals_one_that_did_not(pairs, tmp_path):
    """Of 6 iterations, 3 and 3; the second begins with the outputs that the first has made."""
    copied(pairs, tmp_path)
    torch.manual_seed(0)
    torch.save({'params': SPAN(feature_channels=8, upscale=2).state_dict()}, tmp_path / 'teacher.pth')
    opt = yaml.safe_load(TINY_OPTIONS.format(root=tmp_path, suffix='', backend='disk').replace('1e-3', '0.001'))
    opt.update(model_type='DistillationModel', val=None)
    opt['datasets'] = {'train': {**opt['datasets']['train'], **section(tmp_path), 'phase': None}}
    del opt['datasets']['train']['phase'], opt['datasets']['train']['scale'], opt['datasets']['train']['lq_size']
    opt['network_t'] = {'type': 'SPAN', 'feature_channels': 8, 'upscale': 2, 'precompute': True}
    opt['path'].update(pretrain_network_t='teacher.pth')
    opt['train']['distill_pixel_opt'] = {'type': 'L1Loss'}
    opt['logger']['save_checkpoint_freq'] = 3
    (tmp_path / 'tiny.yml').write_text(yaml.safe_dump(opt))
    command = ('-m', 'lora_sr.train', '-opt', 'tiny.yml')
    told = run_python(*command, '--force_yml', 'name=whole', cwd=tmp_path)
    assert 'The teacher: 3 of 3 images' in told.stdout + told.stderr
    keep(tmp_path / 'experiments/whole', tmp_path / 'experiments/tiny', 3)
    told = run_python(*command, '--auto_resume', '--force_yml', 'datasets:train:num_worker_per_gpu=2', cwd=tmp_path)
    assert 'The teacher: ' not in told.stdout + told.stderr
    for name in ('models/net_g_latest.pth', 'training_states/6.state'):
        contents = [dict(read_checkpoint(tmp_path / f'experiments/{run}' / name)) for run in ('whole', 'tiny')]
        for content in contents:
            content.pop('lora_sr')
        assert same(*contents), name
