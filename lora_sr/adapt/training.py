"""The training of an adaptation: BasicSR's own program in a process of its own, watched by what it records."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lora_sr import threads
from lora_sr.adapted_folder import BEST, HELD, OPTIONS, RUN
from lora_sr.errors import InputError
from lora_sr.metrics_file import NAME as METRICS
from lora_sr.metrics_file import read_metrics

LOOK = 0.5  # seconds
DIVERGED = 1  # exit status of a training
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
LEAST_RISE = 0.002  # dB: less is none
LOG = 'training.log'


@dataclass(frozen=True)
class Trained:
    """What :func:`train` has seen.

    Attributes:
        psnr: {iteration: PSNR in dB on what is held back}.
        iterations: How many were done.
        ended: Why: ``finished``, ``no_rise``, ``time``, ``interrupted`` or ``failed``.
    """

    psnr: dict[int, float]
    iterations: int
    ended: str

    @property
    def best(self) -> int | None:
        """The iteration with the highest PSNR; ``None`` where nothing was validated."""
        return max(self.psnr, key=lambda one: self.psnr[one]) if self.psnr else None


def run_folder(folder: Path) -> Path:
    """Where the run of the option file ``train.yml`` of a folder is."""
    return folder / RUN


def best_network(folder: Path) -> Path:
    """The best network of that run, which is there once it has validated."""
    return folder / BEST


def train(folder: Path, patience: int, told: Callable[[int, float], None] = lambda iteration, psnr: None) -> Trained:
    """Train as ``train.yml`` of a folder says, or go on, until PSNR has not risen for some validations.

    The run is that of ``python -m lora_sr.train -opt train.yml --auto_resume`` in that folder; what it prints goes to
    ``training.log`` there. Ctrl-C and SIGTERM end it after the iteration at hand, and this function returns.

    Args:
        folder: It.
        patience: So many validations in a row without a better one end the run.
        told: Called with each validation.

    Raises:
        InputError: The run could not begin, or could not go on: what it says. A later call goes on where it was saved.
        KeyboardInterrupt: It was told to end before its first validation, so that there is nothing to go on with.
    """
    path = run_folder(folder) / METRICS
    seen = _validations(path)  # of a run that goes on
    if _has_stopped_rising(seen, patience):
        return Trained(seen, max(seen), 'no_rise')
    ended = ''
    with _noted() as signals:
        process = _begin(folder)
        try:
            while True:
                is_over = process.poll() is not None
                for iteration, psnr in _validations(path).items():
                    if iteration not in seen:
                        seen[iteration] = psnr
                        told(iteration, psnr)
                if is_over:
                    break
                if not ended and (signals or _has_stopped_rising(seen, patience)):
                    ended = 'interrupted' if signals else 'no_rise'
                    process.terminate()
                elif len(signals) > 1:
                    raise KeyboardInterrupt
                time.sleep(LOOK)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    lines = read_metrics(path) if path.exists() else []
    last = lines[-1] if lines else {}
    was_too_early = bool(ended) and process.returncode == -signal.SIGTERM  # before it listened
    if process.returncode == DIVERGED and seen:
        ended = 'failed'
    elif process.returncode and not was_too_early:
        raise InputError(f'The training could not be done: {_last_line(folder / LOG)}')
    elif not ended:
        ended = {None: 'finished', 'train.max_minutes': 'time'}.get(last.get('stopped'), 'interrupted')
    if not seen:
        raise KeyboardInterrupt
    return Trained(seen, int(last.get('iter', 0)), ended)


def _begin(folder: Path) -> subprocess.Popen[bytes]:
    """Start the training, in a session of its own: a signal for all processes of a terminal is handed on to it."""
    # The run locks the folder above its own until it has made that; ours is locked by who calls this.
    run_folder(folder).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'lora_sr.train', '-opt', OPTIONS, '--auto_resume']
    environment = dict(os.environ)
    if threads.is_chosen():  # by this process, of what was free when it began: the training chooses for itself
        environment.pop('OMP_NUM_THREADS', None)
    with open(folder / LOG, 'ab') as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent if LIBC is not None else None,
        )


def _end_with_parent() -> None:
    """Let the kernel of Linux send SIGTERM to this process once its parent is gone, killed it may be."""
    assert LIBC is not None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _validations(path: Path) -> dict[int, float]:
    lines = read_metrics(path) if path.exists() else []
    return {line['iter']: float(line['metrics']['psnr']) for line in lines if line.get('validation') == HELD}


def _has_stopped_rising(psnr: dict[int, float], patience: int) -> bool:
    values = [psnr[iteration] for iteration in sorted(psnr)]
    if len(values) <= patience:
        return False
    return max(values[-patience:]) < max(values[:-patience]) + LEAST_RISE


@contextmanager
def _noted() -> Iterator[list[int]]:
    """A list of the signals that come meanwhile, which end nothing by themselves."""
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)

    before = {}
    try:
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
            if hasattr(signal, name):
                before[getattr(signal, name)] = signal.signal(getattr(signal, name), note)
    except ValueError:  # not the main thread, which alone gets signals
        before = {}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text('utf-8', 'replace').splitlines() if line.strip()]
    return (lines[-1] if lines else 'it said nothing').removeprefix('error: ')
