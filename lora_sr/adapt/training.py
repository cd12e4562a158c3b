"""The training of an adaptation: BasicSR's own program in a process of its own, watched by what it records."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lora_sr.adapted_folder import BEST, HELD, RUN
from lora_sr.errors import InputError
from lora_sr.metrics_file import NAME as METRICS
from lora_sr.metrics_file import read_metrics

LOOK = 0.5  # seconds
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
        InputError: The run could not begin, or could not go on: what it says.
    """
    command = [sys.executable, '-m', 'lora_sr.train', '-opt', 'train.yml', '--auto_resume']
    path = run_folder(folder) / METRICS
    with open(folder / LOG, 'ab') as log, _noted() as signals:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        seen: dict[int, float] = {}
        ended = ''
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
                    process.send_signal(signal.SIGTERM)
                elif len(signals) > 1:
                    raise KeyboardInterrupt
                time.sleep(LOOK)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    lines = read_metrics(path) if path.exists() else []
    last = lines[-1] if lines else {}
    if process.returncode:
        ended = 'failed'
        if not seen:
            raise InputError(f'The training could not be done: {_last_line(folder / LOG)}')
    elif not ended:
        ended = 'time' if last.get('stopped') == 'train.max_minutes' else 'finished'
        ended = 'interrupted' if last.get('stopped') not in (None, 'train.max_minutes') else ended
    return Trained(seen, int(last.get('iter', 0)), ended)


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
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
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
