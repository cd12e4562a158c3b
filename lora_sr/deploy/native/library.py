"""The kernels of :mod:`lora_sr.deploy.native`, compiled for this machine at their first use, and kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

LOG = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('kernels.cpp')
# No fast maths: infinities and NaN have to stay what they are, and sums in their order.
FLAGS = ('-std=c++17', '-O3', '-march=native', '-fno-math-errno', '-fopenmp', '-fPIC')
COMPILERS = ('c++', 'g++', 'clang++')


@functools.lru_cache(maxsize=None)
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` where they cannot be compiled.

    They are compiled once for each machine, in some two seconds, with ``$CXX`` or the first C++ compiler on the path,
    and kept in ``$XDG_CACHE_HOME/lora_sr`` (``~/.cache/lora_sr``). Where there is none that works, a warning says why.
    """
    compiler = os.environ.get('CXX') or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        LOG.warning('There is no C++ compiler, so networks run by torch alone, which is slower on CPUs.')
        return None
    try:
        return ctypes.CDLL(os.fspath(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, 'stderr', None) or str(error)).strip().splitlines()
        LOG.warning(
            f'{compiler} cannot compile the kernels for CPUs, so torch alone runs: {reason[0] if reason else error}'
        )
        return None


def _compiled(compiler: str) -> Path:
    source = SOURCE.read_bytes()
    # What -march=native means here, as a home directory may be shared by different machines.
    machine = subprocess.run(
        [compiler, '-march=native', '-dM', '-E', '-x', 'c++', os.devnull], check=True, capture_output=True, timeout=60
    ).stdout
    flags = ' '.join((*FLAGS, *_openmp())).encode()
    key = hashlib.sha256(b'\0'.join([source, flags, machine])).hexdigest()[:16]
    library = _cache() / f'kernels-{key}.so'
    if not library.exists():
        start = time.perf_counter()
        unfinished, compiled = (library.with_suffix(f'.{os.getpid()}.{kind}') for kind in ('tmp', 'o'))
        try:
            for command in (
                [compiler, *FLAGS, '-c', SOURCE, '-o', compiled],
                [compiler, '-shared', compiled, *_openmp(), '-o', unfinished],
            ):
                subprocess.run(list(map(os.fspath, command)), check=True, capture_output=True, text=True, timeout=300)
            os.replace(unfinished, library)
        finally:
            unfinished.unlink(missing_ok=True)
            compiled.unlink(missing_ok=True)
        LOG.info(f'compiled the kernels for this CPU in {time.perf_counter() - start:.1f} s, kept as {library}')
    return library


def _openmp() -> list[str]:
    """What to link for OpenMP: torch's own, whose threads would compete with those of another."""
    of_torch = sorted(Path(torch.__file__).with_name('lib').glob('libgomp*'))
    return [os.fspath(of_torch[0])] if of_torch else ['-fopenmp']


def _cache() -> Path:
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'lora_sr'
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) or any(folder.iterdir()):
            return folder
    except OSError:
        pass
    return _temporary_folder()


@functools.lru_cache(maxsize=None)
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix='lora_sr_'))  # of this process alone: nobody else can put a library there
