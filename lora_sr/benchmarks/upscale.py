"""Time of `lora-sr upscale` on a folder, beside reading, network and writing one after the other."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Sequence

import torch

from lora_sr.checkpoints import NetworkLike, load_network
from lora_sr.deploy.upscale import DEFAULT_QUALITY, Job, plan, run_jobs
from lora_sr.errors import InputError
from lora_sr.files import write_whole
from lora_sr.images.encoding import encode_picture
from lora_sr.images.formats import Picture, read_picture
from lora_sr.runtime.upscaler import Upscaler

REPEATS = 3


class Steps(NamedTuple):
    """Seconds of the three steps, one after the other."""

    reading: float
    network: float
    writing: float


def in_turn(jobs: Sequence[Job], upscaler: Upscaler) -> Steps:
    """Upscale one image after the other, each step of it after the one before."""
    seconds = [0.0, 0.0, 0.0]
    for job in jobs:
        marks = [time.perf_counter()]
        picture = read_picture(job.source)
        marks.append(time.perf_counter())
        pixels = upscaler(picture.pixels)
        marks.append(time.perf_counter())
        result = Picture(pixels, picture.icc_profile, picture.exif)
        write_whole(job.target, encode_picture(result, job.file_format, DEFAULT_QUALITY))
        marks.append(time.perf_counter())
        seconds = [total + after - before for total, before, after in zip(seconds, marks, marks[1:])]
    return Steps(*seconds)


def run(
    inputs: Sequence[str | os.PathLike],
    model: NetworkLike,
    dtype: torch.dtype = torch.float32,
    repeats: int = REPEATS,
) -> None:
    """Print the seconds of the three steps in turn, those of `lora-sr upscale`, and their ratio.

    The two take turns, after a pass that is not counted; of each the median of the sum counts.

    Args:
        inputs: Images, folders and patterns, as :func:`lora_sr.deploy.upscale.upscale` takes them.
        model: Checkpoint, see :func:`lora_sr.load_network`.
        dtype: What the network computes in.
        repeats: How often each is measured.

    Raises:
        InputError: An image or the checkpoint cannot be used, or there is no place for temporary files.
    """
    upscaler = Upscaler(load_network(model), dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        jobs, failures = plan(inputs, Path(folder))
        for job in jobs:
            job.target.parent.mkdir(parents=True, exist_ok=True)
        steps, overlapped = [], []
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            failures.update(run_jobs(jobs, upscaler))
            if failures:
                raise InputError(next(iter(failures.values())))
            if repeat:  # the first pass chooses algorithms and records graphs
                overlapped.append(time.perf_counter() - start)
                steps.append(in_turn(jobs, upscaler))
    middle = sorted(steps, key=sum)[repeats // 2]
    at_once = statistics.median(overlapped)
    threads = '' if upscaler.device.type != 'cpu' else f', {torch.get_num_threads()} threads'
    precision = str(dtype).rpartition('.')[2]
    print(f'{upscaler.name} x{upscaler.scale}, {precision}, {len(jobs)} images, {upscaler.device.type}{threads}')
    for name, seconds in middle._asdict().items():
        print(f'{name:22}{seconds:>9.2f} s')
    for name, seconds in (('one after the other', sum(middle)), ('lora-sr upscale', at_once)):
        print(f'{name:22}{seconds:>9.2f} s{len(jobs) / seconds:>10.2f} images/s')
    print(f'{"ratio":22}{sum(middle) / at_once:>9.2f}')
