"""How the networks of a model run within its step, and only there: a validation finds them as they were."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_sr.archs.layout import repeated_blocks
from lora_sr.basicsr.options.step import no_blocks
from lora_sr.basicsr.step.depthwise import depthwise_conv2d, is_large_depthwise
from lora_sr.basicsr.step.settings import StepSettings
from lora_sr.errors import InputError

# How many variants of a block are compiled: the probability of DropPath, say, is another one in each.
MOST_VARIANTS = 256
DILATED = (nn.Conv2d, nn.ConvTranspose2d)  # whose gradients by half precision are not to be trusted on a CPU
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)  # what autocast runs in half precision


class StepNetworks:
    """The networks of a model, which run by ``train.amp``, ``compile`` and ``checkpointing`` while :meth:`active`.

    Args:
        settings: What is to be done.
        memory_format: Of the 4-dimensional inputs.
    """

    def __init__(self, settings: StepSettings, memory_format: torch.memory_format):
        self.settings = settings
        self.memory_format = memory_format
        self._is_active = False
        self._frozen: list[nn.Module] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """A step is under way."""
        while self._frozen and self.settings.amp is not None:  # until then a teacher may have something else to do
            _cast_layers(self._frozen.pop(), self.settings.amp)
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False

    def add(self, name: str, network: nn.Module) -> None:
        """Take charge of a network.

        Args:
            name: What it is called in the option file, for errors.
            network: The bare network.

        Raises:
            InputError: ``train.checkpointing`` where ``network_g`` is not made of blocks. A discriminator without
                any keeps its activations.
        """
        trains = any(value.requires_grad for value in network.parameters())
        if self.settings.compile is not None or self.settings.checkpointing:
            blocks = repeated_blocks(network)
            if not blocks and self.settings.checkpointing and name == 'network_g':
                raise InputError(no_blocks(name, type(network).__name__))
            for block in blocks or [network]:
                self._add_block(block, trains and bool(blocks))
        if not trains:
            self._frozen.append(network)
        for module in network.modules():
            if is_large_depthwise(module):
                self._add_depthwise(module)
            elif self.settings.amp is not None and isinstance(module, DILATED) and max(module.dilation) > 1:
                self._add_dilated(module)
        self._within_step(network, 'forward', self._run)

    def _add_block(self, block: nn.Module, can_forget: bool) -> None:
        run = block.forward
        if self.settings.compile is not None:
            run = compiled(run, self.settings.compile)
        if self.settings.checkpointing and can_forget:
            run = functools.partial(checkpoint, run, use_reentrant=False)
        self._within_step(block, 'forward', lambda _, *args, **kwargs: run(*args, **kwargs))

    def _add_depthwise(self, module: Any) -> None:
        def run(convolve: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            if x.device.type != 'cpu':
                return convolve(x, weight, bias)
            return depthwise_conv2d(x, weight, bias, module.dilation[0])

        self._within_step(module, '_conv_forward', run)

    def _add_dilated(self, module: nn.Module) -> None:
        def run(forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            trains = torch.is_grad_enabled() and any(value.requires_grad for value in module.parameters(recurse=False))
            if x.device.type != 'cpu' or not trains:
                return forward(x, *args, **kwargs)
            # In bfloat16 and channels_last, oneDNN leaves parts of the gradient of a dilated kernel as the memory was,
            # with torch 2.14.1 on CPUs with AVX512-BF16.
            with torch.autocast('cpu', enabled=False):
                return forward(x.float(), *args, **kwargs)

        self._within_step(module, 'forward', run)

    def _within_step(self, module: Any, name: str, run: Callable[..., Any]) -> None:
        """Let a method of a module go through ``run`` in a step, which is given the method first."""
        original = getattr(module, name).__func__

        @functools.wraps(original)
        def either(own: Any, *args: Any, **kwargs: Any) -> Any:
            method = types.MethodType(original, own)
            return run(method, *args, **kwargs) if self._is_active else method(*args, **kwargs)

        # A method, not a function: that of a copy of the network, as of one in float64, is the copy's own.
        setattr(module, name, types.MethodType(either, module))

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next((value.device.type for value in args if isinstance(value, Tensor)), 'cpu')
        args = tuple(_map(self._laid_out, value) for value in args)
        amp = self.settings.amp
        if amp is None:
            return forward(*args, **kwargs)
        with torch.autocast(device, dtype=amp):
            output = forward(*args, **kwargs)
        return _map(_in_float32, output)

    def _laid_out(self, value: Tensor) -> Tensor:
        return value.contiguous(memory_format=self.memory_format) if value.ndim == 4 else value


def compiled(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """``torch.compile``, without the limit at which it silently leaves further variants uncompiled."""
    config: Any = torch._dynamo.config
    limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'  # before torch 2.7
    setattr(config, limit, max(getattr(config, limit), MOST_VARIANTS))
    return torch.compile(function, **arguments)


def _cast_layers(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Round the layers of a frozen network once, as autocast would in each step; norms and tables stay in float32."""
    for module in network.modules():
        if type(module) in LAYERS:
            module.to(dtype)


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, '_fields'):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return value
