"""The whole step as one CUDA graph: forward, losses, backward, optimizers and average, started by a single call."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora_sr.basicsr.options.schema import DISTILLATION, GAN, PLAIN
from lora_sr.errors import shown
from lora_sr.runtime.cuda_graphs import capture

if TYPE_CHECKING:
    from lora_sr.basicsr.step.training_step import TrainingStep

LOG = logging.getLogger('basicsr')

# Models whose steps differ only as :meth:`GraphedStep._kind` tells.
ALIKE = f'{PLAIN} {GAN} {DISTILLATION}'.split()
WARM_UP = 3  # steps before one is recorded: cuDNN chooses its kernels, and the optimizers make their states


@dataclass
class _Recorded:
    """A step that has been recorded, and the tensors that it reads and writes.

    ``batch`` and ``rates`` are filled before each replay; ``log`` are the losses of the latest.
    """

    batch: dict[str, Tensor]
    rates: list[list[Tensor]]
    graph: Any = None
    log: dict[str, Any] = field(default_factory=dict)
    output: Any = None


class GraphedStep:
    """Records a step of a model once it has warmed up, and replays it from then on.

    Patches have one size, so all that differs between two steps is the batch and the learning rates, which stand in
    tensors here. Steps that differ in what they do (the first iterations of a GAN train the discriminator alone) are
    recorded for themselves. What cannot be recorded is said once, and runs without.

    Args:
        step: The step that is run.
    """

    def __init__(self, step: TrainingStep):
        self._step = step
        self._recorded: dict[Hashable, _Recorded] = {}
        self._warm: dict[Hashable, int] = {}
        self._reason = _refusal(step)
        if self._reason:
            LOG.warning('train.graph: %s; the steps run without.', self._reason)

    def __call__(self, current_iter: int) -> None:
        """One step, replayed where there is a recording of it."""
        if self._reason:
            self._step.run(current_iter)
            return
        kind = self._kind(current_iter)
        if kind in self._recorded:
            self._replay(self._recorded[kind])
        elif self._warm.setdefault(kind, 0) < WARM_UP:
            self._warm[kind] += 1
            with _beside():
                self._step.run(current_iter)
        else:
            self._record(kind, current_iter)

    def _kind(self, current_iter: int) -> Hashable:
        """What decides what a step does, as far as the models of BasicSR and of this package go."""
        model = self._step.model
        every, first = getattr(model, 'net_d_iters', 1), getattr(model, 'net_d_init_iters', 0)
        trains_generator = current_iter % every == 0 and current_iter > first
        return trains_generator, tuple((name, value.shape) for name, value in self._step.batch().items())

    def _record(self, kind: Hashable, current_iter: int) -> None:
        model = self._step.model
        given = self._step.batch()
        recorded = _Recorded(
            {name: value.clone() for name, value in given.items()},
            [[_rate(group['lr'], model.device) for group in one.param_groups] for one in model.optimizers],
        )
        for name, value in recorded.batch.items():
            setattr(model, name, value)
        try:
            with _rates(model.optimizers, recorded.rates):
                recorded.graph, _ = capture(lambda: self._step.run(current_iter))
        except Exception as error:  # whatever a step does that cannot be recorded; what is wrong in itself comes again
            self._reason = shown(f'{type(error).__name__}: {error}')
            LOG.warning('train.graph: the step could not be recorded (%s); the steps run without.', self._reason)
            for name, value in given.items():
                setattr(model, name, value)
            self._step.renew_scaler()
            self._step.run(current_iter)
            return
        recorded.log, recorded.output = model.log_dict, getattr(model, 'output', None)
        self._recorded[kind] = recorded
        recorded.graph.replay()  # to record is not to run

    def _replay(self, recorded: _Recorded) -> None:
        model = self._step.model
        for name, value in recorded.batch.items():
            value.copy_(getattr(model, name), non_blocking=True)
            setattr(model, name, value)
        for optimizer, rates in zip(model.optimizers, recorded.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                rate.fill_(group['lr'])
        recorded.graph.replay()
        model.log_dict, model.output = recorded.log, recorded.output


@contextmanager
def _beside() -> Iterator[None]:
    """Run on another stream, as what is recorded later wants to have been run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _rates(optimizers: list[Optimizer], rates: list[list[Tensor]]) -> Iterator[None]:
    """Let optimizers read their learning rates from tensors; schedulers go on with numbers."""
    groups = [(group, rate) for one, of_one in zip(optimizers, rates) for group, rate in zip(one.param_groups, of_one)]
    before = [group['lr'] for group, _ in groups]
    try:
        for group, rate in groups:
            group['lr'] = rate
        yield
    finally:
        for (group, _), value in zip(groups, before):
            group['lr'] = value


def _rate(value: float, device: torch.device) -> Tensor:
    return torch.tensor(float(value), device=device)


def _refusal(step: TrainingStep) -> str:
    """Why the steps of a model cannot be recorded; empty where they can."""
    model = step.model
    if model.device.type != 'cuda':
        return 'a CUDA graph needs a GPU'
    if model.opt['dist']:
        return 'a step of several processes is not recorded'
    kind = type(model)
    if kind.__name__ not in ALIKE or not kind.__module__.startswith(('basicsr.', 'lora_sr.')):
        return f'{kind.__name__} may do something else in each iteration'
    if step.settings.checkpointing:
        return 'train.checkpointing keeps the states of random numbers, which is not recorded'
    for optimizer in model.optimizers:
        if not all(group.get('capturable') for group in optimizer.param_groups):
            return f'{type(optimizer).__name__} has no option capturable'
        if step.scaler is not None and not getattr(optimizer, '_step_supports_amp_scaling', False):
            return f'{type(optimizer).__name__} waits for the scale of train.amp: fp16'
    return ''
