"""How the processes of a run were started, whether the run knows of it, and whether they take the place of lost ones.

When a process is lost, torchrun starts all of them anew, and slurm the whole job: with the same command, which may not
begin the run anew then. That ``TORCHELASTIC_RESTART_COUNT`` is above 0 does not tell: each agent of torchrun counts for
itself, and does not where the loss is another's. But who starts a process is still there when it does so again, so
that a run's folder names them, and a start by one of these goes on with the run. A start by anybody else does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from lora_sr.errors import InputError, shown
from lora_sr.files import write_whole

Value = TypeVar('Value')

# By the value of --launcher: how many processes there are, and what each has to know besides.
VARIABLES = {
    'pytorch': ('WORLD_SIZE', ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')),
    'slurm': ('SLURM_NTASKS', ('SLURM_PROCID', 'SLURM_NODELIST')),
}
STARTED_BY = {'pytorch': 'torchrun', 'slurm': 'srun'}
RECORD = 'started_by.json'  # in the folder of a run


def processes(launcher: str) -> int:
    """How many processes the run has, on all its machines."""
    variable = VARIABLES.get(launcher, ('', ()))[0]
    return int(os.environ.get(variable, 1))


def check(launcher: str) -> None:
    """Check that ``--launcher`` says how this process was started.

    Raises:
        InputError: It was started by none, or as one of several, each of which would train all of it; or by a
            torchrun whose processes would wait for ever when they are started again.
    """
    if launcher in VARIABLES:
        size, others = VARIABLES[launcher]
        missing = [name for name in (size, *others) if name not in os.environ]
        if missing:
            raise InputError(
                f'--launcher {launcher} needs a start by {STARTED_BY[launcher]}, which sets {", ".join(missing)}; '
                f'leave it out to train in one process.'
            )
        _check_numbers(launcher)
        if launcher == 'pytorch':
            _check_restarts()
        return
    # Of a batch script of slurm's the first variable is not set: there it is one process, whatever was asked for.
    for variable, name in (('SLURM_STEP_NUM_TASKS', 'slurm'), ('WORLD_SIZE', 'pytorch')):
        count = os.environ.get(variable, '1')
        if launcher == 'none' and count.isdecimal() and int(count) > 1:
            raise InputError(
                f'--launcher must be {name} where {STARTED_BY[name]} starts {count} processes, got none: each would '
                f'train all of it, in one folder.'
            )


def starters() -> list[str]:
    """Who has started this process and would start it again: an agent of torchrun, a job of slurm, or nobody."""
    found = []
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        agent = os.getppid()
        found.append(f'torchrun, process {agent} of {socket.gethostname()}, started at {_start_time(agent)}')
    if 'SLURM_JOB_ID' in os.environ:
        found.append(f'slurm, job {os.environ["SLURM_JOB_ID"]}')
    return found


def is_started_again(folder: str | os.PathLike[str], by: list[str]) -> bool:
    """Whether processes that these have started take the place of others, of a run in that folder."""
    recorded: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        recorded = json.loads(Path(folder, RECORD).read_text('utf-8'))
    # Within one job of slurm's a user may start as many runs as he likes, unless slurm has queued it again.
    was_queued_again = os.environ.get('SLURM_RESTART_COUNT', '0') != '0'
    return any(one in recorded and (was_queued_again or one.startswith('torchrun')) for one in by)


def record(folder: str | os.PathLike[str], by: list[str]) -> None:
    """Note in the folder of a run who has started its processes, if anybody would do so again."""
    if by:
        write_whole(Path(folder, RECORD), json.dumps(by, indent=1).encode())


def all_starters() -> list[str]:
    """Those of all processes of the run, which all of them have to ask for."""
    found = [starters()]
    if dist.is_available() and dist.is_initialized():
        found = [[]] * dist.get_world_size()
        dist.all_gather_object(found, starters())
    return sorted(set().union(*found))


def of_first(value: Value) -> Value:
    """What the first process of the run gives, for all; drives of a network do not show everybody the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _start_time(process: int) -> str:
    """When a process was started, in ticks of the kernel: its number alone is given again one day."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]
    except OSError:  # not Linux
        return 'an unknown time'


def _check_restarts() -> None:
    """Refuse what makes a restart hang: what the first processes left in the store that torchrun keeps for them.

    See pytorch's issue 135712.
    """
    keeps_store = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    if keeps_store and os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0':
        raise InputError(
            'torchrun --max-restarts needs --rdzv-backend c10d (or --standalone), and in its environment '
            'TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as scripts/dist_train.sh has it: processes that are started again '
            'would wait for ever.'
        )


def _check_numbers(launcher: str) -> None:
    """Check the variables that are numbers: those of a process count below their number, and a port is one."""
    size, others = VARIABLES[launcher]
    count = _number(launcher, size, 1)
    for name in others:
        if name.endswith(('RANK', 'PROCID')):
            _number(launcher, name, 0, count - 1)
        elif name.endswith('PORT'):
            _number(launcher, name, 1, 65535)
        elif not os.environ[name]:
            raise InputError(f'{name} must be a name for --launcher {launcher}, got nothing.')


def _number(launcher: str, name: str, least: int, most: int = 10**6) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal() and least <= int(text[:9]) <= most):
        raise InputError(
            f'{name} must be a whole number from {least} to {most} for --launcher {launcher}, got {shown(repr(text))}.'
        )
    return int(text)
