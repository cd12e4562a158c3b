"""What ends a run before its last iteration: a signal, or its time. It saves the iteration at hand, and says so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lora_sr.basicsr import progress
from lora_sr.basicsr.records import record
from lora_sr.basicsr.samples import stream_of

if TYPE_CHECKING:
    from types import FrameType

# Of a job that a scheduler ends, of a terminal that goes, what slurm sends ahead with --signal=USR1@60, and Ctrl-C.
NAMES = ('SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGINT')
TIME_IS_UP = 1 << 16  # stands where the number of a signal does
_received: list[int] = []
_replaced: dict[int, Any] = {}  # handlers, by the numbers of their signals
_began = time.monotonic()
_minutes: float | None = None  # that the run may take


class Stopped(SystemExit):
    """The end of a run that was told to end before it trained: with status 0, for nothing has failed.

    Args:
        reason: The name of what told it to.
    """

    def __init__(self, reason: str):
        super().__init__(0)
        self.reason = reason


def begin() -> None:
    """Begin a run, whose time counts from now on."""
    global _began
    _began = time.monotonic()


def listen(minutes: float | None = None) -> None:
    """Note the signals from now on instead of dying of them, where nobody else listens.

    A scheduler often sends one to all processes, which torchrun hands on to them once more: the second must not kill.
    Whoever presses Ctrl-C twice means it.

    Args:
        minutes: How long the run may take since :func:`begin`, as ``train.max_minutes`` says; ``None`` for no limit.
    """
    global _minutes
    ignore()
    _minutes = minutes
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        return
    own = os.getpid()
    interrupts = 2 if 'TORCHELASTIC_RUN_ID' in os.environ else 1  # that do not end it at once

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a process that was forked, of somebody else's
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _received.append(number)
        if number != signal.SIGINT:
            return
        if _received.count(number) > interrupts:
            _replaced[number](number, frame)
        elif len(_received) == 1 and os.environ.get('RANK', '0') == '0':
            # Whatever writes may be what was interrupted, and does not write twice at a time.
            os.write(2, b'\nstopping after what is at hand; Ctrl-C again ends at once\n')

    for name in NAMES:
        number = getattr(signal, name, None)  # Windows has SIGTERM and SIGINT alone
        handler = None if number is None else signal.getsignal(number)
        is_ours = getattr(handler, '__module__', '').startswith('lora_sr.')  # of the commands
        if number is not None and (handler in (signal.SIG_DFL, signal.default_int_handler) or is_ours):
            _replaced[number] = handler
            signal.signal(number, note)


def ignore() -> None:
    """Undo what :func:`listen` did, and forget what came: it was for the run that has ended."""
    global _minutes
    _minutes = None
    _received.clear()
    _agreement.forget()
    while _replaced:
        number, handler = _replaced.popitem()
        if getattr(signal.getsignal(number), '__module__', None) == __name__:
            signal.signal(number, handler)


def is_told() -> bool:
    """Whether a signal has come, or the run's minutes have gone."""
    return bool(_reason())


def told_anywhere() -> str | None:
    """What tells any process of the run to end, by name, or None. All of them call this at the same place."""
    reason = _agreement.of_all_now(_reason()) if dist.is_initialized() else _reason()
    return _name_of(reason) if reason else None


def shield_worker() -> None:
    """Let a process that reads samples live until its run ends it, whatever is sent to all processes.

    Else a run that is to finish its iteration waits for samples that nobody reads. torch ends a worker by SIGTERM.
    """
    for name in NAMES:
        if name != 'SIGTERM' and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, 'sigwaitinfo'):  # macOS and Windows do not tell who sends a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def stop_if_told(model: Any, epoch: int, iteration: int, saved: int) -> None:
    """End the run if a signal has come, or if the minutes of ``train.max_minutes`` have gone.

    Several processes agree upon it, and end after the same iteration, of which the first one saves the state. For that
    all of them have to call this after each iteration.

    Args:
        model: The model of the run, after an iteration.
        epoch: The epoch at hand.
        iteration: How many iterations have been done.
        saved: The iteration that the run began at, which needs no saving.

    Raises:
        SystemExit: With status 0: nothing has failed, and nothing is lost.
    """
    reason = _agreement.of_all(_reason()) if dist.is_initialized() else _reason()
    if not reason:
        return
    progress.close()
    stream = stream_of(model.opt)
    if model.opt['rank'] == 0:
        name = _name_of(reason)
        save_if_new(model, epoch, iteration, saved)
        record(model.opt, iter=iteration, stopped=name)
        words = 'nothing has been trained'
        if iteration > 0:
            words = f'iteration {iteration:,} is saved; --auto_resume goes on from it'
        print(f'stopped by {name}: {words}', file=sys.stderr, flush=True)
    if stream is not None and stream.tb_logger is not None:
        stream.tb_logger.close()  # it writes every two minutes
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(0)


def stop_or_save_if_told(model: Any, epoch: int, iteration: int, saved: int) -> None:
    """As :func:`stop_if_told`, within a validation, in which the processes cannot agree: there the first one saves.

    Args: as of :func:`stop_if_told`.

    Raises:
        SystemExit: As :func:`stop_if_told`.
    """
    if not dist.is_initialized():
        stop_if_told(model, epoch, iteration, saved)
    elif is_told() and model.opt['rank'] == 0:
        save_if_new(model, epoch, iteration, saved)


def save_if_new(model: Any, epoch: int, iteration: int, saved: int) -> None:
    """Save an iteration, unless it was the last one saved here, or the run began at it."""
    if iteration > saved and getattr(model, 'saved_when_told', None) != iteration:
        model.saved_when_told = iteration
        model.save(epoch, iteration)


def _name_of(reason: int) -> str:
    return 'train.max_minutes' if reason == TIME_IS_UP else signal.Signals(reason).name


def _reason() -> int:
    """The number of the signal that came first, or :data:`TIME_IS_UP`; 0 where there is no reason to stop."""
    if _received:
        return _received[0]
    return TIME_IS_UP if _minutes is not None and time.monotonic() - _began >= 60 * _minutes else 0


class _Agreement:
    """What the processes of a run tell each other while they train: it is read an iteration after it was said.

    So nobody waits for it. It has a group of its own, since the sums of gradients come in an order of their own.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a run of other processes."""
        self.group: Any = None
        self.said: tuple[torch.Tensor, Any] | None = None

    def of_all(self, reason: int) -> int:
        """The highest reason that a process gave an iteration ago; and let the others know this process's own."""
        self._begin()
        before = 0
        if self.said is not None:
            value, work = self.said
            work.wait()
            before = int(value)
        value = torch.tensor([reason])
        self.said = value, dist.all_reduce(value, dist.ReduceOp.MAX, self.group, async_op=True)
        return before

    def of_all_now(self, reason: int) -> int:
        """The highest reason that a process gives now, for which all wait."""
        self._begin()
        value = torch.tensor([reason])
        dist.all_reduce(value, dist.ReduceOp.MAX, self.group)
        return int(value)

    def _begin(self) -> None:
        if self.group is None:
            self.group = dist.new_group(backend='gloo')


_agreement = _Agreement()
