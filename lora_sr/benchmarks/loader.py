"""Samples a second of the loader alone: BasicSR's on PNGs, ours on raw images, in turn in one run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_sr.data.cutting import SIZE, STEP
from lora_sr.data.prepare import prepare_databases
from lora_sr.errors import InputError, import_basicsr

BATCH, LQ_SIZE = 16, 64
ROUNDS, SECONDS = 3, 2.0  # how often each is measured, in turn, and for how long


def run(
    images: Sequence[str | os.PathLike[str]],
    scale: int = 4,
    workers: Sequence[int] = (0, 1, 2),
    batch_size: int = BATCH,
    lq_size: int = LQ_SIZE,
    work_dir: str | os.PathLike[str] | None = None,
    seconds: float = SECONDS,
) -> dict[tuple[str, int], float]:
    """Measure the loader alone, on databases that are made of some images, and print a table.

    All give the same kind of batches to a CPU: float32 of a random patch and its LR patch, flipped and rotated. What
    comes as whole numbers is made so, as the model does.

    Args:
        images: Folders of images of at least 480 x 480 pixels.
        scale: Of the LR images, a divisor of 240.
        workers: Numbers of worker processes; 0 reads in the process that trains.
        batch_size: Samples of a batch.
        lq_size: Side of the LR patches.
        work_dir: Where the databases go, which are removed afterwards; the system's temporary folder if None.
        seconds: How long each measurement takes; the median of three counts.

    Returns:
        {(kind, workers): samples a second}, kinds as in :data:`KINDS`.

    Raises:
        InputError: BasicSR is not installed, or the images or the scale will not do.
    """
    if any(count < 0 for count in workers):
        raise InputError(f'--workers must be whole numbers of at least 0, got {" ".join(map(str, workers))}.')
    if scale < 2 or STEP % scale:
        raise InputError(f'--scale must be a divisor of {STEP} from 2, got {scale}.')
    import_basicsr('lora-sr bench loader')
    with tempfile.TemporaryDirectory(prefix='loader_benchmark_', dir=work_dir) as folder:
        prepare_databases(images, folder, [scale], size=SIZE, progress=False)
        prepared = prepare_databases(images, folder, [scale], raw=True, progress=False)
        if min(prepared.smallest) < max(SIZE, scale * lq_size):
            height, width = prepared.smallest
            raise InputError(
                f'The images must have {max(SIZE, scale * lq_size)} pixels each way, got {width} x {height}.'
            )
        lr = prepared.databases[scale].name.replace('_raw', '_sub')
        sections = {kind: _section(kind, Path(folder), lr, scale, batch_size, lq_size) for kind in KINDS}
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(ROUNDS):
            for count in workers:
                for kind, section in sections.items():
                    rates.setdefault((kind, count), []).append(samples_per_second(section, count, seconds))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    _print(medians, workers, batch_size, lq_size, scale)
    return medians


STOCK, RAW = 'PNG sub-images, as in BasicSR', 'raw'
KINDS = (STOCK, RAW)


def _section(kind: str, folder: Path, lr: str, scale: int, batch_size: int, lq_size: int) -> dict[str, Any]:
    end = '_sub.lmdb' if kind == STOCK else '_raw.lmdb'
    return {
        'name': 'benchmark',
        'type': 'PairedImageDataset' if kind == STOCK else 'RawPairedImageDataset',
        'phase': 'train',
        'scale': scale,
        'dataroot_gt': str(folder / f'HR{end}'),
        'dataroot_lq': str(folder / lr.replace('_sub.lmdb', end)),
        'io_backend': {'type': 'lmdb'},
        'gt_size': scale * lq_size,
        'use_hflip': True,
        'use_rot': True,
        'batch_size_per_gpu': batch_size,
    }


def samples_per_second(
    section: dict[str, Any], workers: int, seconds: float = SECONDS, device: torch.device | None = None
) -> float:
    """How many samples a second the loader of a training set gives, with nothing else to do.

    Args:
        section: The section ``datasets.train`` of an option file, with ``phase`` and ``scale``.
        workers: Worker processes.
        seconds: How long to measure, after two batches that start the workers.
        device: Where the batches are made floating point; the CPU if None.

    Returns:
        Samples a second.
    """
    from lora_sr.basicsr.integer_images import with_floats

    device = torch.device('cpu') if device is None else device
    batches = _endless(section, workers)
    for _ in range(2):
        next(batches)
    seen, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = with_floats(next(batches), device)
        seen += len(batch['lq'])
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return seen / (time.perf_counter() - start)


def _endless(section: dict[str, Any], workers: int) -> Iterator[dict[str, Any]]:
    """The batches of a run, one epoch after the other, without the time that it takes to start an epoch's workers."""
    from basicsr.data import build_dataloader, build_dataset
    from basicsr.data.data_sampler import EnlargedSampler

    opt = {**section, 'io_backend': dict(section['io_backend']), 'num_worker_per_gpu': workers}
    dataset = build_dataset(opt)
    sampler = EnlargedSampler(dataset, 1, 0, max(1, 2_000_000 // len(dataset)))
    return iter(build_dataloader(dataset, opt, num_gpu=0, sampler=sampler, seed=0))


def _print(rates: dict[tuple[str, int], float], workers: Sequence[int], batch: int, side: int, scale: int) -> None:
    print(f'samples a second, batches of {batch}, LR patches of {side} x {side}, x{scale}, {os.cpu_count()} cores')
    print(f'{"workers":>8}' + ''.join(f'{kind:>32}' for kind in KINDS) + f'{"ratio":>8}')
    for count in workers:
        values = [rates[kind, count] for kind in KINDS]
        print(f'{count:>8}' + ''.join(f'{value:>32,.0f}' for value in values) + f'{values[1] / values[0]:>8.1f}')
