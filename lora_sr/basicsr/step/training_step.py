"""The step of a model, around the ``optimize_parameters`` that it has, whoever wrote that."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from lora_sr.basicsr.options.step import DATA_PARALLEL_REFUSED
from lora_sr.basicsr.step.graph import GraphedStep
from lora_sr.basicsr.step.networks import StepNetworks
from lora_sr.basicsr.step.settings import StepSettings, memory_format
from lora_sr.errors import InputError

POOL = ('queue_lr', 'queue_gt')  # of Real-ESRGAN's models: pairs that wait, which are no batch


def take_charge(model: Any) -> None:
    """Let a model that trains run by what its section ``train`` says of the step; as it is where that says nothing.

    Raises:
        InputError: A setting that the model cannot have.
    """
    settings = StepSettings.of(model.opt['train'])
    if settings != StepSettings() or memory_format(model.opt['train']) != torch.contiguous_format:
        TrainingStep(model, settings).install()


def settings_of_processes(settings: StepSettings) -> StepSettings:
    """The settings that one process for several GPUs cannot have: its networks are copied in each iteration."""
    return replace(settings, clip_grad_norm=None, tf32=None)


class TrainingStep:
    """A model's ``optimize_parameters`` by ``train.amp``, ``compile``, ``accumulate_iter``, ``clip_grad_norm``, ….

    It holds for any model, as it takes hold of what every model calls: the networks that its optimizers train, these
    optimizers, ``Tensor.backward`` and ``model_ema``. With ``accumulate_iter: N`` a batch is N times as large, and goes
    through ``optimize_parameters`` in N parts, of which the last one lets the optimizers step: an iteration is a step.

    Attributes:
        scaler: The scale of the losses with ``amp: fp16``, else ``None``.

    Raises:
        InputError: A setting that the model cannot have.
    """

    def __init__(self, model: Any, settings: StepSettings):
        self.model, self.settings = model, settings
        self.scaler = _scaler(model.device) if settings.amp is torch.float16 else None
        self._optimize: Callable[[int], None] = model.optimize_parameters
        self._networks = StepNetworks(settings, memory_format(model.opt['train']))
        self._part = 0
        self._is_stepping = False
        self._cleared: set[int] = set()  # optimizers that were told to clear their gradients, in any part
        self._waiting: dict[int, int] = {}  # those that step in the last part, with the part that asked for it last
        self._stepped = False
        self._batch: list[str] = []
        self._graph = GraphedStep(self) if settings.graph else None
        if settings.tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32

    def install(self) -> None:
        """Let the model run by it from now on."""
        model = self.model
        for name, network in self._trained():
            if not isinstance(network, DataParallel):
                self._networks.add(f'network_{name[4:]}', model.get_bare_model(network))
            elif settings_of_processes(self.settings) != StepSettings():
                raise InputError(DATA_PARALLEL_REFUSED)
        if isinstance(getattr(model, 'net_t', None), nn.Module):
            self._networks.add('network_t', model.net_t)
        if self.settings.accumulate_iter > 1 or self.settings.clip_grad_norm is not None or self.scaler is not None:
            for optimizer in model.optimizers:
                self._take_over(optimizer)
        if self.settings.accumulate_iter > 1 or self._graph is not None:
            model.feed_data = self._feeding(model.feed_data)
        if self.settings.accumulate_iter > 1:
            model.model_ema = self._on_last_part(model.model_ema)
        model.training_step = self
        model.optimize_parameters = self

    def __call__(self, current_iter: int) -> None:
        """One step: what the model does in an iteration."""
        with self._networks.active():
            if self._graph is None:
                self.run(current_iter)
            else:
                self._graph(current_iter)

    def run(self, current_iter: int) -> None:
        """One step, call by call."""
        parts = self.settings.accumulate_iter
        self._stepped = False
        with _losses_scaled(self._scale) if parts > 1 or self.scaler is not None else ExitStack():
            if parts == 1:
                self._optimize(current_iter)
            else:
                self._run_parts(current_iter, parts)
        if self.scaler is not None and self._stepped:
            self.scaler.update()

    def batch(self) -> dict[str, Tensor]:
        """The tensors of the batch that the model was fed last, by the names that it gave them."""
        return {name: getattr(self.model, name) for name in self._batch}

    def renew_scaler(self) -> None:
        """Forget which optimizers have stepped, where a step has broken off: the scale stays as it is."""
        if self.scaler is not None:
            scale = self.scaler.state_dict()
            self.scaler = _scaler(self.model.device)
            self.scaler.load_state_dict(scale)

    def _run_parts(self, current_iter: int, parts: int) -> None:
        whole = self.batch()
        if not whole or any(len(value) % parts for value in whole.values()):
            raise self._no_parts('does not keep its batch in tensors')
        chunks = {name: value.chunk(parts) for name, value in whole.items()}
        logs = []
        self._cleared.clear()
        self._waiting.clear()
        try:
            for self._part in range(parts):
                for name, values in chunks.items():
                    setattr(self.model, name, values[self._part])
                with self._unsynchronized() if self._part < parts - 1 else ExitStack():
                    self._optimize(current_iter)
                logs.append(self.model.log_dict)
        finally:
            self._part = 0
            for name, value in whole.items():
                setattr(self.model, name, value)
        self.model.log_dict = {name: sum(log[name] for log in logs) / parts for name in logs[0]}

    def _trained(self) -> Iterator[tuple[str, nn.Module]]:
        """The networks that the optimizers train, with the names of their attributes."""
        groups = [group for optimizer in self.model.optimizers for group in optimizer.param_groups]
        trained = {id(value) for group in groups for value in group['params']}
        for name, value in vars(self.model).items():
            if isinstance(value, nn.Module) and any(id(parameter) in trained for parameter in value.parameters()):
                yield name, value

    def _scale(self, loss: Tensor) -> Tensor:
        loss = loss if self.settings.accumulate_iter == 1 else loss / self.settings.accumulate_iter
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _take_over(self, optimizer: Optimizer) -> None:
        """Let an optimizer step in the last part alone, with its gradients unscaled and clipped."""
        step, zero_grad = optimizer.step, optimizer.zero_grad

        @functools.wraps(step)  # also what a scheduler has noted there
        def taken(_: Optimizer, closure: Any = None) -> Any:
            if self._is_stepping:
                return step(closure)
            if self._is_last_part():
                self._waiting.pop(id(optimizer), None)
                self._step(optimizer)
            elif self._waiting.get(id(optimizer)) == self._part:
                raise self._no_parts('steps more than once in an iteration')
            else:
                self._waiting[id(optimizer)] = self._part
            return None

        @functools.wraps(zero_grad)
        def cleared(_: Optimizer, set_to_none: bool = True) -> None:
            self._cleared.add(id(optimizer))
            if id(optimizer) not in self._waiting:  # else these are the gradients that it waits to step with
                zero_grad(set_to_none)

        # Methods, as a scheduler that is made later wants to wrap one.
        optimizer.step = types.MethodType(taken, optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = types.MethodType(cleared, optimizer)  # type: ignore[method-assign]

    def _no_parts(self, reason: str) -> InputError:
        count = self.settings.accumulate_iter
        return InputError(
            f'train.accumulate_iter must be 1 for {type(self.model).__name__}, which {reason}, got {count}.'
        )

    def _step(self, optimizer: Optimizer) -> None:
        if self.settings.accumulate_iter > 1 and id(optimizer) not in self._cleared:
            raise self._no_parts("clears its gradients by other means than its optimizer's zero_grad")
        self._is_stepping = self._stepped = True
        try:
            if self.settings.clip_grad_norm is not None:
                if self.scaler is not None:
                    self.scaler.unscale_(optimizer)
                weights = [value for group in optimizer.param_groups for value in group['params']]
                nn.utils.clip_grad_norm_(weights, self.settings.clip_grad_norm)
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        finally:
            self._is_stepping = False

    def _is_last_part(self) -> bool:
        return self._part == self.settings.accumulate_iter - 1

    def _on_last_part(self, function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            if self._is_last_part():
                function(*args, **kwargs)

        return run

    def _feeding(self, feed_data: Callable[[Mapping[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
        """``feed_data``, watched: what tensors it gives the model are the batch."""

        @functools.wraps(feed_data)
        def feed(data: Mapping[str, Any]) -> None:
            before = dict(vars(self.model))
            feed_data(data)
            now = {
                name: value
                for name, value in vars(self.model).items()
                if isinstance(value, Tensor)
                and (value is not before.get(name) or name in self._batch)  # the same tensor may come again
                and name not in POOL
            }
            size = len(self.model.lq) if isinstance(getattr(self.model, 'lq', None), Tensor) else None
            self._batch = [name for name, value in now.items() if value.ndim and len(value) == size]

        return feed

    @contextmanager
    def _unsynchronized(self) -> Iterator[None]:
        """Leave out what several processes say to each other after each backward pass."""
        with ExitStack() as stack:
            for _, network in self._trained():
                if isinstance(network, DistributedDataParallel):
                    stack.enter_context(network.no_sync())
            yield


@contextmanager
def _losses_scaled(scale: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Scale what is differentiated: every model calls ``backward`` of its losses, on as many as it likes."""
    original = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        original(scale(self), *args, **kwargs)

    Tensor.backward = backward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.backward = original  # type: ignore[method-assign]


def _scaler(device: torch.device) -> Any:
    if hasattr(torch.amp, 'GradScaler'):
        return torch.amp.GradScaler(device.type)
    if device.type != 'cuda':
        raise InputError('train.amp must be bf16 on a CPU before torch 2.3, got fp16.')
    return torch.cuda.amp.GradScaler()
