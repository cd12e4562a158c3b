"""The kernels of :mod:`lora_sr.runtime.native`, compiled for this machine at their first use, and kept."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

LOG = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('kernels.cpp')
# No fast maths: sums have to stay in their order.
FLAGS = ('-std=c++17', '-O3', '-march=native', '-fno-math-errno', '-fopenmp', '-fPIC')
COMPILERS = ('c++', 'g++')

_lock = threading.Lock()


def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` where they cannot be compiled.

    They are compiled once for each machine, in some two seconds, with ``$CXX`` or the first C++ compiler on the path,
    and kept in ``$XDG_CACHE_HOME/lora_sr`` (``~/.cache/lora_sr``). Where there is none that works, a warning says why.
    """
    with _lock:
        return _load_library()


@functools.lru_cache(maxsize=None)
def _load_library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get('CXX', '')) or list(filter(shutil.which, COMPILERS))[:1]
    if not compiler:
        LOG.warning('There is no C++ compiler, so networks run by torch alone, which is slower on CPUs.')
        return None
    try:
        library, is_new = _compiled(compiler)
        try:
            return ctypes.CDLL(os.fspath(library))
        except OSError:
            if is_new:
                raise
            library.unlink()  # it was damaged
            return ctypes.CDLL(os.fspath(_compiled(compiler)[0]))
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, 'stderr', None) or error).strip().splitlines()
        reason = next((line for line in lines if 'error' in line.lower()), lines[-1])
        LOG.warning(f'{" ".join(compiler)} cannot compile the kernels for CPUs, so torch alone runs: {reason}')
        return None


def _compiled(compiler: list[str]) -> tuple[Path, bool]:
    """The file of the compiled kernels, and whether it has been made just now."""
    # What -march=native means here, as a home directory may be shared by different machines.
    machine = _run([*compiler, '-march=native', '-dM', '-E', '-x', 'c++', os.devnull])
    parts = [SOURCE.read_text(encoding='utf-8'), *FLAGS, *_openmp(), machine]
    key = hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
    name = f'kernels-{key}.so'
    folder = _cache(name)
    library = folder / name
    if library.exists():
        return library, False
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        compiled, linked = (os.path.join(unfinished, file) for file in ('kernels.o', name))
        _run([*compiler, *FLAGS, '-c', os.fspath(SOURCE), '-o', compiled])
        _run([*compiler, '-shared', compiled, *_openmp(), '-o', linked])
        with open(linked, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(linked, library)
    LOG.info(f'compiled the kernels for this CPU in {time.perf_counter() - start:.1f} s, kept as {library}')
    return library, True


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _openmp() -> list[str]:
    """What to link for OpenMP: torch's own, whose threads would compete with those of another."""
    root = Path(torch.__file__).parent
    of_torch = sorted([*root.glob('lib/libgomp*'), *root.parent.glob('torch.libs/libgomp*')])
    return [os.fspath(of_torch[0])] if of_torch else ['-fopenmp']


def _cache(name: str) -> Path:
    """The folder that has, or shall have, the file of that name; nobody else may write to it."""
    try:
        given = Path(os.environ.get('XDG_CACHE_HOME', ''))
        folder = (given if given.is_absolute() else Path.home() / '.cache') / 'lora_sr'
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        is_ours = state.st_uid in (os.getuid(), 0) and not state.st_mode & 0o022
        if is_ours and (os.access(folder, os.W_OK) or (folder / name).exists()):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    return _temporary_folder()


@functools.lru_cache(maxsize=None)
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix='lora_sr_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
