"""The partial folder of ``lora-sr prepare``: held by one run, marked when it is complete, and moved into place.

A run that was stopped before the mark is done again from the start; one that was stopped between two moves is finished
by the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_sr.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs at once into one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

PARTIAL_FOLDER = '.prepare.partial'
COMPLETE_FILE = 'complete.json'
REPLACED_FOLDER = 'replaced'
COMPLETE_TYPES = {'databases': list, 'job': str, 'images': int, 'left_out': dict, 'bytes': dict}

_DATABASE_NAME = re.compile(r'(HR|LR(_bicubic)?_X\d+)(_sub|_raw)?\.lmdb')  # see Cut.database_names


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """The folder that a run writes to, held against a second run; then it is gone, and ``output`` too if empty."""
    made = [path for path in (output, *output.parents) if not path.exists()]
    folder = output / PARTIAL_FOLDER
    output.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        state = folder.lstat()
        # All that is in it will be removed, or moved to where it says: it must be of an earlier run of this user.
        if not stat.S_ISDIR(state.st_mode) or (fcntl and state.st_uid != os.geteuid()):
            kind = 'a link' if stat.S_ISLNK(state.st_mode) else 'that of another user' if folder.is_dir() else 'a file'
            raise InputError(
                f'{folder} must be a folder that `lora-sr prepare` has made, got {kind}: move it away.'
            ) from None
    lock = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if lock is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f'{output}: another `lora-sr prepare` is writing there; wait until it is done, or '
                    'choose another output folder.'
                ) from error
        try:
            yield folder
        finally:
            # What is complete is kept: should this run have been stopped between two moves, the next one goes on.
            if not (folder / COMPLETE_FILE).exists():
                shutil.rmtree(folder)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
    finally:
        if lock is not None:
            os.close(lock)


def mark_complete(folder: Path, done: Mapping[str, Any]) -> None:
    """Say, in one step, that the databases in ``folder`` are complete, and what they are."""
    written = folder / 'complete.partial'
    with open(written, 'x', encoding='utf-8') as file:
        json.dump(done, file)
    os.replace(written, folder / COMPLETE_FILE)


def _read_complete(folder: Path) -> dict[str, Any] | None:
    """What ``mark_complete`` has written in ``folder``; None where it has not, whatever else there is."""
    file = folder / COMPLETE_FILE
    try:
        done = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(done, dict) or {key: type(value) for key, value in done.items()} != COMPLETE_TYPES:
        return None
    return done if all(isinstance(name, str) and _DATABASE_NAME.fullmatch(name) for name in done['databases']) else None


def move_into_place(folder: Path, output: Path, names: Iterable[str]) -> None:
    """Move complete databases from ``folder`` to ``output``. Stopped anywhere, it can be called again."""
    replaced = folder / REPLACED_FOLDER
    replaced.mkdir(exist_ok=True)
    waiting = [name for name in names if (folder / Path(name).stem).exists()]
    # All old ones leave before the first new one arrives: new HR never stands beside old LR.
    for name in waiting:
        if os.path.lexists(output / name):
            os.rename(output / name, replaced / name)
    for name in waiting:
        os.rename(folder / Path(name).stem, output / name)
    shutil.rmtree(replaced)
    (folder / COMPLETE_FILE).unlink()


def finish_interrupted(folder: Path, output: Path) -> dict[str, Any] | None:
    """Deal with what an interrupted run left in ``folder``.

    Returns:
        What that run has done, see ``mark_complete``, if its databases were complete and are now in place; else None,
        and ``folder`` is empty.

    Raises:
        InputError: There are databases that it was about to replace, and nothing says whether it has.
    """
    done = _read_complete(folder)
    if done is not None:
        move_into_place(folder, output, done['databases'])
    elif (folder / REPLACED_FOLDER).is_dir() and any((folder / REPLACED_FOLDER).iterdir()):
        raise InputError(
            f'{folder / REPLACED_FOLDER} has databases that a run was about to replace, and {COMPLETE_FILE} beside it '
            f'is damaged: move them where they belong, and remove {folder}.'
        )
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return done
