"""Work that the processes of torchrun, of srun or of a job array of slurm share, image by image.

Nothing passes between the processes: each knows its rank and their number from the environment, and takes every
``world``-th item of a list that all of them make alike. Where each image is a file of its own, that is all. Where one
result is made of all images, :class:`Parts` keep what each process has made, and who comes last puts them together.
A process that dies leaves its items to the next start of the command, with as many processes as one likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_sr.errors import InputError, shown
from lora_sr.files import lock_path, partial_folder, write_whole

Item = TypeVar('Item')

MOST_PARTS = 256  # of one job: enough for each of many processes, few enough files
RECORD = 'joined.json'


class NotLastError(Exception):
    """This process has done its share of a job, and it is another one that has put, or will put, the parts together."""


@dataclass(frozen=True)
class Share:
    """What of a job is this process's.

    Attributes:
        rank: Its number, from 0.
        world: How many processes share the job.
        local_rank: Its number on its machine.
    """

    rank: int
    world: int
    local_rank: int = 0

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items that are this process's; all processes together have each item once."""
        return list(items[self.rank :: self.world])

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first process on its machine, which shows how far it is."""
        return self.local_rank == 0

    def __str__(self) -> str:
        return f'share {self.rank + 1} of {self.world}'


def own_share(is_wanted: bool) -> Share | None:
    """The share of this process, as the environment has it; ``None`` where none is wanted.

    Args:
        is_wanted: Whether the user asks for it. That is not taken from the environment: the tasks of an array may well
            have folders of their own, of which a share would be a loss that nobody sees.

    Raises:
        InputError: A share is wanted of a process that is not one of several, or none is though torchrun or srun start
            the same command several times; or a number in the environment is none.
    """
    counts = {'torchrun': 'WORLD_SIZE', 'srun': 'SLURM_STEP_NUM_TASKS'}
    starter = next((name for name, variable in counts.items() if variable in os.environ), None)
    rank, world, local_rank = 0, 1, 0
    if starter is not None and (is_wanted or os.environ[counts[starter]] != '1'):
        world = _number(counts[starter], 1)
        rank = _number('RANK' if starter == 'torchrun' else 'SLURM_PROCID', 0, world - 1)
        local_rank = _number('LOCAL_RANK' if starter == 'torchrun' else 'SLURM_LOCALID', 0, default=0)
    if not is_wanted:
        if world > 1:
            raise InputError(
                f'--share must be given where {starter} starts {world} processes: each would do all of the work.'
            )
        return None
    if 'SLURM_ARRAY_TASK_ID' in os.environ:
        tasks = _number('SLURM_ARRAY_TASK_COUNT', 1)
        first, step = _number('SLURM_ARRAY_TASK_MIN', 0), _number('SLURM_ARRAY_TASK_STEP', 1, default=1)
        task = _number('SLURM_ARRAY_TASK_ID', first)
        if (task - first) % step or (task - first) // step >= tasks:
            raise InputError(f'The array of --share must be a range, such as --array=0-{tasks - 1}, got task {task}.')
        rank, world = (task - first) // step * world + rank, world * tasks
    elif starter is None:
        raise InputError(
            '--share needs a start by torchrun, by srun or as a job array of slurm, which say how many processes there '
            'are, got none of them.'
        )
    return Share(rank, world, local_rank)


def _number(name: str, least: int, most: int = 10**6, default: int | None = None) -> int:
    text = os.environ.get(name, '' if default is None else str(default))
    if not (text.isascii() and text.isdecimal() and least <= int(text[:9]) <= most):
        raise InputError(f'{name} must be a whole number from {least} to {most} for --share, got {shown(repr(text))}.')
    return int(text)


def pieces_of(items: Sequence[Item]) -> list[Sequence[Item]]:
    """The pieces that a job is done in, neighbors together: the same however many processes there are."""
    length = -(-len(items) // MOST_PARTS) or 1
    return [items[start : start + length] for start in range(0, len(items), length)]


class Parts:
    """What processes have made of the pieces of a job: a folder for each piece, which is whole or not there.

    Args:
        folder: Holds them, beside the result; made with the first.
        pieces: What each piece is made of and how, in words that no other content shares: a part of other words, of
            a job that was changed, is none of this one's.
        job: What is made of all of them, likewise.
    """

    def __init__(self, folder: Path, pieces: Sequence[str], job: str):
        self.folder = folder
        self._names = [hashlib.sha256(piece.encode()).hexdigest()[:32] for piece in pieces]
        self._job = hashlib.sha256(' '.join([job, *self._names]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def paths(self) -> list[Path]:
        """The folders of all parts, in the order of the pieces, whether they are there or not."""
        return [self.folder / name for name in self._names]

    @property
    def made(self) -> int:
        """How many there are."""
        return sum(path.is_dir() for path in self.paths)

    @contextlib.contextmanager
    def make(self, number: int) -> Iterator[Path]:
        """Give the caller an empty folder, which becomes the part when the caller is done without an error.

        Raises:
            OSError: It cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.paths[number]
        with partial_folder(self.folder, target.name) as partial:
            part = partial / 'part'
            part.mkdir()
            yield part
            if not target.is_dir():  # else a process of an earlier start has made it meanwhile
                os.rename(part, target)

    def record(self) -> dict[str, Any] | None:
        """What :meth:`mark_joined` said of this very job; ``None`` before."""
        try:
            record = json.loads((self.folder / RECORD).read_text('utf-8'))
        except (OSError, ValueError):
            return None
        is_ours = isinstance(record, dict) and record.get('job') == self._job and isinstance(record.get('done'), dict)
        return record['done'] if is_ours else None

    def clear(self) -> None:
        """Remove the parts of other jobs, and what was said of one: their result is about to be replaced.

        Raises:
            OSError: They cannot be removed.
        """
        self.forget()
        self._remove_parts(but=self._names)
        with contextlib.suppress(OSError):  # it holds this job's, or is not there
            self.folder.rmdir()

    def _remove_parts(self, but: Sequence[str] = ()) -> None:
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir() and not path.name.startswith('.') and path.name not in but:
                shutil.rmtree(path)

    def forget(self) -> None:
        """Take back what :meth:`mark_joined` said, of this job or another: the result is gone, or will be another."""
        (self.folder / RECORD).unlink(missing_ok=True)

    def mark_joined(self, done: dict[str, Any]) -> None:
        """Note that the result is whole, and what it is: a process that comes late has nothing to do."""
        write_whole(self.folder / RECORD, json.dumps({'job': self._job, 'done': done}).encode())

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """Let the caller put the parts together: all are there, and nobody else is at it.

        When the caller has marked them as joined, they are removed; the record of it stays.

        Raises:
            NotLastError: It is another process that has to do it.
            OSError: They cannot be removed.
        """
        if self.record() is None and self.made < len(self):
            raise NotLastError
        try:
            lock = lock_path(self.folder)
        except BlockingIOError:
            raise NotLastError from None
        try:
            yield
            if self.record() is not None:
                self._remove_parts()
        finally:
            if lock is not None:
                os.close(lock)
