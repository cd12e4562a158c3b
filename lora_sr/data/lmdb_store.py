"""Image databases: an LMDB, and ``meta_info.txt`` with a line for each key.

In BasicSR's form a value is a PNG. In the raw one an image is as many values as it has bands of :data:`BAND` bytes,
``KEY.00000`` and so on: rows of pixels, RGB, so that a patch is read without the rest of its image. A single value
would not do, since py-lmdb touches every page of one. The line of a raw image has its shape and type, and a checksum:
``KEY.raw (height,width,channels) uint8 CRC32``.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import cv2
import lmdb
import numpy as np

from lora_sr.errors import InputError, shown
from lora_sr.files import check_regular, identity
from lora_sr.images.png import PNG_END, PNG_SIGNATURE

Shape = tuple[int, int, int]  # height, width, channels
PAGE, PAGE_HEADER = 4096, 16  # bytes; a large value has one header
BAND = 64 * PAGE - PAGE_HEADER  # bytes of raw rows in one value, at most, or of a single row


class RawImage(NamedTuple):
    """What ``meta_info.txt`` says of a raw image: its shape, ``uint8`` or ``uint16``, and the CRC-32 of its bytes."""

    shape: Shape
    dtype: str
    checksum: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[1] * self.shape[2] * np.dtype(self.dtype).itemsize

    @property
    def band_rows(self) -> int:
        """Rows of each band; the last may have fewer."""
        return max(1, BAND // self.row_bytes)

    @property
    def bands(self) -> int:
        """How many bands there are."""
        return -(-self.shape[0] // self.band_rows)

    def band_bytes(self, band: int) -> int:
        """Bytes of a band, counted from 0."""
        return min(self.band_rows, self.shape[0] - band * self.band_rows) * self.row_bytes

    @property
    def stored_bytes(self) -> int:
        """What it takes in a database."""
        return sum(-(-(self.band_bytes(band) + PAGE_HEADER) // PAGE) * PAGE for band in range(self.bands))


BATCH_BYTES = 1 << 25  # what waits for one transaction; bounds the memory of a writer
FIRST_MAP_BYTES = 1 << 28  # doubled whenever the database outgrows it
CHECKED_AT_ONCE = 500
MOST_BYTES_OF_LIST = 1 << 30  # some ten million names, each with its size
DATA_FILE = 'data.mdb'  # in the folder of a database

RAW_TYPES = {'uint8': '<u1', 'uint16': '<u2'}

_META_LINE = re.compile(r'([^.]+)\.png \((\d{1,9}),(\d{1,9}),(\d{1,9})\) \d+')
_RAW_LINE = re.compile(r'([^.]+)\.raw \((\d{1,9}),(\d{1,9}),([1-4])\) (uint8|uint16) ([0-9a-f]{8})')

_opening = threading.Lock()
_databases: weakref.WeakValueDictionary[str, lmdb.Environment] = weakref.WeakValueDictionary()
# Which file it is, and how many bytes it needs.
_opened: weakref.WeakKeyDictionary[lmdb.Environment, tuple[tuple[int, int] | None, int]] = weakref.WeakKeyDictionary()


def open_database(path: str, **settings: Any) -> lmdb.Environment:
    """Open a database for reading, once in a process: lmdb refuses to do it twice.

    A forked worker goes on with its parent's: read-only and without locks it is a mere memory map, and lmdb would
    refuse to open it anew there.

    Args:
        path: Its folder.
        settings: Of ``lmdb.open``; by default without locks and read-ahead.

    Raises:
        InputError: It cannot be opened.
    """
    key = os.path.realpath(path)
    with _opening:  # by one thread
        environment = _databases.get(key)
        if environment is None:
            settings = {'readonly': True, 'lock': False, 'readahead': False, **settings}
            try:
                environment = _databases[key] = lmdb.open(os.fspath(path), **settings)
                _opened[environment] = identity(os.path.join(path, DATA_FILE)), bytes_of_pages(environment)
            except lmdb.Error as error:
                raise InputError(f'the database {path} cannot be opened: {error}') from error
    return environment


def check_still_whole(environment: lmdb.Environment) -> None:
    """Check that a file that ``open_database`` has opened has all its pages still.

    Raises:
        InputError: It has been cut short since.
    """
    opened = _opened.get(environment)
    if opened is None:
        return
    file, needed = opened
    path = os.path.join(environment.path(), DATA_FILE)
    try:
        state = os.stat(path)
    except OSError:
        return
    # Another file of that name is not the one that is read, which may be whole though it has no name.
    if file == (state.st_dev, state.st_ino) and state.st_size < needed:
        check_whole(environment.path(), needed)


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
        self._put(key.encode('ascii'), png)

    def put_raw(self, key: str, image: np.ndarray) -> None:
        """Add an image as it is, uint8 or uint16 of shape (height, width, 1 to 4 channels), RGB, under such a key."""
        raw = describe(image)
        self._meta.write(raw_line(key, raw))
        for name, band in raw_values(key, image):
            self._put(name, band)

    def _put(self, key: bytes, value: np.ndarray) -> None:
        self._batch.append((key, value))
        self._batch_bytes += value.nbytes
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


def describe(image: np.ndarray) -> RawImage:
    """What ``meta_info.txt`` says of an image, uint8 or uint16 of shape (height, width, 1 to 4 channels), RGB."""
    height, width, channels = image.shape
    pixels = np.ascontiguousarray(image, RAW_TYPES[image.dtype.name])
    return RawImage((height, width, channels), image.dtype.name, f'{zlib.crc32(pixels.data):08x}')


def raw_line(key: str, image: RawImage) -> str:
    """The line of ``meta_info.txt``."""
    height, width, channels = image.shape
    return f'{key}.raw ({height},{width},{channels}) {image.dtype} {image.checksum}\n'


def raw_values(key: str, image: np.ndarray) -> list[tuple[bytes, np.ndarray]]:
    """The bands of an image, each with its key."""
    pixels = np.ascontiguousarray(image, RAW_TYPES[image.dtype.name])
    raw = RawImage(image.shape, image.dtype.name, '')
    starts = range(0, len(pixels), raw.band_rows)
    return [(band_key(key, band), pixels[top : top + raw.band_rows]) for band, top in enumerate(starts)]


def band_key(key: str, band: int) -> bytes:
    """The key of a band, counted from 0; those of an image stand in order."""
    return f'{key}.{band:05}'.encode('ascii')


def read_meta_info(path: str | os.PathLike[str]) -> dict[str, Shape]:
    """Read the ``meta_info.txt`` of a database of PNGs.

    Args:
        path: the folder of the database.

    Returns:
        {key: (height, width, channels)}, in the file's order.

    Raises:
        InputError: if the file is missing or larger than a list, a line is not of the form ``KEY.png (h,w,c) 1``, or a
            key comes twice.
    """
    return {
        match[1]: (int(match[2]), int(match[3]), int(match[4]))
        for match in _read_lines(path, _META_LINE, 'KEY.png (height,width,channels) compression')
    }


def read_raw_meta_info(path: str | os.PathLike[str]) -> dict[str, RawImage]:
    """Read the ``meta_info.txt`` of a database of raw images.

    Args:
        path: the folder of the database.

    Returns:
        {key: what the image is}, in the file's order.

    Raises:
        InputError: if the file is missing or larger than a list, a line is not of the form
            ``KEY.raw (h,w,c) uint8 CRC32``, or a key comes twice.
    """
    return {
        match[1]: RawImage((int(match[2]), int(match[3]), int(match[4])), match[5], match[6])
        for match in _read_lines(path, _RAW_LINE, 'KEY.raw (height,width,channels) uint8|uint16 CRC32')
    }


def is_raw(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a database of raw images, by the first line of its list."""
    try:
        with open_list(Path(path) / 'meta_info.txt', 'ascii') as lines:
            return _RAW_LINE.fullmatch(lines.readline().rstrip('\n')) is not None
    except (InputError, OSError, UnicodeDecodeError):
        return False


def _read_lines(path: str | os.PathLike[str], pattern: re.Pattern[str], form: str) -> Iterator[re.Match[str]]:
    """The lines of ``meta_info.txt``, each of a new key."""
    meta_path = Path(path) / 'meta_info.txt'
    keys: set[str] = set()
    try:
        with open_list(meta_path, 'ascii') as lines:
            for number, line in enumerate(lines, 1):
                match = pattern.fullmatch(line.rstrip('\n'))
                if not match or match[1] in keys:
                    raise InputError(
                        f'{meta_path}, line {number}: "{shown(line.rstrip())}" is not a new key in the form `{form}`.'
                    )
                keys.add(match[1])
                yield match
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'{meta_path} cannot be read ({error}): a database made by `lora-sr prepare` has this '
            'file, with a line for each key.'
        ) from error


class RawDatabase:
    """Raw images straight out of the memory map of their database, which each process opens for itself.

    Args:
        path: Its folder.

    Attributes:
        images: {key: what the image is}, in the order of ``meta_info.txt``.

    Raises:
        InputError: ``meta_info.txt`` is missing or of another form.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.images = read_raw_meta_info(path)
        self._environment: lmdb.Environment | None = None

    def view(self, key: str) -> RawView:
        """An image that is read where it is cut.

        Raises:
            InputError: There is none of that key.
        """
        image = self.images.get(key)
        if image is None:
            raise InputError(f'the database {self.path} has no image {key}')
        return RawView(self, key, image)

    def cut(self, key: str, rows: slice, columns: slice) -> np.ndarray:
        """A part of an image, within it: an array of its own, of shape (rows, columns, channels), RGB.

        Raises:
            InputError: The file is damaged or gone.
        """
        if self._environment is None:
            self._environment = open_database(self.path)
        check_still_whole(self._environment)
        image = self.images[key]
        height, width, channels = image.shape
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start, channels), image.dtype)
        step, row_bytes = image.band_rows, image.row_bytes
        try:
            with self._environment.begin(buffers=True) as transaction:
                for band in range(rows.start // step, -(-rows.stop // step)):
                    value = transaction.get(band_key(key, band))
                    if value is None or len(value) != min(step, height - band * step) * row_bytes:
                        raise InputError(f'the database {self.path} is damaged: {key} is not whole')
                    pixels = np.frombuffer(value, RAW_TYPES[image.dtype]).reshape(-1, width, channels)
                    first, last = max(rows.start, band * step), min(rows.stop, (band + 1) * step)
                    kept = pixels[first - band * step : last - band * step, columns]
                    part[first - rows.start : last - rows.start] = kept
        except lmdb.Error as error:
            raise InputError(f'the database {self.path} is damaged: {error}') from error
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_environment': None}


class RawView:
    """An image of a database that looks like an array, and is read where it is cut: ``view[top:bottom, left:right]``.

    Attributes:
        shape: (height, width, channels).
    """

    def __init__(self, database: RawDatabase, key: str, image: RawImage):
        self._database, self._key = database, key
        self.shape = image.shape

    def __getitem__(self, place: Any) -> np.ndarray:
        """A part of it, as an array of its own; steps and further axes are not known here."""
        rows, columns = (slice(*cut.indices(length)[:2]) for cut, length in zip(place[:2], self.shape))
        return self._database.cut(self._key, rows, columns)


def check_databases(hr_path: Path, lr_paths: Mapping[int, Path], samples: int = 4) -> None:
    """Check that an HR database and its LR databases are whole and fit together.

    Every database must have exactly the keys of its meta file; all must have the same keys in the same order; every
    value must be a PNG whose header has the size in the meta file and which has its end, or be a raw image with its
    checksum; an HR image must be ``scale`` times its LR image. ``samples`` PNGs of each database, first and last among
    them, are decoded.

    Args:
        hr_path: the folder of the HR database.
        lr_paths: {scale: folder of the LR database}.

    Raises:
        InputError: naming the database, and the key, where it is not so.
    """
    hr_shapes = _check_database(hr_path, samples)
    for scale, lr_path in lr_paths.items():
        lr_shapes = _check_database(lr_path, samples)
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


def _check_database(path: Path, samples: int) -> dict[str, Shape]:
    """The shapes of what is in a database, all of which has been checked."""
    raw = read_raw_meta_info(path) if is_raw(path) else {}
    shapes = {key: image.shape for key, image in raw.items()} or read_meta_info(path)
    entries = sum(image.bands for image in raw.values()) or len(shapes)
    keys = list(shapes)
    decoded = {keys[round(i * (len(keys) - 1) / max(samples - 1, 1))] for i in range(samples)} if keys else set()
    # Pages once looked at stay in the process's memory until the map is closed: it is opened for some keys at a time.
    for start in range(0, max(len(keys), 1), CHECKED_AT_ONCE):
        with (
            lmdb.open(os.fsencode(path), readonly=True, lock=False, readahead=False) as env,
            env.begin(buffers=True) as transaction,
        ):
            found = transaction.stat()['entries']
            if found != entries:
                raise InputError(
                    f'{path}: the database has {found} entries and its meta_info.txt {entries}, '
                    'where the two must agree.'
                )
            for key in keys[start : start + CHECKED_AT_ONCE]:
                if key in raw:
                    is_whole = is_raw_whole(transaction, key, raw[key])
                else:
                    value = transaction.get(key.encode('ascii'))
                    is_whole = _is_png_of_shape(value, shapes[key], key in decoded)
                if not is_whole:
                    kind = 'raw image' if key in raw else 'PNG image'
                    raise InputError(
                        f'{path}: {key} is not a whole {kind} of {_size(shapes[key])}, as meta_info.txt says it is.'
                    )
    return shapes


def _size(shape: Shape) -> str:
    height, width, channels = shape
    return f'{width} x {height} pixels of {channels} channels'


def is_raw_whole(transaction: lmdb.Transaction, key: str, image: RawImage) -> bool:
    """Whether all bands of a raw image are there; all of them are read."""
    checksum = 0
    for band in range(image.bands):
        value = transaction.get(band_key(key, band))
        if value is None or len(value) != image.band_bytes(band):
            return False
        checksum = zlib.crc32(value, checksum)
    return f'{checksum:08x}' == image.checksum


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
