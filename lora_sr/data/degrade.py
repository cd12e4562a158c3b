"""From a folder of HR images to a folder of LR images as a camera might have taken them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lora_sr.data.camera import camera_degradation, camera_seed
from lora_sr.data.sources import Source, check_left_out, find_sources, memory_errors, read_image
from lora_sr.errors import InputError
from lora_sr.files import check_output_folder, partial_folder
from lora_sr.images.bicubic import MAX_SCALE
from lora_sr.images.png import encode_png
from lora_sr.share import Share


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
        share: make this process's images only, see :mod:`lora_sr.share`; what cannot be used is that of its own.

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
    pairs = pairs if share is None else share.of(pairs)
    pairs.sort(key=lambda pair: not os.path.lexists(pair[1]))  # what is there is looked at first, to be refused early

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
        lr = camera_degradation(image[:height, :width], scale, camera_seed(source.hr.stem, seed))
        return encode_png(lr).tobytes()

    def write(source: Source, target: Path, path: Path) -> None:
        try:
            with memory_errors(source.hr):
                data = make(source)
        except InputError as error:
            left_out[str(source.hr)] = str(error)
            if not skip_broken:
                # After the first bad image the others are only looked at, so that one run finds all of them.
                check_only.set()
            return
        if data is None:
            return
        if os.path.lexists(target):
            if target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data:
                return
            if not overwrite:
                raise InputError(
                    f'{target} exists and is not the image that is made here: choose another output folder, or add '
                    '--overwrite.'
                )
        path.write_bytes(data)

    made = [path for path in (output, *output.parents) if not path.exists()] if share is None else []
    try:
        output.mkdir(parents=True, exist_ok=True)
        with partial_folder(output, 'degrade') as partial, ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(write, source, target, partial / target.name) for source, target in pairs]
            try:
                for job in tqdm(jobs, unit='image', disable=None if progress and sys.stderr else True):
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
            left_out = dict(sorted(left_out.items()))
            check_left_out(left_out.values(), len(pairs), skip_broken)
            for path in sorted(partial.iterdir()):
                os.replace(path, output / path.name)
    except OSError as error:
        raise InputError(f'{output}: the images cannot be written there ({error}).') from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # what is not empty stays
                path.rmdir()
    return Degraded(len(pairs) - len(left_out), left_out)
