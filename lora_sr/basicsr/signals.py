"""Signals that end a run: it saves the iteration at hand, and says so."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

# Of a job that a scheduler ends, of a terminal that goes, and what slurm sends ahead with --signal=USR1@60.
NAMES = ('SIGTERM', 'SIGHUP', 'SIGUSR1')
_received: list[int] = []


def listen() -> None:
    """Note the signals from now on instead of dying of them, where nobody else listens.

    A scheduler often sends one to all processes, which torchrun hands on to them once more: the second must not kill.
    """
    _received.clear()
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        return
    own = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a worker that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _received.append(number)

    for name in NAMES:
        number = getattr(signal, name, None)  # Windows has SIGTERM alone
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, note)


def ignore() -> None:
    """Undo what :func:`listen` did, and forget what came: it was for the run that has ended."""
    _received.clear()
    for name in NAMES:
        number = getattr(signal, name, None)
        handler = None if number is None else signal.getsignal(number)
        if number is not None and getattr(handler, '__module__', None) == __name__:
            signal.signal(number, signal.SIG_DFL)


def status() -> int | None:
    """The exit status of a process that a signal has ended; ``None`` where none has come."""
    return 128 + _received[0] if _received else None


def stop_if_told(model: Any, epoch: int, iteration: int, saved: int) -> None:
    """End the run if a signal has come.

    Of several processes the first one saves and ends; the others go on until they miss it. Were one of them to end
    before, it could not finish its iteration.

    Args:
        model: The model of the run, after an iteration.
        epoch: The epoch at hand.
        iteration: How many iterations have been done.
        saved: The iteration that the run began at, which needs no saving.

    Raises:
        SystemExit: With 128 and the number of the signal.
    """
    if not _received or model.opt['rank'] != 0:
        return
    words = 'nothing has been trained'
    if iteration > saved:
        model.save(epoch, iteration)
    if iteration > 0:
        words = f'iteration {iteration:,} is saved; --auto_resume goes on from it'
    print(f'stopped by {signal.Signals(_received[0]).name}: {words}', file=sys.stderr, flush=True)
    raise SystemExit(status())
