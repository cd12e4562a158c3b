"""Files that are written whole or not at all.

What is unfinished has a hidden name that nobody can guess, beside where it goes, so that nobody can put a link there
before. Its process holds a lock on it: what no process holds is left over from one that was killed, and the next one
that writes to the same place removes it. Where there are no locks, as on Windows and some network drives, it stays.
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Callable

from lora_sr.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger('basicsr')
SAVE_ATTEMPTS = 3
SAVE_PAUSE = 1.0  # seconds between attempts: a network drive may need a moment
TOKEN_BYTES = 8
LONGEST_HIDDEN = 180  # bytes of a name, beside which there are a suffix and 26 more
PARTIAL = re.compile(rf'\.(.*)\.[0-9a-f]{{{2 * TOKEN_BYTES}}}\.partial(\..*|)', re.DOTALL)


def check_regular(path: str | os.PathLike[str], what: str) -> None:
    """Refuse to read a folder, and what gives bytes without end or waits for a writer: pipes and devices.

    Args:
        path: What is to be read. Whether there is anything is not looked at.
        what: What it should be, for the message: 'the checkpoint'.

    Raises:
        InputError: There is something else than a file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = 'a folder' if os.path.isdir(path) else 'a pipe or a device'
        raise InputError(f'{what} {path} cannot be read: it must be a file, got {kind}')


def check_output(path: str | os.PathLike[str], suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Check that a file can be written: its suffix, its folder, and that it does not exist or may be replaced.

    Raises:
        InputError: It cannot be written.
    """
    path = Path(path)
    check_replaceable(path)
    if path.suffix not in suffixes:
        raise InputError(f'The output {path} must end in {" or ".join(suffixes)}.')
    if os.path.lexists(path) and not overwrite:
        raise _exists(path)
    if not path.parent.is_dir():
        raise InputError(f'The folder {path.parent} of the output does not exist.')
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f'The output {path} cannot be written: {error.strerror}.') from None


def check_output_folder(output: Path) -> None:
    """Check that the output is a folder, or that nothing is in the way of one.

    Raises:
        InputError: There is a file, a pipe, a device or a link that leads nowhere, at its place or above it.
    """
    for path in (output, *output.parents):
        if os.path.isdir(path):
            return
        if os.path.lexists(path):
            kind = 'a file' if os.path.isfile(path) else 'a pipe or a device'
            if not os.path.exists(path):
                kind = 'a link that leads nowhere'
            place = '' if path == output else f' at {path}'
            raise InputError(f'The output {output} must be a folder, got {kind}{place}.')


def identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells a file from others, under all its names; ``None`` where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_not_input(output: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Check that what is written does not replace what it is made of, which could not be made again from it.

    Raises:
        InputError: The output is an input, under this name or another.
    """
    written = identity(output)
    for path in inputs:
        if written is not None and written == identity(path):
            raise InputError(f'The output {output} is the input {path}, which would be lost: choose another output.')


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the caller a name to write under, and move the file to ``path`` when the caller is done without an error.

    Raises:
        InputError: There is a device or a pipe, or the file cannot be moved. The caller's own errors of writing are
            told by :func:`write_errors`.
    """
    path = Path(path)
    check_replaceable(path)
    with contextlib.ExitStack() as stack:
        with write_errors(path):
            partial = stack.enter_context(_partial_file(path.parent, path.stem, path.suffix))
        yield partial
        with write_errors(path):
            os.replace(partial, path)


@contextlib.contextmanager
def replacing_together(paths: Sequence[str | os.PathLike[str]], overwrite: bool) -> Iterator[list[Path]]:
    """As :func:`replacing`, several files: they are moved when all are complete.

    A process that is killed between two moves leaves the rest under hidden names, by which :func:`was_interrupted`
    knows it. The next one, which writes the same files, finds some of them in their places.

    Args:
        paths: Where the files go.
        overwrite: Replace files that exist; those that are as they would be written are no matter anyway.

    Raises:
        InputError: A file exists, or cannot be moved.
    """
    targets = list(map(Path, paths))
    with contextlib.ExitStack() as stack:
        partials = []
        for target in targets:
            check_replaceable(target)
            with write_errors(target):
                partials.append(stack.enter_context(_partial_file(target.parent, target.stem, target.suffix)))
        yield partials
        for partial, target in zip(partials, targets):
            if not overwrite and os.path.lexists(target) and not is_same_file(partial, target):
                raise _exists(target)
        for partial, target in zip(partials, targets):
            with write_errors(target):
                os.replace(partial, target)


def check_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of a device, such as /dev/null, of a pipe, or of a folder.

    Raises:
        InputError: There is one.
    """
    if path.exists() and not path.is_file():
        kind = 'a folder' if path.is_dir() else 'a pipe or a device'
        raise InputError(f'The output {path} must be a file, got {kind}.')


def was_interrupted(paths: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether a process was killed before it had moved all of these files, see :func:`replacing_together`."""
    for path in map(Path, paths):
        for entry in _unfinished(path.parent):
            if _is_abandoned(path.parent, entry, path.stem, path.suffix):
                return True
    return False


def is_same_file(path: Path, other: Path) -> bool:
    """Whether a file has the same bytes as one that may not be there."""
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _exists(path: Path) -> InputError:
    return InputError(f'The output {path} exists: choose another name, or allow it with --overwrite.')


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of writing ``path`` into InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
        raise InputError(f'The output {path} cannot be written: {_reason(error)}.') from error


def _reason(error: Exception) -> str:
    text = str(error).partition('\n')[0].rstrip('.')
    is_of_writing = re.search('PytorchStreamWriter|inline_container|unexpected pos|iostream', text) or not text
    return getattr(error, 'strerror', None) or ('the disk may be full' if is_of_writing else text[:200])


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file such that it is either complete or as it was before.

    Raises:
        InputError: It cannot be written.
    """
    with replacing(path) as partial, write_errors(path):
        partial.write_bytes(data)


def save_atomically(content: object, path: str | os.PathLike[str]) -> None:
    """``torch.save`` such that ``path`` is either complete or as it was before.

    Raises:
        InputError: The file cannot be written, also after three attempts.
    """
    import torch

    folder, name = Path(path).parent, Path(path).name
    for attempt in range(1, SAVE_ATTEMPTS + 1):
        try:
            with _partial_file(folder, name, '') as unfinished:  # no suffix, by which states are looked for
                torch.save(content, unfinished)
                _flush(unfinished)
                os.replace(unfinished, path)
            return
        except (OSError, RuntimeError) as error:
            if attempt == SAVE_ATTEMPTS:
                raise InputError(f'{path} cannot be written: {_reason(error)}.') from error
            LOG.warning(f'{path} cannot be written ({error}), remaining attempts: {SAVE_ATTEMPTS - attempt}')
            time.sleep(SAVE_PAUSE)


def _flush(path: Path) -> None:
    """Put a file on the disk: else a machine that goes down may leave its name without its content."""
    with open(path, 'rb') as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def partial_folder(folder: Path, name: str) -> Iterator[Path]:
    """Make a folder for what is unfinished within ``folder``, and remove it with all that is left in it at the end.

    Raises:
        OSError: It cannot be made or removed.
    """
    remove_abandoned(folder, name)
    with _partial(folder, name, '', lambda path: os.mkdir(path, 0o700)) as partial:
        try:
            yield partial
        finally:
            shutil.rmtree(partial)


@contextlib.contextmanager
def _partial_file(folder: Path, name: str, suffix: str) -> Iterator[Path]:
    """Make an empty file for what is unfinished, and remove it at the end if it is still there."""
    _remove_abandoned(folder, name, suffix, _found_first(folder.absolute()))
    with _partial(folder, name, suffix, _make_file) as partial:
        try:
            yield partial
        finally:
            with contextlib.suppress(OSError):  # it has been moved
                os.unlink(partial)


def _make_file(path: Path) -> None:
    # Whatever is there is not opened, a link neither. Other than those of tempfile, files get the usual permissions.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextlib.contextmanager
def _partial(folder: Path, name: str, suffix: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make something under a hidden name, and hold the lock on it."""
    name = _shortened(name)
    while True:
        partial = folder / f'.{name}.{secrets.token_hex(TOKEN_BYTES)}.partial{suffix}'
        make(partial)
        with contextlib.suppress(BlockingIOError):
            lock = lock_path(partial)
            if os.path.lexists(partial):
                break
            if lock is not None:
                os.close(lock)
        # Another process has found it before it was locked, and takes it for left over, or only looks at it.
        with contextlib.suppress(OSError):
            partial.rmdir() if partial.is_dir() else partial.unlink()
    try:
        yield partial
    finally:
        if lock is not None:
            os.close(lock)


def _shortened(name: str) -> str:
    """A name that leaves room for what makes it hidden, where a file may have 255 bytes."""
    if len(os.fsencode(name)) <= LONGEST_HIDDEN:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def lock_path(path: Path) -> int | None:
    """Lock a file or folder until the descriptor is closed, at the latest by the end of the process.

    Returns:
        The descriptor; ``None`` where nothing can be locked.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    if fcntl is None:
        return None
    # A link is none of ours, and a pipe would be waited for. Some drives lock only files that are open for writing.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _unfinished(folder: Path) -> list[str]:
    try:
        return list(filter(PARTIAL.fullmatch, os.listdir(folder)))
    except OSError:
        return []


@functools.lru_cache(maxsize=None)
def _found_first(folder: Path) -> list[str]:
    """What was unfinished when this process came: a folder of many images is looked through once, not for each."""
    return _unfinished(folder)


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the folders of that name that :func:`partial_folder` made for processes which were killed."""
    _remove_abandoned(folder, name, '', _unfinished(folder))


def _remove_abandoned(folder: Path, name: str, suffix: str, unfinished: list[str]) -> None:
    """Remove what killed processes of this user left unfinished for the same place."""
    for entry in unfinished:
        with _abandoned(folder, entry, name, suffix) as path, contextlib.suppress(OSError):
            if path is not None:
                shutil.rmtree(path) if path.is_dir() else os.unlink(path)


def _is_abandoned(folder: Path, entry: str, name: str, suffix: str) -> bool:
    with _abandoned(folder, entry, name, suffix) as path:
        return path is not None


@contextlib.contextmanager
def _abandoned(folder: Path, entry: str, name: str, suffix: str) -> Iterator[Path | None]:
    """Lock what a killed process of this user left unfinished under that name; ``None`` for all else."""
    match = PARTIAL.fullmatch(entry)
    lock = None
    if match is not None and match.groups() == (_shortened(name), suffix):
        with contextlib.suppress(OSError):  # BlockingIOError among them: its process is at work
            lock = lock_path(folder / entry)
    try:
        yield folder / entry if lock is not None and os.fstat(lock).st_uid == os.geteuid() else None
    finally:
        if lock is not None:
            os.close(lock)
