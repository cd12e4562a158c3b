"""A run knows how it was started."""

import pytest

from lora_sr.basicsr import launcher
from lora_sr.errors import InputError

TORCHRUN = {'WORLD_SIZE': '4', 'RANK': '1', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500'}
SRUN = {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4', 'SLURM_PROCID': '0', 'SLURM_NODELIST': 'node1'}
BATCH = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_NODELIST': 'node1'}  # a script of slurm's, before any srun


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in {**TORCHRUN, **SRUN}:
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
        ({**SRUN, 'SLURM_PROCID': '²'}, 'slurm', "SLURM_PROCID must be a whole number from 0 to 3 .*, got '²'"),
        ({}, 'slurm', '--launcher slurm needs a start by srun, which sets SLURM_NTASKS, SLURM_PROCID, SLURM_NODELIST'),
    ],
)
def test_wrong_starts(monkeypatch, environment, name, sentence):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=sentence):
        launcher.check(name)
