"""How the processes of a run were started, and whether the run knows of it."""

from __future__ import annotations

import os

from lora_sr.errors import InputError, shown

# By the value of --launcher: how many processes there are, and what each has to know besides.
VARIABLES = {
    'pytorch': ('WORLD_SIZE', ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')),
    'slurm': ('SLURM_NTASKS', ('SLURM_PROCID', 'SLURM_NODELIST')),
}
STARTED_BY = {'pytorch': 'torchrun', 'slurm': 'srun'}


def processes(launcher: str) -> int:
    """How many processes the run has, on all its machines."""
    variable = VARIABLES.get(launcher, ('', ()))[0]
    return int(os.environ.get(variable, 1))


def check(launcher: str) -> None:
    """Check that ``--launcher`` says how this process was started.

    Raises:
        InputError: It was started by none, or as one of several, each of which would train all of it.
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
        return
    # Of a batch script of slurm's the first variable is not set: there it is one process, whatever was asked for.
    for variable, name in (('SLURM_STEP_NUM_TASKS', 'slurm'), ('WORLD_SIZE', 'pytorch')):
        count = os.environ.get(variable, '1')
        if launcher == 'none' and count.isdecimal() and int(count) > 1:
            raise InputError(
                f'--launcher must be {name} where {STARTED_BY[name]} starts {count} processes, got none: each would '
                f'train all of it, in one folder.'
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
