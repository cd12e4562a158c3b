"""Runs of several machines that lose a process or their time, and end as if they had not: the launchers in `scripts/`.

Two agents of torchrun stand for two machines, and programs that do what slurm's do for slurm.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY, TINY_OPTIONS, python_environment

from lora_sr.checkpoints.content import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='it looks for processes in /proc')]

SECONDS = 300  # machines differ, and may be busy
TOTAL, SAVED = 120, 20  # iterations, and those between two states
SBATCH = """
import json, os, subprocess, sys
with open('calls', 'a') as calls:
    calls.write(json.dumps(['sbatch', *sys.argv[1:]]) + '\\n')
script = next(number for number, word in enumerate(sys.argv) if word.endswith('slurm_train.sh'))
job = subprocess.Popen(['bash', *sys.argv[script:]], env={**os.environ, 'SLURM_JOB_ID': '7'})
open('job', 'w').write(str(job.pid))
sys.exit(job.wait())
"""
SRUN = """
import json, os, signal, subprocess, sys
with open('calls', 'a') as calls:
    calls.write(json.dumps(['srun', *sys.argv[1:]]) + '\\n')
command = [sys.executable, *sys.argv[sys.argv.index('python') + 1 :]]
count = sys.argv[sys.argv.index('--ntasks') + 1]
shared = {**os.environ, 'SLURM_NTASKS': count, 'SLURM_STEP_NUM_TASKS': count, 'SLURM_NODELIST': 'localhost'}
tasks = [
    subprocess.Popen(command, env={**shared, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)})
    for rank in range(int(count))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """
import json, os, subprocess, sys
with open('calls', 'a') as calls:
    calls.write(json.dumps(['scontrol', *sys.argv[1:]]) + '\\n')
if sys.argv[1] == 'show':
    print('localhost')
else:
    given = next(json.loads(line) for line in open('calls') if line.startswith('["sbatch"'))
    script = next(number for number, word in enumerate(given) if word.endswith('slurm_train.sh'))
    os.execvpe('bash', ['bash', *given[script:]], {**os.environ, 'SLURM_RESTART_COUNT': '1'})
"""


def free_port():
    with socket.socket() as one:
        one.bind(('localhost', 0))
        return str(one.getsockname()[1])


@pytest.fixture
def environment(tmp_path):
    """That of a run, with this interpreter and its torchrun first, and slurm's programs."""
    programs = tmp_path / 'programs'
    programs.mkdir()
    for name, text in (('sbatch', SBATCH), ('srun', SRUN), ('scontrol', SCONTROL)):
        (programs / name).write_text(f'#!{sys.executable}{text}')
        (programs / name).chmod(0o755)
    environment = {**python_environment(), 'OMP_WAIT_POLICY': 'passive', 'MASTER_PORT': free_port()}
    for name in [name for name in environment if name.startswith(('SLURM_', 'TORCHELASTIC_'))]:
        del environment[name]
    environment['PATH'] = os.pathsep.join([str(programs), str(Path(sys.executable).parent), environment['PATH']])
    return environment


def write_options(folder, pairs):
    text = TINY_OPTIONS.format(root=pairs, suffix='', backend='disk')
    for before, after in (
        ('total_iter: 6', f'total_iter: {TOTAL}'),
        ('save_checkpoint_freq: 2', f'save_checkpoint_freq: {SAVED}'),
        ('val_freq: 4', 'val_freq: 1000'),
        ('ratio: 10', 'ratio: 40'),  # more than an epoch
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / 'tiny.yml').write_text(text)


@pytest.fixture(scope='module')
def undisturbed(pairs, tmp_path_factory):
    """The folder of a run of two processes on one machine."""
    folder = tmp_path_factory.mktemp('undisturbed')
    write_options(folder, pairs)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    command = ['bash', str(REPOSITORY / 'scripts/dist_train.sh'), '2', 'tiny.yml']
    environment = {**python_environment(), 'PATH': path, 'OMP_WAIT_POLICY': 'passive'}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return folder / 'experiments/tiny'


def wait_for(condition, processes=()):
    """Wait until it is true, and return what it is."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    return condition()


def process_of_rank(rank, agents):
    """The process of that rank among those that these have started."""
    for agent in agents:
        for child in Path(f'/proc/{agent.pid}/task/{agent.pid}/children').read_text().split():
            if f'RANK={rank}' in Path(f'/proc/{child}/environ').read_text().split('\0'):
                return int(child)
    raise AssertionError(rank)


def assert_same_weights(run, other):
    for name in ('net_g_latest.pth', f'net_g_{TOTAL}.pth'):
        ours, theirs = (read_checkpoint(folder / 'models' / name)['params'] for folder in (run, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_lost_process_is_made_good(pairs, undisturbed, environment, tmp_path):
    """By torchrun alone; what an earlier launch has left under that name is no part of it."""
    write_options(tmp_path, pairs)
    run = tmp_path / 'experiments/tiny'
    shutil.copytree(undisturbed, run)
    environment.update(NODES='2', HOST='localhost', PORT=free_port())
    command = ['bash', str(REPOSITORY / 'scripts/dist_train.sh'), '1', 'tiny.yml']
    logs = [open(tmp_path / f'log{number}', 'w') for number in range(2)]
    agents = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) for log in logs]
    try:
        wait_for(lambda: not (run / f'models/net_g_{TOTAL}.pth').exists(), agents)  # the earlier one has been moved
        wait_for((run / f'training_states/{2 * SAVED}.state').exists, agents)
        os.kill(process_of_rank(0, agents), signal.SIGKILL)
        texts = [(tmp_path / f'log{number}').read_text for number in range(2)]
        assert [agent.wait(timeout=SECONDS) for agent in agents] == [0, 0], texts[0]() + texts[1]()
    finally:
        for agent, log in zip(agents, logs):
            agent.kill()
            log.close()
    told = texts[0]() + texts[1]()
    begun = sorted(map(int, re.findall(r'Start training from epoch: \d+, iter: (\d+)', told)))
    assert begun[0] == 0 and len(begun) == 2 and begun[1] >= 2 * SAVED and 'exitcode: -9' in told
    assert_same_weights(run, undisturbed)
    assert len(list(run.parent.iterdir())) == 2  # itself, and the earlier one


def test_a_job_of_slurm_goes_on_when_it_is_queued_again(pairs, undisturbed, environment, tmp_path):
    write_options(tmp_path, pairs)
    run = tmp_path / 'experiments/tiny'
    shutil.copytree(undisturbed, run)
    environment.update(CPUS_PER_TASK='1', SBATCH_ARGS='--time=4:00:00')
    command = ['bash', str(REPOSITORY / 'scripts/slurm_train.sh'), 'gpu', 'job', '2', 'tiny.yml']
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        wait_for(lambda: not (run / f'models/net_g_{TOTAL}.pth').exists(), [process])
        wait_for((run / f'training_states/{SAVED}.state').exists, [process])
        os.kill(int((tmp_path / 'job').read_text()), signal.SIGUSR1)
        status = process.wait(timeout=SECONDS)
    told = (tmp_path / 'log').read_text()
    assert status == 0, told
    assert told.count('stopped by SIGUSR1: iteration') == 1 and told.count('Resuming training from epoch') == 1
    assert_same_weights(run, undisturbed)
    calls = [json.loads(line) for line in (tmp_path / 'calls').read_text().splitlines()]
    assert [call[0] for call in calls if call[1] != 'show'] == ['sbatch', 'srun', 'scontrol', 'srun']
    submitted = ' '.join(calls[0])
    for words in (
        '--partition gpu --job-name job --gres gpu:2 --ntasks 2 --ntasks-per-node 2 --cpus-per-task 1',
        '--requeue --open-mode append --signal B:USR1@120 --time=4:00:00',
        'scripts/slurm_train.sh gpu job 2 tiny.yml',
    ):
        assert words in submitted
    assert ['scontrol', 'requeue', '7'] in calls


def test_a_job_of_slurm_that_fails_is_not_queued_again(environment, tmp_path):
    (tmp_path / 'programs/srun').write_text('#!/bin/sh\nexit 2\n')
    command = ['bash', str(REPOSITORY / 'scripts/slurm_train.sh'), 'gpu', 'job', '1', 'tiny.yml']
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=SECONDS).returncode == 2
    assert 'scontrol' not in (tmp_path / 'calls').read_text()


@pytest.mark.parametrize(
    ('script', 'arguments', 'given', 'sentence'),
    [
        ('dist_train.sh', ['2'], {}, 'Usage: scripts/dist_train.sh PROCESSES OPTION_FILE'),
        (
            'slurm_train.sh',
            ['gpu', 'job', '2'],
            {},
            'Usage: scripts/slurm_train.sh PARTITION JOB_NAME GPUS OPTION_FILE',
        ),
        ('dist_train.sh', ['2', 'tiny.yml'], {'NODES': '2'}, 'error: HOST must be the name of a machine where NODES=2'),
    ],
)
def test_wrong_calls(environment, tmp_path, script, arguments, given, sentence):
    command = ['bash', str(REPOSITORY / 'scripts' / script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={**environment, **given}, capture_output=True, text=True)
    assert done.returncode == 2 and sentence in done.stderr
