"""How many threads torch computes with beside other jobs, which it reads when it is loaded.

The threads of OpenMP wait for each other after every operation, and spin meanwhile. Where another job has one of two
processors, a small network is then several times slower; without the thread that shares it, hardly at all.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

VARIABLES = ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'MKL_NUM_THREADS')
STAT = Path('/proc/stat')
LOOK = 0.25  # seconds
_looks = False  # whether it is for this process to choose
_chosen = False


def leave_room() -> None:
    """Set ``OMP_NUM_THREADS`` to the processors that nobody else uses, where somebody uses some.

    It is left alone where the user has set how threads work, where torch has been loaded, where this is one of several
    processes, and where the system does not tell.
    """
    global _chosen, _looks
    several = os.environ.get('WORLD_SIZE', os.environ.get('SLURM_NTASKS', '1')) != '1'
    if 'torch' in sys.modules or several or any(name in os.environ for name in VARIABLES):
        return
    _looks = True
    free, of = _free()
    if free < of:
        os.environ['OMP_NUM_THREADS'] = str(free)
        _chosen = True


def look_again() -> None:
    """Choose again, of what is free by now, while this process waits.

    Nothing changes in a process in which :func:`leave_room` had nothing to choose.
    """
    if _looks and 'torch' in sys.modules:
        free, of = _free()
        if of > 1:
            sys.modules['torch'].set_num_threads(free)


def is_chosen() -> bool:
    """Whether nobody but :func:`leave_room` has said how many threads there are."""
    return _chosen or 'OMP_NUM_THREADS' not in os.environ


def _free() -> tuple[int, int]:
    """How many processors nobody uses just now, at least 1, and of how many; both 1 where the system does not tell."""
    before = _times()
    if len(before) < 2:
        return 1, 1
    time.sleep(LOOK)
    busy = 0.0
    for processor, (idle, total) in _times().items():
        idle, total = idle - before[processor][0], total - before[processor][1]
        busy += 1 - idle / total if total else 0
    return max(1, len(before) - round(busy)), len(before)


def _times() -> dict[int, tuple[int, int]]:
    """Ticks that each processor of this process has been idle, and all its ticks; empty where that is not told."""
    try:
        lines = STAT.read_text().splitlines()
        allowed = os.sched_getaffinity(0)
    except (OSError, AttributeError):  # not Linux
        return {}
    rows = (line.split() for line in lines if line.startswith('cpu') and not line.startswith('cpu '))
    ticks = {int(name[3:]): [int(value) for value in values] for name, *values in rows}
    # Guests are counted as users, too.
    return {name: (sum(values[3:5]), sum(values[:8])) for name, values in ticks.items() if name in allowed}
