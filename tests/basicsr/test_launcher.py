"""A run knows how it was started, and by whom."""

import os
import subprocess
import sys

import pytest

from lora_sr.basicsr import launcher
from lora_sr.errors import InputError

TORCHRUN = {'WORLD_SIZE': '4', 'RANK': '1', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500'}
SRUN = {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '0', 'SLURM_NODELIST': 'node1'}
BATCH = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_NODELIST': 'node1'}  # a script of slurm's, before any srun


STORE = {'TORCHELASTIC_USE_AGENT_STORE': 'True', 'TORCHELASTIC_MAX_RESTARTS': '3'}
OTHERS = ('TORCHELASTIC_RUN_ID', 'SLURM_JOB_ID', 'SLURM_RESTART_COUNT')


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*TORCHRUN, *SRUN, *STORE, *OTHERS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ('environment', 'name', 'count'),
    [
        ({}, 'none', 1),
        (TORCHRUN, 'pytorch', 4),
        ({**TORCHRUN, 'WORLD_SIZE': '1'}, 'none', 1),
        (SRUN, 'slurm', 4),
        (BATCH, 'none', 1),
        ({**SRUN, **TORCHRUN}, 'pytorch', 4),  # torchrun on each of four machines
        ({**TORCHRUN, **STORE, 'TORCHELASTIC_MAX_RESTARTS': '0'}, 'pytorch', 4),
        ({**TORCHRUN, **STORE, 'TORCHELASTIC_USE_AGENT_STORE': 'False'}, 'pytorch', 4),
    ],
)
def test_right_starts(monkeypatch, environment, name, count):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    launcher.check(name)
    assert launcher.processes(name) == count


@pytest.mark.parametrize(
    ('environment', 'name', 'sentence'),
    [
        (TORCHRUN, 'none', '--launcher must be pytorch where torchrun starts 4 processes, got none: each would train'),
        (SRUN, 'none', '--launcher must be slurm where srun starts 4 processes, got none'),
        ({}, 'pytorch', '--launcher pytorch needs a start by torchrun, which sets WORLD_SIZE, RANK, LOCAL_RANK,'),
        (
            {'WORLD_SIZE': '2', 'RANK': '0'},
            'pytorch',
            '.*which sets LOCAL_RANK, MASTER_ADDR, MASTER_PORT; leave it out',
        ),
        (
            {**TORCHRUN, 'WORLD_SIZE': 'x'},
            'pytorch',
            'WORLD_SIZE must be a whole number from 1 to 1000000 for --launcher',
        ),
        ({**TORCHRUN, 'WORLD_SIZE': '0'}, 'pytorch', "WORLD_SIZE must be .*, got '0'"),
        (
            {**TORCHRUN, 'RANK': '4'},
            'pytorch',
            "RANK must be a whole number from 0 to 3 for --launcher pytorch, got '4'",
        ),
        ({**TORCHRUN, 'LOCAL_RANK': ''}, 'pytorch', "LOCAL_RANK must be .*, got ''"),
        ({**TORCHRUN, 'MASTER_PORT': 'x'}, 'pytorch', "MASTER_PORT must be a whole number from 1 to 65535 .*, got 'x'"),
        ({**TORCHRUN, 'MASTER_ADDR': ''}, 'pytorch', 'MASTER_ADDR must be a name for --launcher pytorch, got nothing'),
        (
            {**TORCHRUN, **STORE},
            'pytorch',
            'torchrun --max-restarts needs --rdzv-backend c10d .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1',
        ),
        ({**SRUN, 'SLURM_PROCID': '²'}, 'slurm', "SLURM_PROCID must be a whole number from 0 to 3 .*, got '²'"),
        ({}, 'slurm', '--launcher slurm needs a start by srun, which sets SLURM_NTASKS, SLURM_PROCID, SLURM_NODELIST'),
    ],
)
def test_wrong_starts(monkeypatch, environment, name, sentence):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=sentence):
        launcher.check(name)


def test_nobody_starts_a_run_again_that_he_has_not_begun(monkeypatch, tmp_path):
    assert launcher.all_starters() == []
    assert not launcher.is_started_again(tmp_path, [])
    launcher.record(tmp_path, [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / launcher.RECORD).write_text('no list')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert not launcher.is_started_again(tmp_path, launcher.starters())


def test_one_agent_of_the_launch_is_enough(monkeypatch, tmp_path):
    """The others' machines may be lost; the count of restarts, which differs between agents, does not matter."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    ours = launcher.starters()
    launcher.record(tmp_path, ['torchrun, process 1 of another machine', *ours])
    assert launcher.is_started_again(tmp_path, [*ours, 'torchrun, process 1 of a new machine'])
    assert not launcher.is_started_again(tmp_path, ['torchrun, process 1 of a new machine'])


@pytest.mark.skipif(sys.platform != 'linux', reason='nothing tells when a process was started')
def test_another_process_of_that_number_is_not_the_agent(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    sleepers = [subprocess.Popen(['sleep', '60']) for _ in range(2)]
    try:
        number = sleepers[0].pid
        times = []
        for sleeper in sleepers:
            times.append(launcher._start_time(sleeper.pid))
            ticks = os.sysconf('SC_CLK_TCK')
            seconds = float(open('/proc/uptime').read().split()[0])
            assert abs(int(times[-1]) / ticks - seconds) < 60
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()
    monkeypatch.setattr(os, 'getppid', lambda: number)
    (gone,) = launcher.starters()
    assert gone.endswith(f'process {number} of {os.uname().nodename}, started at an unknown time')


def test_a_job_of_slurm_begins_a_run_anew_unless_it_was_queued_again(monkeypatch, tmp_path):
    """In one allocation a user may begin a run twice."""
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    launcher.record(tmp_path, launcher.all_starters())
    assert not launcher.is_started_again(tmp_path, launcher.starters())
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    assert launcher.is_started_again(tmp_path, launcher.starters())
    monkeypatch.setenv('SLURM_JOB_ID', '8')
    assert not launcher.is_started_again(tmp_path, launcher.starters())
