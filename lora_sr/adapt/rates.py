"""The learning rate: a few short trainings on the same patches, judged on the pairs that are held back."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lora_sr.adapt.held import Held, measure
from lora_sr.errors import InputError

FEWEST_STEPS, MOST_STEPS = 12, 200
MOST_BYTES = 2**29  # of patches that are kept for all rates
HORIZON = -0.25  # exponent: how the best rate falls with the number of steps
TIMED = 3  # steps, after one that warms up


@dataclass(frozen=True)
class RateTest:
    """What :func:`find_rate` has found.

    Attributes:
        psnr: {learning rate: PSNR in dB on the pairs of the camera that are held back}; ``-inf`` where it diverged.
        steps: Of each trial.
        step_seconds: Of a step, with its patches.
    """

    psnr: dict[float, float]
    steps: int
    step_seconds: float

    @property
    def best(self) -> float:
        """The rate with the highest PSNR."""
        return max(self.psnr, key=lambda rate: self.psnr[rate])

    @property
    def top(self) -> float:
        """Where PSNR is highest by the parabola through the best rate and those next to it, over logarithms of rates.

        It is between these three. Where fewer did not diverge, or they have no top, it is the best rate itself.
        """
        rates = sorted(rate for rate in self.psnr if math.isfinite(self.psnr[rate]))
        if len(rates) < 3:
            return self.best
        first = min(max(rates.index(self.best) - 1, 0), len(rates) - 3)
        x = [math.log(rate) for rate in rates[first : first + 3]]
        y = [self.psnr[rate] for rate in rates[first : first + 3]]
        slopes = [(y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])]
        curvature = (slopes[1] - slopes[0]) / (x[2] - x[0])
        if curvature >= 0:
            return self.best
        top = (x[0] + x[1]) / 2 - slopes[0] / (2 * curvature)
        return math.exp(min(max(top, x[0]), x[2]))


def rate_for(top: float, steps: int, iterations: int) -> float:
    """The rate for a training, of what was best in trials: the longer it is, the lower.

    Trials of 64 steps preferred 1.5e-2 for LKDN on the pairs of a phone; over 4,000 iterations 8e-3 was better than
    1.6e-2 by 0.07 dB. For language models the exponent is -0.32 (arXiv:2409.19913).

    Args:
        top: The best rate of the trials.
        steps: Of each trial.
        iterations: Of the training.
    """
    return top * max(1.0, iterations / steps) ** HORIZON


def find_rate(
    option_file: Path,
    rates: Sequence[float],
    seconds: float,
    held: Sequence[Held],
    scale: int,
    told: Callable[[float, float], None] = lambda rate, psnr: None,
) -> RateTest:
    """Train for a short time with each rate, a cosine down to nothing, from the same start and on the same patches.

    The model, the losses, the patches and the step are those of the option file; nothing is written.

    Args:
        option_file: In the folder that its relative paths are of.
        rates: The learning rates to try.
        seconds: How long all of it may take.
        held: The pairs to measure on.
        scale: Scale factor.
        told: Called with each rate and what it gave.

    Raises:
        InputError: The network diverges at each of them.
    """
    from lora_sr.basicsr.built import build_of_options

    def change(opt: dict[str, Any]) -> None:
        opt['train']['ema_decay'] = 0  # an average would lag behind so few steps
        for section in (opt['datasets']['train'], opt['path']):
            for key in ('dataroot_gt', 'dataroot_lq', 'pretrain_network_g'):
                if section.get(key):
                    section[key] = os.path.join(option_file.parent, section[key])

    model, batches = build_of_options(option_file, change)
    network, optimizer = model.get_bare_model(model.net_g), model.optimizers[0]
    start = deepcopy(network.state_dict())
    untouched = deepcopy(optimizer.state_dict())

    def train(rate: float, samples: Sequence[Any]) -> None:
        network.load_state_dict(start)
        optimizer.load_state_dict(deepcopy(untouched))
        network.train()
        for number, batch in enumerate(samples):
            for group in optimizer.param_groups:
                group['lr'] = rate * (1 + math.cos(math.pi * number / len(samples))) / 2
            model.feed_data(batch)
            model.optimize_parameters(number + 1)

    timed = list(islice(batches, 1 + TIMED))
    train(rates[0], timed[:1])
    _wait()
    begin = time.perf_counter()
    train(rates[0], timed[1:])
    _wait()
    step_seconds = (time.perf_counter() - begin) / TIMED
    size = sum(value.nbytes for value in timed[0].values() if isinstance(value, torch.Tensor))
    most = min(MOST_STEPS, max(FEWEST_STEPS, MOST_BYTES // size))
    steps = max(FEWEST_STEPS, min(most, int(seconds / (len(rates) * step_seconds))))
    samples = list(islice(batches, steps))
    found = {}
    for rate in rates:
        train(rate, samples)
        network.eval()
        try:
            psnr = measure(network, held, scale, has_clean=False).camera
        except InputError:  # what it gives is not finite
            psnr = -math.inf
        found[rate] = psnr if math.isfinite(psnr) else -math.inf
        told(rate, found[rate])
    if max(found.values()) == -math.inf:
        raise InputError(
            f'The network cannot be trained: it diverges at each of the rates {", ".join(map(str, found))}.'
        )
    return RateTest(found, steps, step_seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
