"""A teacher's outputs over whole training images, made once and stored beside them as a raw database."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable

import lmdb
import numpy as np
import torch
import torch.distributed as dist
from basicsr.utils.dist_util import get_dist_info
from torch import Tensor, nn
from tqdm import tqdm

from lora_sr.basicsr import signals
from lora_sr.basicsr.integer_images import TAUGHT_HIGH, TAUGHT_LOW
from lora_sr.checkpoints.origin import adapter_fingerprint, fingerprint
from lora_sr.data.lmdb_store import FIRST_MAP_BYTES, RawDatabase, RawImage, describe, raw_line, raw_values
from lora_sr.errors import InputError
from lora_sr.files import lock_path, replacing
from lora_sr.runtime.upscaler import Upscaler, best_device

LOG = logging.getLogger('basicsr')
FORM = 1  # of what is stored: another number makes all of it anew
META, UNFINISHED_META = 'meta_info.txt', 'meta_info.partial'
SECONDS_OF_WAITING = 1
SECONDS_BETWEEN_LOOKS = 10  # at what other processes have made


def teacher_key(state: Mapping[str, Tensor], section: Mapping[str, Any], self_ensemble: bool) -> str:
    """What tells a teacher from others: its weights as they are loaded, its section, and whether a mean is taken."""
    parts = [FORM, fingerprint(state), adapter_fingerprint(state), dict(section), self_ensemble]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def place_of(root: str | os.PathLike[str], teacher: str) -> Path:
    """Where the outputs of a teacher for a raw database are: beside it, by what both hold.

    Args:
        root: The folder of the database.
        teacher: See :func:`teacher_key`.
    """
    root = Path(os.path.expanduser(root))
    data = (root / META).read_bytes()  # with a checksum of each image
    key = hashlib.sha256(teacher.encode() + data).hexdigest()[:16]
    return root.with_name(f'{root.stem}_taught_{key}.lmdb')


def precompute(teacher: nn.Module, root: str | os.PathLike[str], path: Path, scale: int, self_ensemble: bool) -> None:
    """Make the outputs of a teacher for all images of a raw database, unless they are there.

    All processes that are told to, on one machine or several, do so together. Each output is a file of its own at
    first, which is on the disk whole or not at all, and is made under a lock: what a process that died was at is free
    for any other. When all are there, one process moves them into the database, which nobody else has open then. After
    a kill the next call goes on, at either stage.

    On a drive without locks some outputs may be made twice, and processes of different runs must not do this at once.

    Args:
        teacher: In eval mode, (N, C, H, W) -> (N, C, scale * H, scale * W), values in [0, 1].
        root: The folder of the LR images.
        path: Where the outputs go, see :func:`place_of`.
        scale: By how much they are larger.
        self_ensemble: Whether to take the mean over the eight flips and rotations.

    Raises:
        InputError: The teacher does not take these images, or makes others than are wanted; or the outputs cannot be
            written.
    """
    images = RawDatabase(os.path.expanduser(root))
    folder = path.with_name(f'.{path.name}.partial')
    work = _Work(folder, path, list(images.images))
    try:
        if not work.is_done():
            _make_outputs(work, teacher, images, scale, self_ensemble)
        work.stop_if_told()
        work.join()
        work.clear()
    except (OSError, lmdb.Error) as error:
        raise InputError(f'{path}: the outputs of the teacher cannot be written there ({error}).') from error
    LOG.info(f'The outputs of the teacher for {root} are in {path}.')


def _make_outputs(work: _Work, teacher: nn.Module, images: RawDatabase, scale: int, self_ensemble: bool) -> None:
    """Make what is left of the outputs, as files, until all are there or the run is told to end."""
    on_gpu = best_device().type != 'cpu'
    makers = [upscaler(teacher, images, scale, self_ensemble) for _ in range(1 if on_gpu else torch.get_num_threads())]
    work.folder.mkdir(exist_ok=True)
    left = [images.images[work.keys[number]] for number in work.left()]
    needed, free = _bytes_of(left, scale), shutil.disk_usage(work.folder).free
    if needed > free:
        raise InputError(
            f'network_t.precompute needs {needed / 1e9:.1f} GB beside {images.path} for the outputs of the teacher, '
            f'got {free / 1e9:.1f} GB.'
        )
    LOG.info(
        f'The teacher: {len(left):,} of {len(work.keys):,} images of {images.path} are left to compute, '
        f'{needed / 1e6:,.0f} MB.'
    )
    work.make_all(makers)


class _Work:
    """Outputs that are made as files, and then moved into a database, by whoever is there to do it.

    Args:
        folder: Holds the files, and the database until it is finished.
        path: Where the database goes.
        keys: Of the images, in their order.
    """

    def __init__(self, folder: Path, path: Path, keys: list[str]):
        self.keys = keys
        self.folder, self._path, self._database = folder, path, folder / 'joined'
        self._rank, processes = get_dist_info()
        # A process begins with its share, so that it hardly meets others, and goes on with theirs.
        starts = [(self._rank + other) % processes for other in range(processes)]
        self._order = [number for start in starts for number in range(start, len(keys), processes)]

    def _file(self, number: int) -> Path:
        return self.folder / f'{number}.npy'

    def is_done(self) -> bool:
        """Whether the database is in its place."""
        # To list a folder asks the server of a network drive; a single name may be known as it was a minute ago.
        return self._path.name in os.listdir(self._path.parent)

    def left(self) -> list[int]:
        """The numbers of the outputs that are still to be made, in this process's order."""
        try:
            made = set(os.listdir(self.folder))
        except FileNotFoundError:
            if self.is_done():  # since a moment ago
                return []
            raise
        if self.is_done() or self._database.name in made:  # which is begun when all are made
            return []
        return [number for number in self._order if self._file(number).name not in made]

    def make_all(self, makers: Sequence[Callable[[str], np.ndarray]]) -> None:
        """Make outputs until all are there, whoever has made them, or the run is told to end.

        Args:
            makers: One for each thread: what gives the output for a key.
        """
        total, left = len(self.keys), self.left()
        is_quiet = True if self._rank or not sys.stderr else None
        bar = tqdm(total=total, initial=total - len(left), unit='image', disable=is_quiet)
        with bar, _single_threads(len(makers)) as pool:
            while left and not signals.is_told():
                queue = deque(left)
                some = partial(self._make_some, queue, time.monotonic() + SECONDS_BETWEEN_LOOKS, bar)
                try:
                    made = sum(pool.map(some, makers))
                finally:
                    queue.clear()  # where one fails, or Ctrl-C comes, all end
                if not made:  # what is left is in the hands of others
                    time.sleep(SECONDS_OF_WAITING)
                left = self.left()
                bar.n = total - len(left)
                bar.refresh()

    def _make_some(self, queue: deque[int], until: float, bar: tqdm, make: Callable[[str], np.ndarray]) -> int:
        """Make outputs of a queue, of which other threads take as well; how many."""
        made = 0
        while time.monotonic() < until and not signals.is_told():
            try:
                number = queue.popleft()
            except IndexError:
                break
            if self._make(number, make):
                made += 1
                bar.update()
        return made

    def _make(self, number: int, make: Callable[[str], np.ndarray]) -> bool:
        """Make an output unless it is there, or another process or thread is at it; whether it was made."""
        file, claim = self._file(number), self.folder / f'{number}.lock'
        if file.exists():
            return False
        lock = None
        try:
            claim.touch()
            lock = lock_path(claim)
            if file.exists() or self._database.exists():  # made by the one that had the lock
                return False
            output = make(self.keys[number])
            with replacing(file) as unfinished, open(unfinished, 'wb') as content:
                np.save(content, output)
                content.flush()
                os.fsync(content.fileno())
            claim.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        except (OSError, InputError):
            if self.is_done():  # without locks others may have made it as well, and finished
                return False
            raise
        finally:
            if lock is not None:
                os.close(lock)
        return True

    def join(self) -> None:
        """Move the outputs, all of which are there, into the database, or wait until another process has done so."""
        while not self.is_done():
            self._stop_alone_if_told()
            lock = None
            try:
                claim = self.folder / 'joined.lock'
                claim.touch()
                lock = lock_path(claim)
                if self.is_done() or (lock is None and self._rank):  # where there are no locks, the first joins
                    raise BlockingIOError
                self._move_all()
            except BlockingIOError:
                time.sleep(SECONDS_OF_WAITING)
            except FileNotFoundError:
                if not self.is_done():  # else the folder is gone because all is done
                    raise
            finally:
                if lock is not None:
                    os.close(lock)

    def _move_all(self) -> None:
        self._database.mkdir(exist_ok=True)
        with Outputs(self._database) as outputs:
            for number, key in enumerate(self.keys):
                self._stop_alone_if_told()
                if key not in outputs.lines:
                    outputs.add(key, np.load(self._file(number)))
                self._file(number).unlink(missing_ok=True)  # so that the disk holds nothing twice
            outputs.finish(self.keys)
        os.rename(self._database, self._path)

    def stop_if_told(self) -> None:
        """End the run, which has not begun to train, if any of its processes is told to, all of which call this."""
        name = signals.told_anywhere()
        if name is None:
            return
        if self._rank == 0:
            stored = f'{len(self.keys) - len(self.left()):,} of {len(self.keys):,} outputs of the teacher are stored'
            print(f'stopped by {name}: {stored}; the same command goes on from there', file=sys.stderr, flush=True)
        raise signals.Stopped(name)

    def _stop_alone_if_told(self) -> None:
        """End a run of one process. Of several none may end here, where another may go on to train without it."""
        if not dist.is_initialized():
            self.stop_if_told()

    def clear(self) -> None:
        """Remove what is left of the folder when the database is in its place."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute with one processor each, and on this process's GPU.

    Several images at a time keep processors busier than several threads at one image, which wait for each other.
    """
    threads = torch.get_num_threads()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def begin() -> None:
        torch.set_num_threads(1)
        if device is not None:
            torch.cuda.set_device(device)

    try:
        with ThreadPoolExecutor(count, initializer=begin) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # also what threads that begin later take


def _bytes_of(images: list[RawImage], scale: int) -> int:
    """What the outputs for these images take on the disk."""
    shapes = [image.shape for image in images]
    return sum(
        RawImage((scale * height, scale * width, channels), 'uint16', '').stored_bytes
        for height, width, channels in shapes
    )


def upscaler(teacher: nn.Module, images: RawDatabase, scale: int, self_ensemble: bool) -> Callable[[str], np.ndarray]:
    """What makes the output for an image, by its key: each by itself, uint16, see :func:`to_stored`."""
    try:
        upscale = Upscaler(teacher)
    except InputError as error:
        raise InputError(f'network_t.precompute: {error}') from error
    if upscale.scale != scale:
        raise InputError(
            f'network_t.precompute needs a teacher of scale {scale}, the scale of the file, got {upscale.scale}.'
        )
    for key, raw in images.images.items():
        if raw.shape[2] != upscale.channels:
            raise InputError(
                f'network_t.precompute needs images of {upscale.channels} channels, as the teacher takes them, got '
                f'{raw.shape[2]} in {key} of {images.path}.'
            )

    def output(key: str) -> np.ndarray:
        image = images.view(key)[:, :]
        pixels = image.astype(np.float32) / (65535.0 if image.dtype == np.uint16 else 255.0)
        return to_stored(mean_of_turns(upscale, pixels) if self_ensemble else upscale(pixels))

    return output


def mean_of_turns(upscale: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """The mean of what becomes of an image (H, W, C) in its eight flips and rotations, each turned back."""
    outputs = []
    for mirror in (1, -1):
        for turns in range(4):
            turned = np.ascontiguousarray(np.rot90(image[:, ::mirror], turns))
            outputs.append(np.rot90(upscale(turned), -turns)[:, ::mirror])
    return np.asarray(np.mean(outputs, 0))


def to_stored(output: np.ndarray) -> np.ndarray:
    """Values from -0.5 to 1.5 as uint16; what is beyond is clipped."""
    scaled = (np.clip(output, TAUGHT_LOW, TAUGHT_HIGH) - TAUGHT_LOW) * (65535 / (TAUGHT_HIGH - TAUGHT_LOW))
    return np.asarray(np.rint(scaled), np.uint16)


class Outputs:
    """A raw database that grows image by image, each put on the disk before the next, until it is finished.

    ``meta_info.txt``, without which nothing takes it for a database, is written at the end; until then the lines of it
    are stored with the images.

    Args:
        folder: Where it is, or begins.

    Attributes:
        lines: {key: line of ``meta_info.txt``} of the images that are there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._environment = lmdb.open(os.fsencode(folder), map_size=FIRST_MAP_BYTES, lock=False)
        meta = folder / META
        if meta.exists():  # it was about to be moved into place
            self.lines = {line.split('.')[0]: line for line in meta.read_text('ascii').splitlines(keepends=True)}
            return
        with self._environment.begin() as transaction:
            pairs = ((key, value) for key, value in transaction.cursor() if b'.' not in key)
            self.lines = {key.decode(): value.decode() for key, value in pairs}

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *error: object) -> None:
        self._environment.close()

    def add(self, key: str, image: np.ndarray) -> None:
        """Add an image: all of it is on the disk afterwards, or nothing."""
        line = raw_line(key, describe(image))
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for name, band in raw_values(key, image):
                        transaction.put(name, band.data)
                    transaction.put(key.encode(), line.encode())
                break
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()['map_size'])
        self.lines[key] = line

    def finish(self, keys: list[str]) -> None:
        """Write ``meta_info.txt`` of these images, in their order; may be called again after a kill."""
        meta = self.folder / META
        if not meta.exists():
            with open(self.folder / UNFINISHED_META, 'w', encoding='ascii') as file:
                file.writelines(self.lines[key] for key in keys)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.folder / UNFINISHED_META, meta)
        with self._environment.begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key.encode())
