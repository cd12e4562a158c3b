"""How fast a run goes, and how long it still has."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Callable

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Pace:
    """The time that a run takes for its iterations, and apart from them for what comes once in many.

    The first iteration of a run, or of one that goes on, does not count: processes that read samples start in it.

    Args:
        start: The iteration that the run goes on from.
        total: All its iterations.
        clock: Seconds.
    """

    def __init__(self, start: int = 0, total: int = 0, clock: Callable[[], float] = time.monotonic):
        self.start, self.total, self.clock = start, total, clock
        self.elsewhere = 0.0  # seconds, of validations and of saving
        self.spent: dict[str, dict[int, float]] = {}  # seconds, by what took them and after which iteration
        self.is_elsewhere = False
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def begin(self, done: int) -> None:
        """Begin an iteration, after so many."""
        if self.first is None and done > self.start:
            self.first = self.last = done, self._working()

    @contextlib.contextmanager
    def apart(self, what: str, iteration: int) -> Iterator[None]:
        """Time what is no iteration but comes after one: several sets, or several files, may be parts of it."""
        if self.is_elsewhere:  # a checkpoint that is saved within a validation
            yield
            return
        start, self.is_elsewhere = self.clock(), True
        try:
            yield
        finally:
            seconds, self.is_elsewhere = self.clock() - start, False
            self.elsewhere += seconds
            times = self.spent.setdefault(what, {})
            times[iteration] = times.get(iteration, 0) + seconds

    def lately(self, done: int) -> float | None:
        """Seconds of an iteration since this was asked last; ``None`` where none counts since."""
        if self.last is None or done <= self.last[0]:
            return None
        (before, then), now = self.last, self._working()
        self.last = done, now
        return (now - then) / (done - before)

    def left(self, done: int, seconds: float, frequencies: Mapping[str, int]) -> float:
        """The seconds that the rest of the run will take.

        Args:
            done: How many iterations have been done; what comes after the last of them is still to come.
            seconds: Of an iteration, where nothing is known yet.
            frequencies: After how many iterations what is apart comes again, by its name.
        """
        if self.first is not None and done > self.first[0]:
            seconds = (self._working() - self.first[1]) / (done - self.first[0])
        rest = seconds * max(0, self.total - done)
        for what, frequency in frequencies.items():
            times = self.spent.get(what)
            if times:
                rest += (self.total // frequency - (done - 1) // frequency) * sum(times.values()) / len(times)
        return rest

    def _working(self) -> float:
        return self.clock() - self.elsewhere


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that torch had of a CUDA GPU, or that the process had; ``None`` where the system does not tell."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak
