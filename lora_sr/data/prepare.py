"""From folders of images to paired LMDBs: one pass from decoding to the database, over all cores.

Threads do the work: OpenCV and NumPy let go of the interpreter's lock while they decode, resize and encode, and nothing
has to be copied between processes. At most two images for each worker are in hand at a time, so memory depends on the
size of an image, not on their number. Results are written in the order of the keys, whichever worker is first.

Everything is written to ``.prepare.partial`` in the output folder. When it is complete and checked, a file there says
so, and the databases are moved into place. A run that was stopped before that is done again from the start; one that
was stopped between two moves is finished by the next run.

Several processes first make databases of pieces of the job, in ``.HR_sub.lmdb.parts``; the last one puts them together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, TypeVar

import lmdb
from tqdm import tqdm

from lora_sr.data.cutting import SIZE, STEP, Cost, Cut, Entry, cost_of, cut_image, load
from lora_sr.data.lmdb_store import (
    DATA_FILE,
    LmdbWriter,
    check_databases,
    read_meta_info,
    read_raw_meta_info,
)
from lora_sr.data.placing import finish_interrupted, mark_complete, move_into_place, partial_folder
from lora_sr.data.sources import Source, check_left_out, find_sources, memory_errors, state_of
from lora_sr.errors import InputError
from lora_sr.files import check_output_folder
from lora_sr.images.bicubic import BORDERS
from lora_sr.share import Parts, Share, pieces_of

PART_FILE = 'part.json'
SAMPLED = 16  # images of which sub-images are encoded to tell what all of them would take

Item = TypeVar('Item')
Result = TypeVar('Result')


@dataclass(frozen=True)
class Prepared:
    """What ``prepare_databases`` has made.

    Attributes:
        databases: {scale: folder}, with the HR database as scale 1.
        images: number of source images that were used.
        entries: number of keys in each database.
        smallest: (height, width) of the smallest HR entry by its shorter side: an upper limit for ``gt_size``.
        left_out: {path: why this image was left out, in one sentence that names it}: an HR image, or an LR image
            without one; empty without ``skip_broken``.
        bytes: what all databases take on the disk, {'png': as PNGs, 'raw': whole and uncompressed}: that of their own
            form as it is, the other estimated. Raw images are held against sub-images of 480 x 480 pixels.
    """

    databases: dict[int, Path]
    images: int
    entries: int
    smallest: tuple[int, int]
    left_out: dict[str, str]
    bytes: dict[str, int]


def prepare_databases(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    scales: Sequence[int] = (2, 3, 4),
    lr_folders: Sequence[str | os.PathLike[str]] | None = None,
    size: int | None = None,
    step: int = STEP,
    threshold: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    split: str | None = None,
    border: str | None = None,
    skip_broken: bool = False,
    crop: bool = False,
    raw: bool = False,
    share: Share | None = None,
) -> Prepared:
    """Make the LMDBs ``HR_sub.lmdb`` and ``LR_…_X{scale}_sub.lmdb`` from folders of images.

    Each image is cropped, at its right and bottom edges, to a multiple of all scales. Its LR images come from their
    files or are made by ``bicubic_downscale``, whole, before they are cut. It is cut as in BasicSR's
    ``extract_subimages.py``; the sub-images of ``NAME`` are ``NAME_s001``, ``NAME_s002``, ... in rows from the top
    left. Where an image is smaller than ``size``, which that script cannot handle, its sub-images have its whole height
    or width. With size 0 images stay whole, under their own names, in ``HR.lmdb`` and ``LR_bicubic_X{scale}.lmdb``.
    Where the LR images are those of RealSR or DRealSR, or given, the name is ``LR_X{scale}``, for they may be anything;
    but ``LR_bicubic_X{scale}`` where the name of their folder says so, as ``LR_bicubic/X4`` and ``LRbicx4`` do.

    An image of 16 bits stays one, and so do the LR images that are made of it.

    Raw databases, ``HR_raw.lmdb`` and ``LR_…_X{scale}_raw.lmdb``, have whole images, uncompressed, of which training
    reads no more than its patches: nothing is decoded, and no pixel is there twice, as where sub-images overlap.

    An image cannot be used where it cannot be read, is smaller than the scale, or has no partner or one of another
    size. One run finds all that cannot be used.

    Args:
        folders: HR folders, or roots of the published datasets; see ``find_sources``.
        output: the folder for the databases; made if it is missing.
        scales: the scales of the LR images.
        lr_folders: the LR folder of each HR folder; see ``find_sources``.
        size: side of an HR sub-image in pixels, or 0; a multiple of every scale. By default 480, and 0 for raw images,
            which are whole.
        step: distance between neighbors in HR pixels; a multiple of every scale.
        threshold: a strip of up to this many HR pixels at the right or bottom edge is left out.
        workers: number of threads; the number of cores if None.
        overwrite: replace databases of these names.
        progress: show a progress bar, if stderr is a terminal.
        split: the part of RealSR or DRealSR, 'train' or 'test'; see ``find_sources``.
        border: 'replicate' or 'mirror', see ``bicubic_downscale``; 'replicate', which made the test sets, if None.
        skip_broken: leave out images that cannot be used; the databases are those of folders without them.
        crop: trim an HR image and its LR images, where ``scale`` times an LR side and the HR side differ by up to
            ``2 * scale`` pixels, to the largest size that they share: at the right and bottom. The top left corner
            stays, so they must show the same there. Without it they may differ by less than ``scale`` pixels, as where
            a size was rounded.
        raw: store whole images uncompressed; see ``RawPairedImageDataset``.
        share: make this process's part of the databases, see :mod:`lora_sr.share`, and put all together if it is the
            last one. Databases of this very job that are there are kept, also with ``overwrite``. Until they are in
            place the disk holds everything twice.

    Raises:
        NotLastError: the share is done, and others are not.
        InputError: if an option is out of range, the images cannot be found, some cannot be used (with ``skip_broken``:
            none can), a border is given but no LR image has to be made, a database is already there, or the output
            cannot be written. Nothing is left half-written.
    """
    size = (0 if raw else SIZE) if size is None else size
    if raw and size:
        raise InputError(f'--size must be left out with --raw, which keeps images whole, got {size}.')
    cut = Cut(tuple(scales), size, step, threshold, BORDERS[0] if border is None else border, crop, raw)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise InputError(f'--workers must be a whole number of at least 1, got {workers}.')
    output = Path(output)
    check_output_folder(output)
    left_out: dict[str, str] = {}
    sources = find_sources(folders, cut.scales, lr_folders, split, left_out)
    total = len(sources) + len(left_out)
    if border is not None and all(scale in source.lr for source in sources for scale in cut.scales):
        raise InputError(f'--border must be left out where no LR image is made by bicubic, got {border}.')
    names = cut.database_names(
        [scale for scale in cut.scales if all(_is_bicubic(source.lr.get(scale)) for source in sources)]
    )
    databases = {scale: output / name for scale, name in names.items()}
    job = _fingerprint(sources, cut, skip_broken, left_out)
    pieces = [] if share is None else [repr(cut) + state_of(piece) for piece in pieces_of(sources)]
    parts = Parts(output / f'.{names[1]}.parts', pieces, job)
    try:
        if share is not None:
            check_left_out(left_out.values(), total, skip_broken)
            if parts.record() is not None and not all(map(os.path.isdir, databases.values())):
                parts.forget()
            if parts.record() is None and not parts.made:
                _check_free(databases.values(), overwrite)
            _make_parts(parts, share, sources, cut, names, workers, progress)
        with _last_of(parts, share), partial_folder(output) as folder:
            done = finish_interrupted(folder, output)
            if done is None and share is not None:
                done = parts.record()
            if done is None or done['job'] != job:
                if share is None or done is not None:  # an earlier run, of another job, has just been finished
                    _check_free(databases.values(), overwrite)
                paths = {scale: folder / Path(name).stem for scale, name in names.items()}
                if share is None:
                    cost = _build(sources, cut, paths, workers, progress, left_out, skip_broken)
                else:
                    cost = _join(parts, paths, total, left_out, skip_broken)
                images = total - len(left_out)
                done = {'databases': list(names.values()), 'job': job, 'images': images, 'left_out': left_out}
                done['bytes'] = _bytes(cost, cut, paths)
                parts.clear()
                mark_complete(folder, done)
                move_into_place(folder, output, names.values())
            if share is not None:
                parts.mark_joined(done)
    except (OSError, lmdb.Error) as error:
        raise InputError(f'{output}: the databases cannot be written there ({error}).') from error
    entries = (
        [image.shape for image in read_raw_meta_info(databases[1]).values()]
        if raw
        else list(read_meta_info(databases[1]).values())
    )
    smallest = min(((height, width) for height, width, _ in entries), key=lambda shape: (min(shape), max(shape)))
    return Prepared(databases, done['images'], len(entries), smallest, done['left_out'], done['bytes'])


def _check_free(databases: Iterable[Path], overwrite: bool) -> None:
    existing = [str(path) for path in databases if os.path.lexists(path)]
    if existing and not overwrite:
        raise InputError(
            f'{" and ".join(existing)} already exist: choose another output folder, or add --overwrite and name all '
            'the scales wanted in the one run.'
        )


def _is_bicubic(lr: Path | None) -> bool:
    """Whether an LR image is made by bicubic, or lies in a folder whose name says so, above ``X4`` where it is that."""
    if lr is None:
        return True
    folder = Path(os.path.abspath(lr)).parent  # `.` has no name
    if re.fullmatch(r'[Xx]\d+', folder.name):
        folder = folder.parent
    return re.search('bicubic|LR_?bic', folder.name, re.IGNORECASE) is not None


def _fingerprint(sources: Sequence[Source], cut: Cut, skip_broken: bool, misfits: Collection[str]) -> str:
    """The same for two runs that make the same databases."""
    digest = hashlib.sha256(repr((cut, skip_broken, len(misfits))).encode())
    digest.update(state_of(sources).encode())
    return digest.hexdigest()


def _entries(
    source: Source, cut: Cut, sampled: Collection[str], check_only: threading.Event
) -> tuple[InputError | None, dict[int, list[Entry]], Cost]:
    """What one image puts into the databases: (error, {scale: [(key, value, height, width)]}, what it costs)."""
    try:
        with memory_errors(source.hr):
            images = load(source, cut)
            if check_only.is_set():
                return None, {}, Cost()
            return None, cut_image(source.key, images, cut), cost_of(images, cut, source.key in sampled)
    except InputError as error:
        return error, {}, Cost()


def _bytes(cost: Cost, cut: Cut, paths: Mapping[int, Path]) -> dict[str, int]:
    """What the databases at {scale: path} take in both forms, see :class:`Prepared`."""
    written = sum((path / DATA_FILE).stat().st_size for path in paths.values())
    if not cut.raw:
        return {'png': written, 'raw': cost.raw}
    return {'png': cost.png * cost.pixels // max(1, cost.measured), 'raw': written}


def _build(
    sources: Sequence[Source],
    cut: Cut,
    paths: Mapping[int, Path],
    workers: int,
    progress: bool,
    left_out: dict[str, str],
    skip_broken: bool,
    may_be_empty: bool = False,
) -> Cost:
    """Write and check the databases at {scale: path}, names without ``.lmdb``, which BasicSR does not open.

    ``left_out``, {path: why it cannot be used}, has the images that do not pair, and gets those that cannot be used;
    all of them may, where these are a piece of a job.

    Returns:
        What all images cost.
    """
    total = len(sources) + len(left_out)
    check_only = threading.Event()
    sampled = {source.key for source in sources[:: len(sources) // SAMPLED + 1]}
    costs = []
    if left_out and not skip_broken:
        check_only.set()
    with contextlib.ExitStack() as stack:
        writers = {scale: stack.enter_context(contextlib.closing(LmdbWriter(path))) for scale, path in paths.items()}
        results = stack.enter_context(
            contextlib.closing(
                _map_in_order(partial(_entries, cut=cut, sampled=sampled, check_only=check_only), sources, workers)
            )
        )
        for source, (error, entries, cost) in tqdm(
            zip(sources, results), total=len(sources), unit='image', disable=None if progress and sys.stderr else True
        ):
            if error:
                left_out[str(source.hr)] = str(error)
                if not skip_broken:
                    # After the first bad image the others are only looked at, so that one run finds all of them.
                    check_only.set()
            costs.append(cost)
            for scale, of_scale in entries.items():
                for key, value, height, width in of_scale:
                    if cut.raw:
                        writers[scale].put_raw(key, value)
                    else:
                        writers[scale].put(key, value, height, width)
        if not may_be_empty:
            check_left_out(left_out.values(), total, skip_broken)
        for writer in writers.values():
            writer.finish()
    check_databases(paths[1], {scale: path for scale, path in paths.items() if scale > 1})
    return Cost.sum(costs)


def _make_parts(
    parts: Parts,
    share: Share,
    sources: Sequence[Source],
    cut: Cut,
    names: Mapping[int, str],
    workers: int,
    progress: bool,
) -> None:
    """Make the parts of a share that are missing, each with databases of these {scale: name}.

    What cannot be used is noted in them, for :func:`_join` to tell all of it.
    """
    pieces = pieces_of(sources)
    own = [] if parts.record() is not None else share.of(range(len(pieces)))
    for number in tqdm(own, unit='part', disable=None if progress and sys.stderr else True):
        if not parts.paths[number].is_dir():
            with parts.make(number) as folder:
                left_out: dict[str, str] = {}
                paths = {scale: folder / Path(name).stem for scale, name in names.items()}
                cost = _build(pieces[number], cut, paths, workers, False, left_out, skip_broken=True, may_be_empty=True)
                part = {'left_out': left_out, 'cost': cost}
                (folder / PART_FILE).write_text(json.dumps(part), encoding='utf-8')


@contextlib.contextmanager
def _last_of(parts: Parts, share: Share | None) -> Iterator[None]:
    """Go on if this process is the only one, or the last one that a job has been waiting for."""
    if share is None:
        yield
        return
    with parts.joining():
        yield


def _join(parts: Parts, paths: Mapping[int, Path], total: int, left_out: dict[str, str], skip_broken: bool) -> Cost:
    """Put parts together as databases at {scale: path}, as ``_build`` writes them at once, and check these."""
    contents = [json.loads((part / PART_FILE).read_text('utf-8')) for part in parts.paths]
    for content in contents:
        left_out.update(content['left_out'])
    check_left_out(left_out.values(), total, skip_broken)
    for path in paths.values():
        with contextlib.closing(LmdbWriter(path)) as writer:
            for part in parts.paths:
                writer.put_all(part / path.name)
            writer.finish()
    check_databases(paths[1], {scale: path for scale, path in paths.items() if scale > 1})
    return Cost.sum(Cost(*content['cost']) for content in contents)


def _map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """``map`` over threads that keeps at most two items for each thread in hand."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
