"""Memory and time of the spatial affinity loss beside its naive form, in one run."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_sr.errors import InputError
from lora_sr.losses.affinity import spatial_affinity_distance

SHAPE = (4, 26, 64, 64)
LARGEST_SIZE = 256  # of which each map of the naive form has 69 GB


def naive_affinity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The same distance by its definition, with whole (HW, HW) matrices: the form to measure against."""
    units = [F.normalize(features.flatten(2), dim=1) for features in (student, teacher)]
    ours, theirs = (unit.transpose(1, 2) @ unit for unit in units)
    return (ours - theirs).abs().mean()


FORMS = {'blockwise': spatial_affinity_distance, 'naive': naive_affinity_distance}

# One form only may run in a process whose peak is read, and the libraries must have allocated their own share before.
_MEMORY_PROGRAM = """
import sys
sys.path[:] = {path!r}  # on which the current folder is not the first, as it is for `python -c`
import torch
from lora_sr.benchmarks.affinity import FORMS, forward_backward
from lora_sr.report.memory import forget_peak, peak
torch.set_num_threads({threads})
forward_backward(FORMS[{form!r}], (1, 2, 8, 8), 'cpu')
student, teacher = torch.randn(2, *{shape})
student.requires_grad_()
before = forget_peak()
FORMS[{form!r}](student, teacher).backward()
print(peak() - before)
"""


def forward_backward(form: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], device: str) -> None:
    """One forward and backward pass of ``form`` on random features."""
    student, teacher = torch.randn(2, *shape, device=device)
    form(student.requires_grad_(), teacher).backward()


def measure_peak_memory(form: str, shape: tuple[int, ...] = SHAPE) -> int:
    """Bytes by which a forward and backward pass raises a fresh process's peak resident memory (Linux).

    Args:
        form: 'blockwise' or 'naive'.
        shape: Shape (N, C, H, W) of the features.
    """
    program = _MEMORY_PROGRAM.format(path=sys.path, form=form, shape=tuple(shape), threads=torch.get_num_threads())
    output = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1])


def measure_cuda_memory(form: str, shape: tuple[int, ...] = SHAPE) -> int:
    """Bytes of device memory that a forward and backward pass allocates at its peak beyond what was there."""
    student, teacher = torch.randn(2, *shape, device='cuda')
    student.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    FORMS[form](student, teacher).backward()
    return torch.cuda.max_memory_allocated() - before


def measure_time(form: str, shape: tuple[int, ...] = SHAPE, device: str = 'cpu', repeats: int = 7) -> float:
    """Median seconds of a forward and backward pass, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        forward_backward(FORMS[form], shape, device)
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def run(size: int = SHAPE[2]) -> None:
    """Print memory and time of both forms and their ratios, for features (4, 26, size, size).

    Raises:
        InputError: The size is below 1, or so large that the naive form needs more memory than machines have.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise InputError(f'--size must be a whole number from 1 to {LARGEST_SIZE}, got {size}.')
    shape = (*SHAPE[:2], size, size)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print(f'spatial affinity loss, forward and backward, float32 features {shape}, {device}')
    print(f'{"":20}{"memory beyond inputs":>22}{"time":>12}')
    measured = {}
    for form in FORMS:
        memory = measure_cuda_memory(form, shape) if device == 'cuda' else measure_peak_memory(form, shape)
        measured[form] = memory, measure_time(form, shape, device)
        print(f'{form:20}{memory / 1e6:>19.1f} MB{measured[form][1] * 1e3:>9.1f} ms')
    (memory, seconds), (naive_memory, naive_seconds) = measured['blockwise'], measured['naive']
    print(f'{"naive / blockwise":20}{naive_memory / max(memory, 1):>22.1f}{naive_seconds / seconds:>12.2f}')
