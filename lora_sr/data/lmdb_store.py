"""Image databases in BasicSR's form: an LMDB of PNG bytes, and ``meta_info.txt`` with a line for each key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import cv2
import lmdb
import numpy as np

from lora_sr.errors import InputError, shown
from lora_sr.files import check_regular
from lora_sr.images.png import PNG_END, PNG_SIGNATURE

Shape = tuple[int, int, int]  # height, width, channels

BATCH_BYTES = 1 << 25  # what waits for one transaction; bounds the memory of a writer
FIRST_MAP_BYTES = 1 << 28  # doubled whenever the database outgrows it
CHECKED_AT_ONCE = 500
MOST_BYTES_OF_LIST = 1 << 30  # some ten million names, each with its size
DATA_FILE = 'data.mdb'  # in the folder of a database

_META_LINE = re.compile(r'([^.]+)\.png \((\d{1,9}),(\d{1,9}),(\d{1,9})\) \d+')


def bytes_of_pages(environment: lmdb.Environment) -> int:
    """How many bytes the file of a database has at least."""
    return int((environment.info()['last_pgno'] + 1) * environment.stat()['psize'])


def check_whole(path: str, needed: int) -> None:
    """Check that the file of a database has all its pages: to read beyond its end kills the process.

    Args:
        path: The folder of the database.
        needed: Its bytes when it was opened. Later, to ask for them is to read.

    Raises:
        InputError: It has been cut short, or is gone.
    """
    file = os.path.join(path, DATA_FILE)
    try:
        size = os.stat(file).st_size
    except OSError as error:
        raise InputError(f'the database {path} cannot be read: {error.strerror}') from None
    if size < needed:
        raise InputError(f'the database {path} is damaged: {DATA_FILE} has {size} bytes of {needed}')


def open_list(path: str | os.PathLike[str], encoding: str) -> TextIO:
    """Open a text file that names an image in each line.

    Raises:
        InputError: It is no file, or too large to be a list.
        OSError: It cannot be opened. What is no text raises UnicodeDecodeError when it is read.
    """
    check_regular(path, 'the list')
    size = os.stat(path).st_size
    if size > MOST_BYTES_OF_LIST:
        raise InputError(f'{path} must be a list of images of at most 1 GiB, got {size / (1 << 30):.1f} GiB')
    return open(path, encoding=encoding)


class LmdbWriter:
    """Writes a new database; ``meta_info.txt`` appears when ``finish`` has put everything on the disk.

    Args:
        path: a folder that does not exist yet.

    Raises:
        OSError, lmdb.Error: if the disk is full or cannot be written; from any method.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self._path = path
        self._meta = open(path / 'meta_info.partial', 'x', encoding='ascii')
        # Nobody reads the database before it is finished, so there are no locks and one sync, at the end.
        self._env = lmdb.open(os.fsencode(path), map_size=FIRST_MAP_BYTES, lock=False, sync=False)
        self._batch: list[tuple[bytes, np.ndarray]] = []
        self._batch_bytes = 0

    def put(self, key: str, png: np.ndarray, height: int, width: int) -> None:
        """Add a 3-channel image under an ASCII key without full stops."""
        self._meta.write(f'{key}.png ({height},{width},3) 1\n')
        self._batch.append((key.encode('ascii'), png))
        self._batch_bytes += len(png)
        if self._batch_bytes >= BATCH_BYTES:
            self._commit()

    def put_all(self, path: Path) -> None:
        """Add all images of another database, which is whole."""
        with (
            lmdb.open(os.fsencode(path), readonly=True, lock=False) as env,
            env.begin(buffers=True) as transaction,
            open(path / 'meta_info.txt', encoding='ascii') as lines,
        ):
            self._meta.writelines(lines)
            for key, value in transaction.cursor():
                self._batch.append((bytes(key), np.array(value)))
                self._batch_bytes += len(value)
                if self._batch_bytes >= BATCH_BYTES:
                    self._commit()

    def finish(self) -> None:
        """Commit, put everything on the disk, and only then give the meta file its name."""
        self._commit()
        self._env.sync(True)
        self._meta.flush()
        os.fsync(self._meta.fileno())
        self.close()
        os.rename(self._path / 'meta_info.partial', self._path / 'meta_info.txt')

    def close(self) -> None:
        """Let go of the files. Without ``finish`` the folder stays unfinished."""
        self._env.close()
        self._meta.close()

    def _commit(self) -> None:
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, png in self._batch:
                        transaction.put(key, png.data)
                break
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()['map_size'])
        self._batch.clear()
        self._batch_bytes = 0


def read_meta_info(path: str | os.PathLike[str]) -> dict[str, Shape]:
    """Read the ``meta_info.txt`` of a database.

    Args:
        path: the folder of the database.

    Returns:
        {key: (height, width, channels)}, in the file's order.

    Raises:
        InputError: if the file is missing or larger than a list, a line is not of the form ``KEY.png (h,w,c) 1``, or a
            key comes twice.
    """
    meta_path = Path(path) / 'meta_info.txt'
    shapes: dict[str, Shape] = {}
    try:
        with open_list(meta_path, 'ascii') as lines:
            for number, line in enumerate(lines, 1):
                match = _META_LINE.fullmatch(line.rstrip('\n'))
                if not match or match[1] in shapes:
                    raise InputError(
                        f'{meta_path}, line {number}: "{shown(line.rstrip())}" is not a new key in the form '
                        '`KEY.png (height,width,channels) compression`.'
                    )
                shapes[match[1]] = int(match[2]), int(match[3]), int(match[4])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'{meta_path} cannot be read ({error}): a database made by `lora-sr prepare` has this '
            'file, with a line for each key.'
        ) from error
    return shapes


def check_databases(hr_path: Path, lr_paths: Mapping[int, Path], samples: int = 4) -> None:
    """Check that an HR database and its LR databases are whole and fit together.

    Every database must have exactly the keys of its meta file; all must have the same keys in the same order; every
    value must be a PNG whose header has the size in the meta file and which has its end; an HR image must be ``scale``
    times its LR image. ``samples`` images of each database, first and last among them, are decoded.

    Args:
        hr_path: the folder of the HR database.
        lr_paths: {scale: folder of the LR database}.

    Raises:
        InputError: naming the database, and the key, where it is not so.
    """
    hr_shapes = read_meta_info(hr_path)
    _check_values(hr_path, hr_shapes, samples)
    for scale, lr_path in lr_paths.items():
        lr_shapes = read_meta_info(lr_path)
        _check_values(lr_path, lr_shapes, samples)
        if list(lr_shapes) != list(hr_shapes):
            raise InputError(
                f'{lr_path} and {hr_path} have different keys ({len(lr_shapes)} and {len(hr_shapes)}), '
                'where each LR image needs its HR image.'
            )
        for key, (height, width, channels) in lr_shapes.items():
            if hr_shapes[key] != (height * scale, width * scale, channels):
                raise InputError(
                    f'{lr_path}: {key} has {_size(lr_shapes[key])} and its HR image {_size(hr_shapes[key])}, '
                    f'which is not {scale} times as large.'
                )


def _size(shape: Shape) -> str:
    height, width, channels = shape
    return f'{width} x {height} pixels of {channels} channels'


def _check_values(path: Path, shapes: Mapping[str, Shape], samples: int) -> None:
    keys = list(shapes)
    decoded = {keys[round(i * (len(keys) - 1) / max(samples - 1, 1))] for i in range(samples)} if keys else set()
    # Pages once looked at stay in the process's memory until the map is closed: it is opened for some keys at a time.
    for start in range(0, max(len(keys), 1), CHECKED_AT_ONCE):
        with (
            lmdb.open(os.fsencode(path), readonly=True, lock=False, readahead=False) as env,
            env.begin(buffers=True) as transaction,
        ):
            entries = transaction.stat()['entries']
            if entries != len(shapes):
                raise InputError(
                    f'{path}: the database has {entries} entries and its meta_info.txt {len(shapes)}, '
                    'where the two must agree.'
                )
            for key in keys[start : start + CHECKED_AT_ONCE]:
                if not _is_png_of_shape(transaction.get(key.encode('ascii')), shapes[key], key in decoded):
                    raise InputError(
                        f'{path}: {key} is not a whole PNG image of {_size(shapes[key])}, as meta_info.txt says it is.'
                    )


def _is_png_of_shape(value: memoryview | None, shape: Shape, decode: bool) -> bool:
    # At the start of a PNG are its signature and the IHDR chunk: length, name, width, height.
    if (
        value is None
        or value[:8] != PNG_SIGNATURE
        or value[-12:] != PNG_END
        or int.from_bytes(value[16:20], 'big') != shape[1]
        or int.from_bytes(value[20:24], 'big') != shape[0]
    ):
        return False
    if not decode:
        return True
    image = cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_UNCHANGED)
    return image is not None and image.shape == shape
