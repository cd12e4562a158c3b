"""Time of a step of Adan beside adan_pytorch's, on the parameters of LKDN, in one run."""

from __future__ import annotations

import statistics
import time
from copy import deepcopy

import adan_pytorch
import torch
from torch.optim import Optimizer

from lora_sr.archs.lkdn import LKDN
from lora_sr.optim import Adan

LEARNING_RATE, WEIGHT_DECAY = 5e-3, 0.02
BETAS = (0.98, 0.92, 0.99)
REPEATS = 50
TOLERANCE = 1e-9


def make_optimizers(dtype: torch.dtype = torch.float32, device: str = 'cpu') -> dict[str, Optimizer]:
    """Our Adan (``ours``) and ``adan_pytorch``, each on parameters of its own as LKDN x4 has them, after a step.

    The first step of the two differs, so adan_pytorch goes on from the parameters and the state of ours.
    """
    params = [param.detach().to(device, dtype) for param in LKDN().parameters()]
    ours = Adan(params, LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    set_gradients([ours])
    ours.step()
    copies, betas = [param.clone() for param in params], tuple(1 - beta for beta in BETAS)
    theirs = adan_pytorch.Adan(copies, LEARNING_RATE, betas, weight_decay=WEIGHT_DECAY)
    state = deepcopy(ours.state_dict()['state'])
    theirs.load_state_dict({'state': state, 'param_groups': theirs.state_dict()['param_groups']})
    return {'ours': ours, 'adan_pytorch': theirs}


def set_gradients(optimizers: list[Optimizer]) -> None:
    """Give all of them the same random gradients."""
    for same in zip(*(optimizer.param_groups[0]['params'] for optimizer in optimizers)):
        gradient = torch.randn_like(same[0])
        for param in same:
            param.grad = gradient.clone()


def measure_times(optimizers: dict[str, Optimizer], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of a step of each optimizer, which take turns, after three that are not counted."""
    on_gpu = optimizers['ours'].param_groups[0]['params'][0].is_cuda
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats + 3):
        set_gradients(list(optimizers.values()))
        for name, optimizer in optimizers.items():
            synchronize()
            start = time.perf_counter()
            optimizer.step()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[3:]) for name, seconds in times.items()}


def measure_difference(optimizers: dict[str, Optimizer], steps: int = 3) -> float:
    """By how much the parameters of the two differ after some steps, as a part of the largest parameter."""
    for _ in range(steps):
        set_gradients(list(optimizers.values()))
        for optimizer in optimizers.values():
            optimizer.step()
    first, second = (
        torch.cat([param.flatten() for param in optimizer.param_groups[0]['params']])
        for optimizer in optimizers.values()
    )
    return ((first - second).abs().max() / first.abs().max()).item()


def run(repeats: int = REPEATS) -> None:
    """Print the time of a step of both and their ratio.

    Args:
        repeats: How many steps are measured.

    Raises:
        RuntimeError: In float64, the parameters of the two differ by more than 1e-9 of the largest after three steps.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    threads = '' if device == 'cuda' else f' (threads: {torch.get_num_threads()})'
    torch.manual_seed(0)
    difference = measure_difference(make_optimizers(torch.float64, device))
    if not difference <= TOLERANCE:
        raise RuntimeError(f'the parameters of the two differ by {difference:.1e} of the largest')
    optimizers = make_optimizers(device=device)
    sizes = [param.numel() for param in optimizers['ours'].param_groups[0]['params']]
    print(f'Adan, a step on the {len(sizes)} tensors of LKDN x4, {sum(sizes):,} values, float32, {device}{threads}')
    times = measure_times(optimizers, repeats)
    for name, seconds in times.items():
        print(f'{name:22}{seconds * 1e3:>9.2f} ms')
    print(f'{"adan_pytorch / ours":22}{times["adan_pytorch"] / times["ours"]:>12.2f}')
    print(f'parameters of the two differ by {difference:.1e} of the largest, in float64')
