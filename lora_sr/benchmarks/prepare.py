"""`lora-sr prepare` beside BasicSR's two scripts, on the same images, in one run.

BasicSR prepares a training set in two steps: `scripts/data_preparation/extract_subimages.py` cuts HR and LR into
sub-images as PNG files, over all cores; then `create_lmdb.py` reads these files one by one and writes databases with
`make_lmdb_from_imgs`. The second step is BasicSR's own function here. The first is not part of the installed package,
so `_extract_subimages` does its work, call by call, with its settings.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Sequence

import cv2
import lmdb
import numpy as np

from lora_sr.data.cutting import subimage_starts
from lora_sr.data.lmdb_store import read_meta_info
from lora_sr.data.prepare import prepare_databases
from lora_sr.data.sources import find_sources, read_image
from lora_sr.errors import InputError, import_basicsr
from lora_sr.images.bicubic import bicubic_downscale

SIZE, STEP, THRESHOLD = 480, 240, 0
EXTRACT_COMPRESSION = 3  # the setting in extract_subimages.py; create_lmdb.py has 1


def run(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    scale: int,
    work_dir: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Measure both ways, check that they made the same databases, and print a table and the ratio.

    Both start from the same PNG files, HR and LR, made beforehand and not counted, as a user of DIV2K has them. A third
    row is ours when it makes the LR images as well. Images smaller than a sub-image are left out, for BasicSR's script
    fails on them.

    Args:
        images: an image file or a folder of images, or a list of such.
        scale: the scale of the LR images; 480 and 240 must be multiples of it.
        work_dir: where the files of the comparison go; they are removed afterwards. The system's temporary folder if
            None. It needs about ten times the room of the images.

    Returns:
        {'images', 'entries', 'workers': numbers; 'basicsr_extract_s', 'basicsr_lmdb_s', 'basicsr_s', 'lora_sr_s',
        'lora_sr_with_bicubic_s': seconds; 'ratio': basicsr_s / lora_sr_s; 'ratio_with_bicubic': basicsr_s /
        lora_sr_with_bicubic_s}.

    Raises:
        InputError: if BasicSR is not installed, there are no images of at least 480 x 480 pixels, one cannot be read,
            or the scale does not fit.
        RuntimeError: if the two ways did not make the same databases.
    """
    if scale < 2 or STEP % scale:
        raise InputError(f'--scale: {scale} was given, where a divisor of {STEP} from 2 is right.')
    import_basicsr('lora-sr bench prepare')
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    paths = [Path(images)] if isinstance(images, (str, os.PathLike)) else [Path(path) for path in images]
    files = [
        image
        for path in paths
        for image in ([path] if path.is_file() else [source.hr for source in find_sources([path], ())])
    ]
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix='prepare_benchmark_', dir=work_dir) as folder:
        work = Path(folder)
        count = _write_pngs(files, scale, work)

        extract_s = _seconds(
            lambda: _extract_subimages(work / 'hr', work / 'hr_sub', 1, workers),
            lambda: _extract_subimages(work / 'lr', work / 'lr_sub', scale, workers),
        )
        lmdb_s = _seconds(
            lambda: _create_lmdb(make_lmdb_from_imgs, work / 'hr_sub', work / 'basicsr_hr.lmdb'),
            lambda: _create_lmdb(make_lmdb_from_imgs, work / 'lr_sub', work / 'basicsr_lr.lmdb'),
        )
        for name in ('hr', 'lr'):
            shutil.rmtree(work / f'{name}_sub')
        prepare = partial(prepare_databases, size=SIZE, step=STEP, threshold=THRESHOLD, workers=workers, progress=False)
        ours_s = _seconds(lambda: prepare([work / 'hr'], work / 'ours', [scale], [work / 'lr']))
        bicubic_s = _seconds(lambda: prepare([work / 'hr'], work / 'ours_bicubic', [scale]))

        for ours, lr in (('ours', 'LR'), ('ours_bicubic', 'LR_bicubic')):
            for name, database in (('hr', 'HR_sub.lmdb'), ('lr', f'{lr}_X{scale}_sub.lmdb')):
                _check_same(work / f'basicsr_{name}.lmdb', work / ours / database)
        entries = len(read_meta_info(work / 'ours' / 'HR_sub.lmdb'))

    result: dict[str, float] = {
        'images': count,
        'entries': entries,
        'workers': workers,
        'basicsr_extract_s': extract_s,
        'basicsr_lmdb_s': lmdb_s,
        'basicsr_s': extract_s + lmdb_s,
        'lora_sr_s': ours_s,
        'lora_sr_with_bicubic_s': bicubic_s,
        'ratio': (extract_s + lmdb_s) / ours_s,
        'ratio_with_bicubic': (extract_s + lmdb_s) / bicubic_s,
    }
    left_out = f' ({len(files) - count} smaller than {SIZE} x {SIZE} left out)' if count < len(files) else ''
    print(
        f'{count} images{left_out}, {entries} sub-images of {SIZE} x {SIZE} and their LR at scale {scale}, '
        f'{workers} cores'
    )
    for label, key in (
        ('BasicSR: extract_subimages to PNG files', 'basicsr_extract_s'),
        ('BasicSR: make_lmdb_from_imgs', 'basicsr_lmdb_s'),
        ('BasicSR: both', 'basicsr_s'),
        ('lora-sr prepare, LR given', 'lora_sr_s'),
        ('lora-sr prepare, LR made by bicubic', 'lora_sr_with_bicubic_s'),
    ):
        print(f'{label:<40} {result[key]:8.2f} s {result["basicsr_s"] / result[key]:8.2f} x')
    print(f'same keys and pixels in all databases; lora-sr prepare is {result["ratio"]:.2f} times as fast as BasicSR')
    return result


def _seconds(*steps: Callable[[], object]) -> float:
    start = time.perf_counter()
    for step in steps:
        step()
    return time.perf_counter() - start


def _write_pngs(images: Sequence[Path], scale: int, work: Path) -> int:
    """Write HR images, cropped to a multiple of the scale, and their LR images as PNG; their number is returned."""
    for name in ('hr', 'lr'):
        (work / name).mkdir()
    count = 0
    for path in images:
        image = read_image(path)
        height, width = (length // scale * scale for length in image.shape[:2])
        if min(height, width) < SIZE:
            continue
        image = image[:height, :width]
        name = f'{count:06d}.png'
        cv2.imwrite(str(work / 'hr' / name), image)
        cv2.imwrite(str(work / 'lr' / name), bicubic_downscale(image, scale))
        count += 1
    if not count:
        raise InputError(
            f'prepare benchmark: none of the {len(images)} images has {SIZE} x {SIZE} pixels, the size of '
            'one sub-image.'
        )
    return count


def _extract_subimages(source: Path, target: Path, scale: int, workers: int) -> None:
    target.mkdir()
    # The script's own 20 processes would only slow it down where there are fewer cores.
    with multiprocessing.Pool(workers) as pool:
        pool.map(partial(_extract_one, target=target, scale=scale), sorted(source.iterdir()), chunksize=1)


def _extract_one(path: Path, target: Path, scale: int) -> None:
    size = SIZE // scale
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None  # `_write_pngs` wrote it
    index = 0
    for top in subimage_starts(image.shape[0], size, STEP // scale, THRESHOLD):
        for left in subimage_starts(image.shape[1], size, STEP // scale, THRESHOLD):
            index += 1
            crop = np.ascontiguousarray(image[top : top + size, left : left + size])
            cv2.imwrite(
                str(target / f'{path.stem}_s{index:03d}.png'), crop, [cv2.IMWRITE_PNG_COMPRESSION, EXTRACT_COMPRESSION]
            )


def _create_lmdb(make_lmdb_from_imgs: Callable[..., None], source: Path, target: Path) -> None:
    names = sorted(path.name for path in source.iterdir())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_lmdb_from_imgs(str(source), str(target), names, [name[: -len('.png')] for name in names])


def _check_same(theirs: Path, ours: Path) -> None:
    """Both databases have the same keys, and the same pixels under each."""
    if read_meta_info(theirs) != read_meta_info(ours):
        raise RuntimeError(f'prepare benchmark: {theirs.name} and {ours} have different keys or shapes')
    with (
        lmdb.open(str(theirs), readonly=True, lock=False) as their_env,
        lmdb.open(str(ours), readonly=True, lock=False) as our_env,
        their_env.begin() as their_values,
        our_env.begin() as our_values,
    ):
        for key, value in their_values.cursor():
            if not np.array_equal(_decode(value), _decode(our_values.get(key))):
                raise RuntimeError(f'prepare benchmark: {key.decode()} differs between {theirs.name} and {ours}')


def _decode(png: bytes | None) -> np.ndarray:
    assert png is not None  # both databases have the same keys
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image
