"""The kernels of :mod:`lora_sr.runtime.native`, compiled for this machine at their first use, and kept.

To load a library is to run it, so one that is kept is only loaded if nobody but this user and root can have written it,
or put another in its place; and one that was damaged would end the process, so its name has a hash of what is in it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import BinaryIO

import torch

from lora_sr.errors import printable
from lora_sr.files import partial_folder, remove_abandoned

LOG = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('kernels.cpp')
# No fast maths: sums have to stay in their order.
FLAGS = ('-std=c++17', '-O3', '-march=native', '-fno-math-errno', '-fopenmp', '-fPIC')
COMPILERS = ('c++', 'g++')
FUNCTIONS = ('run', 'scratch', 'operation_bytes', 'most_inputs', 'most_outputs', 'most_planes', 'has_bfloat16')
HASH_DIGITS = 16

_lock = threading.Lock()


def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` where they cannot be compiled.

    They are compiled once for each machine, in some two seconds, with ``$CXX`` or the first C++ compiler on the path,
    and kept in ``$XDG_CACHE_HOME/lora_sr`` (``~/.cache/lora_sr``), unless others may write there or to a folder above.
    Where there is none that works, a warning says why.
    """
    with _lock:
        return _load_library()


@functools.lru_cache(maxsize=None)
def _load_library() -> ctypes.CDLL | None:
    if os.name == 'nt':
        LOG.warning('The kernels are for POSIX systems, so networks run by torch alone, which is slower on CPUs.')
        return None
    given = os.environ.get('CXX', '')
    try:
        compiler = shlex.split(given) or list(filter(shutil.which, COMPILERS))[:1]
    except ValueError as error:
        reason = str(error)[:1].lower() + str(error)[1:]
        LOG.warning(f'$CXX must be a command, got {printable(given)}, so torch alone runs: {reason}')
        return None
    if not compiler:
        LOG.warning('There is no C++ compiler, so networks run by torch alone, which is slower on CPUs.')
        return None
    try:
        return _kept_or_compiled(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (str(getattr(error, 'stderr', None) or '').strip() or str(error)).splitlines()
        reason = next((line for line in lines if 'error' in line.lower()), lines[-1])
        LOG.warning(
            f'{printable(" ".join(compiler))} cannot compile the kernels for CPUs, so torch alone runs: '
            f'{printable(reason)}'
        )
        return None


def _kept_or_compiled(compiler: list[str]) -> ctypes.CDLL:
    # What -march=native means here, as a home directory may be shared by different machines.
    machine = _run([*compiler, '-march=native', '-dM', '-E', '-x', 'c++', os.devnull])
    parts = [SOURCE.read_text(encoding='utf-8'), *FLAGS, *_openmp(), machine]
    key = hashlib.sha256('\0'.join(parts).encode(errors='surrogateescape')).hexdigest()[:HASH_DIGITS]
    folder = _cache(key)
    remove_abandoned(folder, 'kernels')
    for library in _kept(folder, key):
        if _is_whole(library):
            with contextlib.suppress(OSError):
                return _opened(library)
        with contextlib.suppress(OSError):  # it was damaged, or written by others
            library.unlink()
    return _opened(_compiled(compiler, folder, key))


def _opened(library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(os.fspath(library))
    missing = [name for name in FUNCTIONS if not hasattr(opened, name)]
    if missing:
        raise OSError(f'{library.name} lacks the function {missing[0]}')
    return opened


def _kept(folder: Path, key: str) -> list[Path]:
    return sorted(folder.glob(f'kernels-{key}-*.so'))


def _is_whole(library: Path) -> bool:
    """Whether a library is as it was compiled, and nobody but this user and root can have written it."""
    try:
        with open(os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), 'rb') as file:
            state = os.fstat(file.fileno())
            return stat.S_ISREG(state.st_mode) and _is_ours(state) and library.name.endswith(f'-{_digest(file)}.so')
    except OSError:
        return False


def _digest(file: BinaryIO) -> str:
    return hashlib.sha256(file.read()).hexdigest()[:HASH_DIGITS]


def _compiled(compiler: list[str], folder: Path, key: str) -> Path:
    """Compile the kernels, into a folder of a random name first, and return their file in ``folder``."""
    start = time.perf_counter()
    with partial_folder(folder, 'kernels') as unfinished:
        compiled, linked = unfinished / 'kernels.o', unfinished / 'kernels.so'
        _run([*compiler, *FLAGS, '-c', os.fspath(SOURCE), '-o', os.fspath(compiled)])
        _run([*compiler, '-shared', os.fspath(compiled), *_openmp(), '-o', os.fspath(linked)])
        linked.chmod(0o755)  # whatever the umask: what others may write is not loaded
        with open(linked, 'rb') as file:
            library = folder / f'kernels-{key}-{_digest(file)}.so'
            os.fsync(file.fileno())
        os.replace(linked, library)
    LOG.info(f'compiled the kernels for this CPU in {time.perf_counter() - start:.1f} s, kept as {library}')
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, encoding='utf-8', errors='replace', timeout=300
    ).stdout


def _openmp() -> list[str]:
    """What to link for OpenMP: torch's own, whose threads would compete with those of another."""
    root = Path(torch.__file__).parent
    of_torch = sorted([*root.glob('lib/libgomp*'), *root.parent.glob('torch.libs/libgomp*')])
    return [os.fspath(of_torch[0])] if of_torch else ['-fopenmp']


def _cache(key: str) -> Path:
    """The folder that has, or shall have, the library of that key; nobody else may write to it."""
    try:
        given = Path(os.environ.get('XDG_CACHE_HOME', ''))
        folder = (given if given.is_absolute() else Path.home() / '.cache') / 'lora_sr'
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (_is_ours(folder.stat()) and _leads_to_ours(folder)):
            LOG.warning(f'The kernels are not kept, as others may write to {folder} or to a folder above it.')
        elif os.access(folder, os.W_OK) or any(map(_is_whole, _kept(folder, key))):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return _temporary_folder()


def _is_ours(state: os.stat_result) -> bool:
    """Whether nobody but this user and root can write it."""
    return state.st_uid in (os.geteuid(), 0) and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _leads_to_ours(path: Path) -> bool:
    """Whether nobody but this user and root can make a path lead elsewhere, by way of a folder or a link on it."""
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):  # what it says is its owner's affair; its mode means nothing
        is_safe = state.st_uid in (os.geteuid(), 0) and _leads_to_ours(path.parent / os.readlink(path))
    else:
        # In a sticky folder such as /tmp nobody can rename or remove what is another's.
        is_safe = _is_ours(state) or (state.st_uid in (os.geteuid(), 0) and bool(state.st_mode & stat.S_ISVTX))
    return is_safe and (path == path.parent or _leads_to_ours(path.parent))


@functools.lru_cache(maxsize=None)
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix='lora_sr_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
