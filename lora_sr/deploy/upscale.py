"""`lora-sr upscale`: images through a network, from files to files."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import struct
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple, NoReturn, Sequence

import numpy as np
import torch
from tqdm import tqdm

from lora_sr.checkpoints import NetworkLike, load_network
from lora_sr.errors import InputError
from lora_sr.files import identity, replacing, write_errors
from lora_sr.images.blocks import Run
from lora_sr.images.encoding import check_format, kinds_left_out, write_picture
from lora_sr.images.formats import FORMATS, SUFFIXES, Picture, format_of, read_picture
from lora_sr.runtime.upscaler import Upscaler, check_alpha, use_own_gpu
from lora_sr.share import Share

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
DEFAULT_QUALITY = 95
BURST_SECONDS = 1.0  # of the network between two bursts of writing
WAITING_BYTES = 1 << 29  # of results that wait for being written; one may always wait
WHOLE_BYTES = 1 << 28  # of a result beyond which it is written as it is made
READ_AHEAD_BYTES = 1 << 28  # of pictures that wait for the network


@dataclass(frozen=True)
class UpscaleReport:
    """What :func:`upscale` did.

    Args:
        images: How many were written.
        seconds: From reading the first to having written the last, loading the network not counted.
        failures: Input -> why it was not upscaled, in one sentence that names it.
        notes: What the user should know besides.
    """

    images: int
    seconds: float
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.images / self.seconds if self.seconds else 0.0
        failed = f', {len(self.failures)} failed' if self.failures else ''
        return (
            f'{self.images} image{"" if self.images == 1 else "s"} in {self.seconds:.1f} s, {rate:.2f} images/s{failed}'
        )


class Job(NamedTuple):
    """An image to read, and where its result goes."""

    source: Path
    target: Path

    @property
    def file_format(self) -> str:
        """What is written, a key of ``FORMATS``: the suffix of the target tells."""
        name = format_of(self.target)
        assert name is not None  # :func:`plan` makes no others
        return name


def upscale(
    inputs: Sequence[str | os.PathLike],
    model: NetworkLike,
    output: str | os.PathLike,
    tile: int | None = None,
    dtype: torch.dtype = torch.float32,
    file_format: str | None = None,
    quality: int = DEFAULT_QUALITY,
    overwrite: bool = False,
    progress: bool = False,
    skip_existing: bool = False,
    alpha: str = 'bicubic',
    share: Share | None = None,
) -> UpscaleReport:
    """Upscale image files. Reading and writing are done in threads beside the network, see :func:`run_jobs`.

    Pixels of 8 and 16 bits and floating point, gray, alpha, ICC profile and EXIF are kept; and XMP, IPTC, resolution,
    comments, and what a PNG says of its colors and in texts, where the format that is written can hold them: a note of
    the report names what is lost. Another names an image of floating point with values beyond 0 to 1. An EXIF
    orientation is applied to the pixels and reset, so that every viewer shows the same; a thumbnail in EXIF is left
    out.

    Args:
        inputs: Image files, folders and glob patterns. Folders are searched with their sub-folders, which the output
            gets as well; hidden files are left out, and so is the output.
        model: See :func:`lora_sr.load_network`.
        output: A folder, made if it is missing; or a file, for one image.
        tile: See :class:`Upscaler`.
        dtype: See :class:`Upscaler`.
        file_format: A key of ``FORMATS``: what is written; by default each image's own.
        quality: See :func:`lora_sr.images.encoding.write_picture`.
        overwrite: Replace outputs that exist; inputs are never replaced.
        progress: Show a progress bar, if stderr is a terminal.
        skip_existing: Leave out images whose outputs exist, as after a run that was stopped: what it wrote is whole.
        alpha: See the call of :class:`Upscaler`.
        share: Upscale this process's images only, see :mod:`lora_sr.share`; on its own GPU, where there are several.

    Returns:
        What was done. An image that cannot be read, upscaled or held by its format is among the ``failures`` and does
        not stop the rest.

    Raises:
        InputError: An input is missing or holds no images; two would have one output, or an output exists, is an input
            or is of no format that is written; outputs that exist are to be both replaced and skipped; a checkpoint or
            an adapter cannot be used; the tile is too small; or the output cannot be written, which stops the run. No
            file is left half-written.
    """
    if overwrite and skip_existing:
        raise InputError('Outputs that exist can be replaced with --overwrite or kept with --skip-existing, not both.')
    if not 1 <= quality <= 100:
        raise InputError(f'The quality is {quality}, where a whole number from 1 to 100 is right.')
    check_alpha(alpha)
    if not os.fspath(output):
        raise InputError('The output is empty, where a folder, or a file for one image, is right.')
    output = Path(output)
    planned, failures = plan(inputs, output, file_format, overwrite or skip_existing, share)
    jobs = [job for job in planned if not (skip_existing and os.path.lexists(job.target))]
    notes = []
    if len(jobs) < len(planned):
        skipped = len(planned) - len(jobs)
        notes.append(f'{skipped} image{"" if skipped == 1 else "s"} skipped, as the output exists.')
    if not jobs and (planned or share is not None):
        return UpscaleReport(0, 0.0, failures, notes)
    folder = output.parent if jobs and jobs[0].target == output else output
    left_out: dict[str, list[str]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    with _writable(folder, is_shared=share is not None), warnings.catch_warnings():
        warnings.filterwarnings('ignore', module='PIL')  # of files that are reported, or read none the less
        if share is not None:
            use_own_gpu(share)
        upscaler = Upscaler(load_network(model), tile, dtype)
        start = time.perf_counter()
        with tqdm(total=len(jobs), unit='image', disable=None if progress else True) as bar:
            failures.update(run_jobs(jobs, upscaler, quality, bar, left_out, alpha, ranges))
        seconds = time.perf_counter() - start
    if upscaler.looks_everywhere:
        notes.append(
            f'{upscaler.name} looks at the whole image, so that tiles differ from it and from each other: where memory '
            'allows, a larger --tile, or none, is better.'
        )
    left_out = {source: kinds for source, kinds in left_out.items() if source not in failures}
    if left_out:
        names = sorted(set().union(*left_out.values()), key=str.lower)
        notes.append(f'{_first_of(left_out)} lost what could not be kept: {", ".join(names)}.')
    ranges = {source: values for source, values in ranges.items() if source not in failures}
    if ranges:
        lowest, highest = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
        notes.append(
            f'{_first_of(ranges)} went through the network with values from {lowest:.4g} to {highest:.4g}, where '
            'networks are trained on 0 to 1.'
        )
    unread = [job for job in jobs if str(job.source) in failures]
    return UpscaleReport(len(jobs) - len(unread), seconds, failures, notes)


def _first_of(sources: Mapping[str, object]) -> str:
    others = f' and {len(sources) - 1} more' if len(sources) > 1 else ''
    return f'{next(iter(sources))}{others}'


def plan(
    inputs: Sequence[str | os.PathLike],
    output: Path,
    file_format: str | None = None,
    may_exist: bool = False,
    share: Share | None = None,
) -> tuple[list[Job], dict[str, str]]:
    """Which image goes where, and which inputs are no images by their names. Nothing is read or written.

    Of a share that is its own part; what the others write meanwhile is not looked at.

    Raises:
        InputError: As :func:`upscale` does, as far as names can tell.
    """
    found = [image for argument in inputs for image in _find_images(argument, output)]
    if not found:
        raise InputError('No input is given, where images, folders or patterns are right.')
    is_file = format_of(output) is not None and not output.is_dir()
    if is_file and (len(found) > 1 or Path(inputs[0]).is_dir()):
        raise InputError(f'The output {output} is a file, where a folder is right for folders and for several images.')
    if is_file and file_format not in (None, format_of(output)):
        raise InputError(f'The output {output} is no {file_format} file: it should end in {FORMATS[file_format][0]}.')
    if not is_file and output.exists() and not output.is_dir():
        raise InputError(f'The output {output} is a file, where a folder is right, or another name.')
    if not is_file and output.suffix and not output.exists() and len(inputs) == 1 and Path(inputs[0]).is_file():
        raise InputError(
            f'The output {output} ends in {output.suffix}, where {", ".join(SUFFIXES)} are right for a file: a folder '
            'with a dot in its name has to exist.'
        )
    jobs: dict[Path, Job] = {}
    failures = {}
    for source, name in found:
        if format_of(source) is None:
            failures[str(source)] = f'{source} is no image by its name, which should end in {", ".join(SUFFIXES)}.'
            continue
        if file_format is not None and format_of(source) != file_format:
            name = name.with_suffix(FORMATS[file_format][0])
        target = output if is_file else output / name
        other = jobs.setdefault(target, Job(source, target)).source
        if os.path.realpath(other) != os.path.realpath(source):
            raise InputError(
                f'{other} and {source} would have the same output, {target}: rename one, or upscale them into two '
                'folders.'
            )
    own = list(jobs.values())
    if share is not None:
        own, failures = share.of(own), dict(share.of(list(failures.items())))
    _check_targets(own, may_exist, [job.source for job in jobs.values()])
    return own, failures


def _find_images(argument: str | os.PathLike, output: Path) -> list[tuple[Path, Path]]:
    """The images that an argument stands for, each with its name in the output folder."""
    if not os.fspath(argument):
        raise InputError('An input is empty, where an image, a folder or a pattern is right.')
    path = Path(argument)
    if path.is_dir():
        found = _search(path, output)
    elif path.exists() and not path.is_file():  # a pipe, which would be waited for, or a device
        raise InputError(f'{argument} is neither a file nor a folder, as images are given.')
    elif os.path.lexists(path):
        return [(path, Path(path.name))]
    elif glob.has_magic(os.fspath(argument)):
        matches = map(Path, sorted(glob.glob(os.fspath(argument), recursive=True)))
        found = [(match, Path(match.name)) for match in matches if match.is_file() and format_of(match)]
    else:
        raise InputError(f'There is no file or folder {argument}.')
    if not found:
        raise InputError(f'{argument} has no images, i.e. files that end in {", ".join(SUFFIXES)}.')
    return found


def _search(root: Path, output: Path) -> list[tuple[Path, Path]]:
    def refuse(error: OSError) -> NoReturn:
        raise InputError(f'{error.filename} cannot be read: {error.strerror}.') from None

    found, own = [], os.path.realpath(output)
    for folder, inner, files in os.walk(root, onerror=refuse):
        # An output inside of the input is not upscaled again by the next run.
        inner[:] = sorted(name for name in inner if name[0] != '.' and os.path.realpath(Path(folder, name)) != own)
        paths = [Path(folder, name) for name in sorted(files) if name[0] != '.' and format_of(name)]
        # Links that lead nowhere are named when they cannot be read; pipes would be waited for.
        found += [(path, path.relative_to(root)) for path in paths if path.is_file() or not path.exists()]
    return found


def _check_targets(jobs: list[Job], may_exist: bool, inputs: list[Path]) -> None:
    """Refuse to write over an input, in whatever way it is reached, and over others unless asked to."""
    existing = [job for job in jobs if os.path.lexists(job.target)]
    sources = {identity(source): source for source in inputs}
    for job in existing:
        source = sources.get(identity(job.target))
        if source is not None:
            raise InputError(f'The output {job.target} is the input {source}: choose another output.')
        if job.target.is_dir():
            raise InputError(f'The output {job.target} is a folder, where a file of that name would be written.')
    if existing and not may_exist:
        others = f' and {len(existing) - 1} more exist' if len(existing) > 1 else ' exists'
        raise InputError(
            f'The output {existing[0].target}{others}: choose another output, replace what is there with --overwrite, '
            'or go on with the rest with --skip-existing.'
        )


@contextlib.contextmanager
def _writable(folder: Path, is_shared: bool) -> Iterator[None]:
    """Make a folder for the output and try to write there; leave no empty folder behind, but to other processes."""
    made = [] if is_shared else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f'The output folder {folder} cannot be written: {error.strerror}.') from None
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # what is not empty stays
                path.rmdir()


def run_jobs(
    jobs: Sequence[Job],
    upscaler: Upscaler,
    quality: int = DEFAULT_QUALITY,
    bar: tqdm | None = None,
    left_out: dict[str, list[str]] | None = None,
    alpha: str = 'bicubic',
    ranges: dict[str, tuple[float, float]] | None = None,
) -> dict[str, str]:
    """Upscale all, reading and writing in threads; a bar shows how far it is.

    Where the network leaves cores free, as on a GPU, reading and writing go on beside it. Where it takes all cores, all
    of its threads would wait for one that is held up by writing: there results are written in bursts, with all cores,
    for which the network pauses. The kinds of metadata that an image loses are put into ``left_out``, input -> kinds,
    and the lowest and highest value of one that goes beyond 0 to 1 into ``ranges``.

    Returns:
        Input -> why it was not upscaled.

    Raises:
        InputError: An output cannot be written.
    """
    bar = tqdm(disable=True) if bar is None else bar
    threads = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    takes_all_cores = upscaler.device.type == 'cpu' and torch.get_num_threads() >= threads
    failures: dict[str, str] = {}
    readers = ThreadPoolExecutor(threads, 'read')
    writer = _Writer(threads, quality, BURST_SECONDS if takes_all_cores else None, failures, bar)
    reading: deque[tuple[Job, Future]] = deque()
    remaining = iter(jobs)
    ahead = threads + 1
    try:
        while True:
            for job in islice(remaining, max(0, ahead - len(reading))):
                reading.append((job, readers.submit(read_picture, job.source)))
            if not reading:
                break
            job, future = reading.popleft()
            try:
                with _failures_of(job):
                    picture = future.result()
                    height, width, channels = picture.pixels.shape
                    size = upscaler.scale * height, upscaler.scale * width
                    check_format(job.file_format, picture.pixels.dtype, *size, channels)
                ahead = min(threads, READ_AHEAD_BYTES // picture.pixels.nbytes) + 1
                if upscaler.scale**2 * picture.pixels.nbytes > WHOLE_BYTES:
                    bands = upscaler.bands(picture.pixels, _teller(bar, job), picture.has_alpha, alpha)
                    writer.write_bands(job, picture, _with_failures(job, bands), size)
                else:
                    with _failures_of(job):
                        pixels = upscaler(picture.pixels, _teller(bar, job), picture.has_alpha, alpha)
                    writer.add(job, replace(picture, pixels=pixels))
            except _Failed as error:
                failures[str(job.source)] = str(error)
                bar.update()
                continue
            if picture.pixels.dtype == np.float32 and ranges is not None:
                lowest, highest = float(picture.pixels.min()), float(picture.pixels.max())
                if lowest < 0 or highest > 1:
                    ranges[str(job.source)] = lowest, highest
            kinds = kinds_left_out(picture, job.file_format)
            if kinds and left_out is not None:
                left_out[str(job.source)] = kinds
        writer.finish()
    finally:
        readers.shutdown(cancel_futures=True)
        writer.pool.shutdown(cancel_futures=True)
    return failures


class _Failed(Exception):
    """Why one image is not written, in a sentence that names it."""


@contextlib.contextmanager
def _failures_of(job: Job) -> Iterator[None]:
    """Tell what may go wrong before an image is written."""
    try:
        yield
    except InputError as error:
        reason = str(error)
        raise _Failed(reason if str(job.source) in reason else f'{job.source} was not upscaled: {reason}') from None
    except MemoryError:
        raise _Failed(f'{job.source} was not upscaled: it needs more memory than there is.') from None
    except RuntimeError as error:  # torch's, of memory and else
        first_line = str(error).partition('\n')[0].rstrip('.')
        hint = ' A smaller --tile helps.' if re.search('memory|alloc', first_line) else ''
        raise _Failed(f'{job.source} cannot be upscaled: {first_line}.{hint}') from error


def _noted(bands: Iterable[np.ndarray], errors: list[BaseException]) -> Iterator[np.ndarray]:
    """Bands, and a note of the error that making one of them has raised."""
    try:
        yield from bands
    except Exception as error:
        errors.append(error)
        raise


def _with_failures(job: Job, bands: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    with _failures_of(job):
        yield from bands


class _Writer:
    """Writes results in threads, and lets few of them wait.

    Args:
        threads: How many are written at once.
        quality: See :func:`upscale`.
        pause: Write in bursts so many seconds apart, and wait for each; ``None``: write at once, and do not wait.
        failures: Gets what is not written, with the reason.
        bar: Is told of each that is done.
    """

    def __init__(self, threads: int, quality: int, pause: float | None, failures: dict[str, str], bar: tqdm):
        self.pool = ThreadPoolExecutor(threads, 'write')
        self.threads, self.quality, self.pause, self.failures, self.bar = threads, quality, pause, failures, bar
        self.held: list[tuple[Job, Picture]] = []
        self.writing: deque[tuple[Job, Future, int]] = deque()
        self.last_burst = time.perf_counter()

    def add(self, job: Job, picture: Picture) -> None:
        """Take a result, which is written soon."""
        self.held.append((job, picture))
        if self.pause is None:
            self._submit()
            self._wait(self.threads + 1, WAITING_BYTES)
        elif (
            time.perf_counter() - self.last_burst >= self.pause
            or sum(picture.pixels.nbytes for _, picture in self.held) > WAITING_BYTES
        ):
            self.finish()

    def write_bands(self, job: Job, picture: Picture, bands: Iterable[np.ndarray], size: tuple[int, int]) -> None:
        """Write a result that is too large to wait, as it is made; raises :class:`_Failed`."""
        self.finish()
        _write(job, picture, bands, size, self.quality, self.pool.map)
        self.bar.update()

    def finish(self) -> None:
        """Write all, and wait for it."""
        self._submit()
        self._wait(0, 0)
        self.last_burst = time.perf_counter()

    def _submit(self) -> None:
        for job, picture in self.held:
            pixels = picture.pixels
            future = self.pool.submit(_write, job, picture, [pixels], pixels.shape[:2], self.quality)
            self.writing.append((job, future, picture.pixels.nbytes))
        self.held.clear()

    def _wait(self, most_images: int, most_bytes: int) -> None:
        """Wait for the oldest until no more are being written than that; of bytes one image may have more."""
        while self.writing and (
            self.writing[0][1].done()
            or len(self.writing) > most_images
            or sum(size for _, _, size in islice(self.writing, 1, None)) > most_bytes
        ):
            job, future, _ = self.writing.popleft()
            try:
                future.result()
            except _Failed as failure:
                self.failures[str(job.source)] = str(failure)
            self.bar.update()


def _teller(bar: tqdm, job: Job) -> Callable[[int, int], None]:
    """Shows at the bar how far an image is that takes several tiles."""

    def tell(tile: int, tiles: int) -> None:
        if tiles > 1:
            bar.set_postfix_str(f'{job.source.name}: tile {tile} of {tiles}')

    return tell


def _write(
    job: Job, picture: Picture, bands: Iterable[np.ndarray], size: tuple[int, int], quality: int, run: Run = map
) -> None:
    """Encode and write one result, see :func:`write_picture`.

    Raises:
        _Failed: Its format cannot hold it.
        InputError: It cannot be written.
    """
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'The output folder {job.target.parent} cannot be made: {error.strerror}.') from None
    with replacing(job.target) as partial, write_errors(job.target), partial.open('wb') as file:
        of_network: list[BaseException] = []
        try:
            write_picture(file, picture, _noted(bands, of_network), size, job.file_format, quality, run)
        except InputError as error:
            raise _Failed(f'{job.source} was not written: {error}') from None
        except MemoryError:
            raise _Failed(f'{job.source} was not written: it needs more memory than there is.') from None
        except (ValueError, TypeError, ArithmeticError, struct.error) as error:  # of what a file says of itself
            if error in of_network:
                raise
            raise _Failed(f'{job.source} was not written: {type(error).__name__}, {error}.') from error
