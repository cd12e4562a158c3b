"""From a folder of HR images to a folder of LR images as a camera might have taken them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lora_sr.data.camera import camera_degradation, camera_seed
from lora_sr.data.sources import Source, check_left_out, find_sources, memory_errors, read_image, state_of
from lora_sr.errors import InputError
from lora_sr.files import check_output_folder, partial_folder
from lora_sr.images.bicubic import MAX_SCALE
from lora_sr.images.png import encode_png
from lora_sr.share import NotLastError, Parts, Share, pieces_of

PARTS_FOLDER = '.degrade.parts'
PART_FILE = 'part.json'  # what of it cannot be used


@dataclass(frozen=True)
class Degraded:
    """What ``degrade_folder`` has made.

    Attributes:
        images: number of LR images.
        left_out: {HR image: why it was left out, in one sentence that names it}; empty without ``skip_broken``.
    """

    images: int
    left_out: dict[str, str]


def degrade_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    scale: int,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    skip_broken: bool = False,
    share: Share | None = None,
) -> Degraded:
    """Write ``NAME.png``, the camera's LR image, for each image ``NAME`` of a folder; see ``camera_degradation``.

    An HR image is cropped at its right and bottom edges to a multiple of the scale. All bits of a 16-bit image are
    used; its LR image has 8, since it went through JPEG. LR images come into their places when all are made. Those that
    are there already stay if they are the same, as after a run that was killed.

    Args:
        folder: HR images, or the root of the published DIV2K or Flickr2K.
        output: the folder for the LR images; made if it is missing.
        scale: a whole number from 2 to 16.
        seed: another seed gives another set of LR images.
        workers: number of threads; the number of cores if None.
        overwrite: replace images of these names.
        progress: show a progress bar, if stderr is a terminal.
        skip_broken: leave out images that cannot be read or are smaller than the scale.
        share: make this process's images only, see :mod:`lora_sr.share`; what cannot be used is that of its own. Its
            images come into their places piece by piece.

    Raises:
        InputError: if an option is out of range, some images cannot be read or are smaller than the scale (with
            ``skip_broken``: all are), another image has the name of an LR image, or the output cannot be written.
    """
    if not 2 <= scale <= MAX_SCALE:
        raise InputError(f'--scale must be a whole number from 2 to {MAX_SCALE}, got {scale}.')
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise InputError(f'--workers must be a whole number of at least 1, got {workers}.')
    output = Path(output)
    check_output_folder(output)
    sources = find_sources([folder], scales=())
    if any(os.path.realpath(source.hr.parent) == os.path.realpath(output) for source in sources):
        raise InputError(f'The output must be another folder than that of the HR images, got {output}.')
    pairs = [(source, output / f'{source.hr.stem}.png') for source in sources]
    settings = _Settings(scale, seed, workers, overwrite, skip_broken)
    try:
        if share is not None:
            own, left_out = _make_share(pairs, output, settings, share, progress)
        else:
            Parts(output / PARTS_FOLDER, [], '').clear()
            own, left_out = len(pairs), _make(pairs, output, settings, progress)
    except OSError as error:
        raise InputError(f'{output}: the images cannot be written there ({error}).') from error
    left_out = dict(sorted(left_out.items()))
    check_left_out(left_out.values(), own, skip_broken)
    return Degraded(own - len(left_out), left_out)


@dataclass(frozen=True)
class _Settings:
    """The arguments of ``degrade_folder`` of these names."""

    scale: int
    seed: int
    workers: int
    overwrite: bool
    skip_broken: bool


def _make(
    pairs: Sequence[tuple[Source, Path]], output: Path, settings: _Settings, progress: bool, is_shared: bool = False
) -> dict[str, str]:
    """Make LR images of [(HR image, where its LR image goes)], and move them there if none is missing that is wanted.

    Returns:
        What cannot be used, {path: why}.

    Raises:
        OSError: They cannot be written.
    """
    scale = settings.scale
    pairs = sorted(pairs, key=lambda pair: not os.path.lexists(pair[1]))  # what is there is to be refused early
    left_out: dict[str, str] = {}
    check_only = threading.Event()

    def make(source: Source) -> bytes | None:
        image = read_image(source.hr, deep=True)
        height, width = (length // scale * scale for length in image.shape[:2])
        if not height or not width:
            raise InputError(
                f'{source.hr} must have at least {scale} pixels each way, got {image.shape[1]} x {image.shape[0]} '
                '(width x height).'
            )
        if check_only.is_set():
            return None
        lr = camera_degradation(image[:height, :width], scale, camera_seed(source.hr.stem, settings.seed))
        return encode_png(lr).tobytes()

    def write(source: Source, target: Path, path: Path) -> None:
        try:
            with memory_errors(source.hr):
                data = make(source)
        except InputError as error:
            left_out[str(source.hr)] = str(error)
            if not settings.skip_broken:
                # After the first bad image the others are only looked at, so that one run finds all of them.
                check_only.set()
            return
        if data is None:
            return
        if os.path.lexists(target):
            if target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data:
                return
            if not settings.overwrite:
                raise InputError(
                    f'{target} exists and is not the image that is made here: choose another output folder, or add '
                    '--overwrite.'
                )
        path.write_bytes(data)

    made = [] if is_shared else [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with partial_folder(output, 'degrade') as partial, ThreadPoolExecutor(settings.workers) as pool:
            jobs = [pool.submit(write, source, target, partial / target.name) for source, target in pairs]
            try:
                for job in tqdm(jobs, unit='image', disable=None if progress and sys.stderr else True):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
            for path in sorted(partial.iterdir()) if settings.skip_broken or not left_out else ():
                os.replace(path, output / path.name)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # what is not empty stays
                path.rmdir()
    return left_out


def _make_share(
    pairs: Sequence[tuple[Source, Path]], output: Path, settings: _Settings, share: Share, progress: bool
) -> tuple[int, dict[str, str]]:
    """Make the pieces of a share that nobody has made; a part of each says so, and what of it cannot be used.

    Returns:
        How many images the share has, and {path: why} for those that cannot be used.
    """
    pieces = pieces_of(pairs)
    how = repr((settings.scale, settings.seed))
    words = [how + state_of(source for source, _ in piece) for piece in pieces]
    parts = Parts(output / PARTS_FOLDER, words, how)
    if parts.record() is None and not parts.made:
        parts.clear()  # another job may have its images replaced
    own, left_out = 0, {}
    for number in tqdm(share.of(range(len(pieces))), unit='part', disable=None if progress and sys.stderr else True):
        piece, known = pieces[number], parts.record()
        if known is None and parts.paths[number].is_dir():
            known = json.loads((parts.paths[number] / PART_FILE).read_text('utf-8'))
        if known is not None and all(target.exists() or str(source.hr) in known for source, target in piece):
            found = {str(source.hr): known[str(source.hr)] for source, _ in piece if str(source.hr) in known}
        else:
            found = _make(piece, output, settings, False, is_shared=True)
            if parts.record() is None and (settings.skip_broken or not found):
                with parts.make(number) as folder:
                    (folder / PART_FILE).write_text(json.dumps(found), 'utf-8')
        own += len(piece)
        left_out.update(found)
    with contextlib.suppress(NotLastError), parts.joining():
        if parts.record() is None:
            found = {}
            for path in parts.paths:
                found.update(json.loads((path / PART_FILE).read_text('utf-8')))
            parts.mark_joined(found)
    return own, left_out
