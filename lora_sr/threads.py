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
_chosen = False


def leave_room() -> None:
    """Set ``OMP_NUM_THREADS`` to the processors that nobody else uses, where somebody uses some.

    It is left alone where the user has set how threads work, where torch has been loaded, where this is one of several
    processes, and where the system does not tell.
    """
    global _chosen
    several = os.environ.get('WORLD_SIZE', os.environ.get('SLURM_NTASKS', '1')) != '1'
    if 'torch' in sys.modules or several or any(name in os.environ for name in VARIABLES):
        return
    before = _times()
    if len(before) < 2:
        return
    time.sleep(LOOK)
    busy = 0.0
    for processor, (idle, total) in _times().items():
        idle, total = idle - before[processor][0], total - before[processor][1]
        busy += 1 - idle / total if total else 0
    others = round(busy)
    if others:
        os.environ['OMP_NUM_THREADS'] = str(max(1, len(before) - others))
        _chosen = True


def is_chosen() -> bool:
    """Whether nobody but :func:`leave_room` has said how many threads there are."""
    return _chosen or 'OMP_NUM_THREADS' not in os.environ


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
