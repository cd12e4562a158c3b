"""How the processes of a run were started, and whether the run knows of it."""

from __future__ import annotations

import os

from lora_sr.errors import InputError

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
        return
    # Of a batch script of slurm's the first variable is not set: there it is one process, whatever was asked for.
    for variable, name in (('SLURM_STEP_NUM_TASKS', 'slurm'), ('WORLD_SIZE', 'pytorch')):
        count = os.environ.get(variable, '1')
        if launcher == 'none' and count.isdecimal() and int(count) > 1:
            raise InputError(
                f'--launcher must be {name} where {STARTED_BY[name]} starts {count} processes, got none: each would '
                f'train all of it, in one folder.'
            )
