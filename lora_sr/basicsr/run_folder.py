"""The folder of a run, which no other run may write into or move away while this one is at work.

BasicSR moves a folder of the same name aside, also that of a run that is not over: both then save into one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from lora_sr.errors import InputError
from lora_sr.files import lock_path

WAIT = 30.0  # seconds for another run that is just about to make its folder
WAIT_FOR_LOST = 120.0  # seconds for a process that was given up: a server of files keeps its lock for up to 90
_held: dict[str, int] = {}  # descriptors of locks, by what they are of


def claim(folder: str | os.PathLike[str], wait: float = 0.0) -> None:
    """Begin a run in a folder, which need not be there yet; :func:`hold` it once it is.

    Until then no other run begins beside it.

    Args:
        folder: The folder.
        wait: Seconds to wait for one that is at work there.

    Raises:
        InputError: A run is at work there.
    """
    release()
    folder = Path(os.path.realpath(folder))
    above = next(parent for parent in folder.parents if parent.is_dir())
    _take_within(WAIT, 'above', above)
    if folder.is_dir() and not _take_within(wait, 'folder', folder):
        release()
        raise InputError(f'A run is at work in {folder}: stop it, wait for it, or give this one another name.')


def hold(folder: str | os.PathLike[str]) -> None:
    """Keep a folder that has been claimed, until :func:`release` or the end of the process."""
    before = dict(_held)
    _held.clear()
    claimed = before.get('folder')
    if claimed is not None and os.path.exists(folder) and os.path.samestat(os.fstat(claimed), os.stat(folder)):
        _held['folder'] = before.pop('folder')  # of a run that goes on; of a new one BasicSR has moved it away
    elif os.path.isdir(folder):
        _take('folder', Path(os.path.realpath(folder)))
    for descriptor in before.values():  # last, so that nobody comes in between
        os.close(descriptor)


def release() -> None:
    """Give back what this process holds."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, 'register_at_fork'):
    # A worker that outlives a killed run must not keep its folder; closing a copy gives nothing back.
    os.register_at_fork(after_in_child=release)


def _take_within(seconds: float, name: str, folder: Path) -> bool:
    end = time.monotonic() + seconds
    while not _take(name, folder):
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True


def _take(name: str, folder: Path) -> bool:
    """Lock a folder, if nobody has and if that is possible here. Returns whether nobody had."""
    try:
        descriptor = lock_path(folder)
    except BlockingIOError:
        return False
    if descriptor is not None:
        _held[name] = descriptor
    return True
