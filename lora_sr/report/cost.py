"""What a network costs where it runs: runtime, peak memory, and the score of the NTIRE challenge."""

from __future__ import annotations

import io
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_sr.errors import InputError, shown

Name = TypeVar('Name')

WARM_UP = 3  # passes of each network that are not counted
MIN_ROUNDS, MAX_ROUNDS = 5, 100
SECONDS = 5.0  # for each network; slow networks take longer, as they have their least number of rounds
WEIGHTS_2025 = (0.7, 0.15, 0.15)  # of runtime, FLOPs and parameters

# A process of its own: its peak is that of this network alone. The network comes by the standard input.
# It gets the path of this process, on which the current folder, unlike on that of `python -c`, is not the first.
_MEMORY_PROGRAM = """
import io, sys
sys.path[:] = {path!r}
import torch
import lora_sr
from lora_sr.report.memory import forget_peak, peak
torch.set_num_threads({threads})
network = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
with torch.no_grad():
    network(torch.rand(1, 3, 32, 32))  # what libraries allocate once
    before = forget_peak()
    network(torch.rand(1, 3, {height}, {width}))
print(peak() - before)
"""


def ntire_score(cost: Sequence[float], baseline: Sequence[float], weights: Sequence[float] = WEIGHTS_2025) -> float:
    """The score by which the NTIRE efficient SR challenge ranks; lower is better, and the baseline has e² = 7.389.

    The sum of ``weight * exp(2 * value / value of the baseline)`` over runtime, FLOPs and parameters: B. Ren et al.,
    "The Tenth NTIRE 2025 Efficient Super-Resolution Challenge Report" (arXiv:2504.10686). The weights are those of
    2025; in 2026 the organizers took 0.8, 0.1 and 0.1. Its condition on the PSNR is not part of it.

    Args:
        cost: Runtime, FLOPs for an input of 256x256 and number of parameters, in any units.
        baseline: The same of the baseline, in the same units.
        weights: Of the three.

    Returns:
        The score, infinite where it is beyond float64.
    """
    try:
        return sum(weight * math.exp(2 * value / base) for weight, value, base in zip(weights, cost, baseline))
    except OverflowError:
        return math.inf


@torch.no_grad()
def measure_runtimes(
    networks: Mapping[Name, nn.Module], height: int, width: int, device: torch.device
) -> dict[Name, float]:
    """Median seconds of a forward pass of each network, batch 1, float32.

    The networks take turns, so that all meet the same load, and each has run three times before. A GPU measures itself,
    by its events, as in the code of the NTIRE challenge.

    Args:
        networks: Name -> network, (1, 3, height, width) -> image, in eval mode. They are moved to ``device``.
        height: Height of the input, in pixels.
        width: Its width.
        device: Where they run.
    """
    image = torch.rand(1, 3, height, width, device=device)
    for network in networks.values():
        network.to(device)
        for _ in range(WARM_UP):
            network(image)
    times: dict[Name, list[float]] = {name: [] for name in networks}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > SECONDS * len(networks):
            break
        for name, network in networks.items():
            times[name].append(_time(network, image))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_peak_memory(network: nn.Module, height: int, width: int, device: torch.device) -> int | None:
    """Bytes that a network has at its peak in a forward pass, batch 1, float32: weights, input, and what is between.

    On a GPU these are the bytes that torch allocates there. On the CPU they are the resident memory by which the pass
    raises the peak of a process of its own, and the weights; Linux alone tells it.

    Args:
        network: As for :func:`measure_runtimes`. It is left on the CPU.
        height: Height of the input, in pixels.
        width: Its width.
        device: Where it runs.

    Returns:
        Bytes, or ``None`` where the system does not tell.

    Raises:
        InputError: The process did not get through, for want of memory for instance.
    """
    if device.type == 'cuda':
        return _cuda_memory(network.cpu(), height, width, device)
    return _cpu_memory(network, height, width) if os.path.exists('/proc/self/status') else None


def _time(network: nn.Module, image: Tensor) -> float:
    if image.device.type != 'cuda':
        seconds = time.perf_counter()
        network(image)
        return time.perf_counter() - seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    network(image)
    end.record()
    torch.cuda.synchronize(image.device)
    return start.elapsed_time(end) / 1e3


@torch.no_grad()
def _cuda_memory(network: nn.Module, height: int, width: int, device: torch.device) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    network.to(device)(torch.rand(1, 3, height, width, device=device))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    network.cpu()
    return peak


def _cpu_memory(network: nn.Module, height: int, width: int) -> int:
    data = io.BytesIO()
    torch.save(network.cpu(), data)
    program = _MEMORY_PROGRAM.format(path=sys.path, threads=torch.get_num_threads(), height=height, width=width)
    # Of large blocks the allocator keeps none for later, so that memory is counted once it is used.
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': str(1 << 20)}
    process = subprocess.run(
        [sys.executable, '-c', program], input=data.getvalue(), capture_output=True, env=environment
    )
    if process.returncode:
        reason = (process.stderr.decode(errors='replace').strip().splitlines() or ['it was ended'])[-1]
        raise InputError(
            f'The peak memory of {type(network).__name__} cannot be measured with an input of {width}x{height} pixels '
            f'(status {process.returncode}: {shown(reason)}); a smaller input may do.'
        )
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    return int(process.stdout.split()[-1]) + weights
