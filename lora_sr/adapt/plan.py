"""How an adaptation is trained: what of the network, in which batches, for how long."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_sr.adapters import GROUPS, LoRAConfig, add_lora, count_parameters, delta_kind, layer_groups, mark_trainable
from lora_sr.adapters.layers import is_depthwise
from lora_sr.archs import NetworkInfo
from lora_sr.errors import InputError
from lora_sr.runtime.upscaler import best_device

DEFAULT_SHARE = 0.1
LARGEST_RANK = 16
ALSO_TRAIN = ('bias', 'norm', 'position', 'parameters')
# (batch, side of the LR patches, enough iterations): the first that leaves time for so many counts. Up to thousands of
# iterations, more of them bring more than larger batches do.
BATCHES = (
    (16, 64, 4000),
    (16, 48, 4000),
    (8, 48, 4000),
    (8, 32, 4000),
    (4, 32, 500),
    (4, 24, 500),
    (2, 24, 500),
    (1, 24, 1),
)
MOST_VALIDATIONS, OF_VALIDATIONS = 12, 0.15  # in a training; of its time
BETWEEN_VALIDATIONS = 4  # iterations at least
TRIAL = 4, 32
TRIALS = 3


def lora_for(network: nn.Module, share: float | None) -> tuple[dict[str, Any], int]:
    """What to adapt of a network within a share of its parameters, and how many parameters train then.

    Layers have LoRA of one rank, the largest that fits, up to 16. Biases, normalizations and whatever else cannot have
    it train as deltas, as far as they fit beside rank 1. Depth-wise layers stay as they are: on pairs of a phone, LoRA
    on those of LKDN brought 0.01 dB, and a higher rank elsewhere more.

    Args:
        network: The network.
        share: Of its parameters, above 0; ``None`` for a tenth, or more where rank 1 takes more.

    Returns:
        The section ``lora`` of an option file, and a number of parameters.

    Raises:
        InputError: No layer can carry LoRA; or rank 1 takes more than the share.
    """
    bare = deepcopy(network).to('meta')
    groups = [group for group in GROUPS if group in layer_groups(bare).values()]
    if not groups:
        raise InputError('the network has no layer that can carry LoRA')
    kinds = {delta_kind(module, name) for module in bare.modules() for name in module._parameters}
    depthwise = _depthwise_patterns(bare)
    total = sum(parameter.numel() for parameter in bare.parameters())
    most = (DEFAULT_SHARE if share is None else share) * total

    def section(rank: int, also_train: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {'groups': ['all'], 'rank': rank, 'alpha': rank}
        if also_train:
            found['also_train'] = list(also_train)
        if depthwise:
            found['exclude_modules'] = depthwise
        return found

    def size(rank: int, also_train: Sequence[str]) -> int:
        return count_parameters(add_lora(deepcopy(bare), LoRAConfig.from_dict(section(rank, also_train)))).lora

    least = size(1, ())
    if least > most and share is not None:
        raise InputError(
            f'--share must be at least {least / total:.1%}, at which LoRA has rank 1, got {100 * share:.4g}%.'
        )
    also_train: list[str] = []
    for kind in ALSO_TRAIN:
        if kind in kinds and size(1, [*also_train, kind]) <= most:
            also_train.append(kind)
    rank = 1
    while rank < LARGEST_RANK and size(rank + 1, also_train) <= most:
        rank += 1
    return section(rank, also_train), size(rank, also_train)


def _depthwise_patterns(network: nn.Module) -> list[str]:
    """Patterns of the names of depth-wise layers: of their last parts, where these tell them from all others."""
    names = {name: is_depthwise(module) for name, module in network.named_modules()}
    depthwise = [name for name, is_one in names.items() if is_one]
    parts = {name.rpartition('.')[2] for name in depthwise}
    others = {name.rpartition('.')[2] for name, is_one in names.items() if not is_one}
    if not parts or parts & others:
        return [re.escape(name) for name in depthwise]
    return [rf'(.*\.)?({"|".join(map(re.escape, sorted(parts)))})']


@dataclass(frozen=True)
class Batches:
    """What a step takes.

    Attributes:
        batch: Number of patches.
        side: Of a patch, in LR pixels.
        seconds_per_pixel: Of running the network, per LR pixel, as measured.
    """

    batch: int
    side: int
    seconds_per_pixel: float


def batches_for(network: nn.Module, lora: dict[str, Any], info: NetworkInfo, smallest: int, seconds: float) -> Batches:
    """The largest batches of which enough fit in some seconds, by timing a few steps.

    Args:
        network: The network; it is not changed.
        lora: What of it trains.
        info: What it takes.
        smallest: Side of the smallest LR image.
        seconds: How long the training may take.
    """
    trained = add_lora(deepcopy(network), LoRAConfig.from_dict(lora)).to(best_device())
    mark_trainable(trained)
    count, side = TRIAL
    height, width = info.size(side, side)
    image = torch.rand(count, info.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    image = image.to(best_device())

    def step() -> None:
        trained.train()
        (trained(image) / info.value_range).abs().mean().backward()

    def run() -> None:
        trained.eval()
        with torch.inference_mode():
            trained(image[:1])

    pixels = count * height * width
    cost = _seconds(step) / pixels
    usable = [(batch, _side(info, side), enough) for batch, side, enough in BATCHES if _side(info, side) <= smallest]
    usable = usable or [(1, _side(info, 1), 1)]
    fitting = [(batch, side) for batch, side, enough in usable if enough * cost * batch * side**2 <= seconds]
    batch, side = fitting[0] if fitting else usable[-1][:2]
    return Batches(batch, side, _seconds(run) / (height * width))


@dataclass(frozen=True)
class Schedule:
    """How long a training is.

    Attributes:
        iterations: Of it.
        validations: How many of them come while it lasts, evenly spread.
    """

    iterations: int
    validations: int


def schedule_for(seconds: float, step_seconds: float, validation_seconds: float) -> Schedule:
    """As many iterations as there is time for, and up to 12 validations among them, which have up to 15% of it.

    Args:
        seconds: How long the training may take.
        step_seconds: Of an iteration.
        validation_seconds: Of a validation.
    """
    validations = min(MOST_VALIDATIONS, max(1, int(seconds * OF_VALIDATIONS / validation_seconds)))
    iterations = max(1, int((seconds - validations * validation_seconds) / step_seconds))
    return Schedule(iterations, min(validations, max(1, iterations // BETWEEN_VALIDATIONS)))


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 in a training here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    flags = Path('/proc/cpuinfo')
    words = flags.read_text().split() if flags.exists() else []
    return 'avx512_bf16' in words or 'amx_bf16' in words


def _side(info: NetworkInfo, at_least: int) -> int:
    return max(info.size(at_least, at_least))


def _seconds(run: Any) -> float:
    """The median time of a call, after one that warms up."""
    times = []
    for _ in range(1 + TRIALS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
