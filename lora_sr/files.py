"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lora_sr.errors import InputError

LOG = logging.getLogger('basicsr')
SAVE_ATTEMPTS = 3
SAVE_PAUSE = 1.0  # seconds between attempts: a network drive may need a moment


def check_output(path: str | os.PathLike[str], suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Check that a file can be written: its suffix, its folder, and that it does not exist or may be replaced.

    Raises:
        InputError: It cannot be written.
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise InputError(f'The output {path} must end in {" or ".join(suffixes)}.')
    if path.exists() and not overwrite:
        raise InputError(f'The output {path} exists: choose another name, or allow it with --overwrite.')
    if not path.parent.is_dir():
        raise InputError(f'The folder {path.parent} of the output does not exist.')
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f'The output {path} cannot be written: {error.strerror}.') from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the caller a name to write under, and move the file to ``path`` when the caller is done without an error.

    Raises:
        InputError: The file cannot be moved. The caller's own errors of writing are told by :func:`write_errors`.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}.partial{path.suffix}')
    try:
        yield partial
        with write_errors(path):
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk even what is not there cannot be removed
            partial.unlink()


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of writing ``path`` into InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
        reason = getattr(error, 'strerror', None) or 'the disk may be full'
        raise InputError(f'The output {path} cannot be written: {reason}.') from error


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

    unfinished = f'{path}.{os.getpid()}.tmp'
    for attempt in range(1, SAVE_ATTEMPTS + 1):
        try:
            torch.save(content, unfinished)
            os.replace(unfinished, path)
            return
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                os.remove(unfinished)
            if attempt == SAVE_ATTEMPTS:
                raise InputError(f'{path} cannot be written: {_first_sentence(error)}') from error
            LOG.warning(f'{path} cannot be written ({error}), remaining attempts: {SAVE_ATTEMPTS - attempt}')
            time.sleep(SAVE_PAUSE)


def _first_sentence(error: Exception) -> str:
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return re.split(r'[.\n]\s', text.strip() + '\n', maxsplit=1)[0].strip()[:200]
