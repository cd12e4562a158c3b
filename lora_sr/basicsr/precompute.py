"""A teacher's outputs over whole training images, made once and stored beside them as a raw database."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

import lmdb
import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from lora_sr.basicsr import signals
from lora_sr.basicsr.integer_images import TAUGHT_HIGH, TAUGHT_LOW
from lora_sr.checkpoints.origin import adapter_fingerprint, fingerprint
from lora_sr.data.lmdb_store import FIRST_MAP_BYTES, RawDatabase, RawImage, describe, raw_line, raw_values
from lora_sr.errors import InputError, is_first_process
from lora_sr.files import lock_path
from lora_sr.runtime.upscaler import Upscaler

LOG = logging.getLogger('basicsr')
FORM = 1  # of what is stored: another number makes all of it anew
META, UNFINISHED_META = 'meta_info.txt', 'meta_info.partial'
SECONDS_OF_WAITING = 1


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

    Each is stored as it is made: after a kill the next call goes on. Of several processes one works, the others wait.

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
    if path.exists():
        return
    images = RawDatabase(os.path.expanduser(root))
    upscale = upscaler(teacher, images, scale, self_ensemble)
    folder = path.with_name(f'.{path.name}.partial')
    while not path.exists():
        lock = None
        try:
            folder.mkdir(exist_ok=True)
            lock = lock_path(folder)
            if lock is None and not is_first_process():  # where nothing can be locked, two would write into one file
                raise BlockingIOError
            if path.exists():  # the process that had the lock has just finished
                shutil.rmtree(folder, ignore_errors=True)
                break
            with Outputs(folder) as outputs:
                left = [key for key in images.images if key not in outputs.lines]
                needed, free = _bytes_of(images, left, scale), shutil.disk_usage(folder).free
                if needed > free:
                    raise InputError(
                        f'network_t.precompute needs {needed / 1e9:.1f} GB beside {root} for the outputs of the '
                        f'teacher, got {free / 1e9:.1f} GB.'
                    )
                LOG.info(
                    f'The teacher: {len(left):,} of {len(images.images):,} images of {root} are left to compute, '
                    f'{needed / 1e9:.1f} GB.'
                )
                for key in tqdm(left, unit='image', disable=None if sys.stderr else True):
                    _stop_if_told(len(outputs.lines), len(images.images))
                    outputs.add(key, upscale(key))
                outputs.finish(list(images.images))
            os.rename(folder, path)
        except BlockingIOError:
            time.sleep(SECONDS_OF_WAITING)
        except (OSError, lmdb.Error) as error:
            raise InputError(f'{path}: the outputs of the teacher cannot be written there ({error}).') from error
        finally:
            if lock is not None:
                os.close(lock)
    LOG.info(f'The outputs of the teacher for {root} are in {path}.')


def _stop_if_told(done: int, total: int) -> None:
    """End the run, which has not begun to train, if a signal has come."""
    if signals.is_told():
        print(
            f'stopped: {done:,} of {total:,} outputs of the teacher are stored; the same command goes on from there',
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(0)


def _bytes_of(images: RawDatabase, keys: list[str], scale: int) -> int:
    """What the outputs for these images take on the disk."""
    shapes = [images.images[key].shape for key in keys]
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
        self._folder = folder
        self._environment = lmdb.open(os.fsencode(folder), map_size=FIRST_MAP_BYTES, lock=False)
        meta = folder / META
        if meta.exists():  # it was about to be moved into place
            self.lines = {line.split('.')[0]: line for line in meta.read_text('ascii').splitlines(keepends=True)}
            return
        with self._environment.begin() as transaction:
            keys = transaction.cursor().iternext(values=False)  # with them all images would be read
            lines = {key.decode(): transaction.get(key, b'') for key in keys if b'.' not in key}
        self.lines = {key: line.decode() for key, line in lines.items()}

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
        meta = self._folder / META
        if not meta.exists():
            with open(self._folder / UNFINISHED_META, 'w', encoding='ascii') as file:
                file.writelines(self.lines[key] for key in keys)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._folder / UNFINISHED_META, meta)
        with self._environment.begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key.encode())
