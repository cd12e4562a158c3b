"""The deployed network, ready to run as fast as the hardware allows."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lora_sr.archs.info import network_info
from lora_sr.archs.layout import lay_out
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.reparam import deploy_form
from lora_sr.errors import InputError
from lora_sr.runtime.cuda_graphs import capture
from lora_sr.runtime.float16 import fit_float16
from lora_sr.runtime.native.networks import compile_network
from lora_sr.runtime.native.program import round_keeping_sums
from lora_sr.runtime.synthetic import synthetic_image

LOG = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_GRAPHS = 8  # sizes of which a GPU keeps the recorded pass
SEEN_ONCE, CANNOT_BE_RECORDED = 'seen once', 'cannot be recorded'


def optimize(network: nn.Module, dtype: torch.dtype = torch.float32) -> DeployedNetwork:
    """The deploy form of a network, ready to run on the device where its parameters are.

    - On a CPU, SPAN (and so DSCLoRA) and LKDN run on kernels of ours, which are compiled for the machine once, in some
      two seconds, and kept (see :mod:`lora_sr.runtime.native`): convolutions, activations, gates, concatenations and
      the pixel shuffle without a copy between them. Any size runs at once; that of the largest keeps its memory.
      Other networks, those with hooks or changed modules, and all where there is no C++ compiler, run by torch in the
      channels-last format.
    - On a CUDA GPU, the network is compiled by ``torch.compile`` at its first pass, for all heights and widths
      at once, in the channels-last format. The second pass of a size is recorded as a CUDA graph, and replayed from
      then on; the last 8 sizes are kept. What cannot be compiled or recorded runs without. Threads take turns.
    - On MPS, the GPU of a Mac, torch runs it as it is.
    - Under ``torch.jit.trace``, ``torch.onnx.export``, ``torch.export``, ``torch.compile``, ``torch.fx`` and what else
      watches the operations of torch, the network runs by torch, for it is what they are to see.

    Args:
        network: Any network, (N, C, H, W) -> (N, C', s * H, s * W), in training or in deploy form, with LoRA or
            without. It is not changed.
        dtype: ``torch.float32``, which on a GPU is what ``torch.backends.cudnn.allow_tf32`` makes of it;
            ``torch.bfloat16``, which pays on CPUs with AVX512-BF16 (the kernels are of float32 on others) and on
            GPUs; or ``torch.float16``, for GPUs. Images are float32 in any case.

    Returns:
        A module that takes and gives what ``network`` does, in float32 and in inference mode: its images cannot take
        part in a backward pass. NaN in an image spreads a few rows further than in ``network``.

    Raises:
        InputError: No network, another dtype, float16 on a CPU, or as :func:`lora_sr.archs.fold` does. A network that
            makes tensors of its own in float32, as ECBSR does, raises it at its first pass in another dtype.
    """
    if not isinstance(network, nn.Module):
        raise InputError(f'optimize takes a network, not {network!r}: lora_sr.load_network makes one of a checkpoint.')
    if dtype not in DTYPES:
        raise InputError(f'A network runs in {", ".join(map(str, DTYPES))}, not in {dtype}.')
    device = _device(network)
    if device.type == 'cpu' and dtype == torch.float16:
        raise InputError('float16 is for GPUs: on a CPU the half precision is bfloat16.')
    info = None if dtype == torch.float32 else network_info(network)
    if info is not None and dtype not in info.halves:
        right = ' or '.join(str(one).replace('torch.', '') for one in (torch.float32, *info.halves))
        raise InputError(f'{type(network).__name__} must run in {right}, got {str(dtype).replace("torch.", "")}.')
    network = deploy_form(network).float()
    if dtype == torch.float16 and any(isinstance(module, LKDN) for module in network.modules()):
        assert info is not None  # any LKDN has one
        fit_float16(network, [synthetic_image(1, info.in_channels, 64, 64).to(device)])
    return DeployedNetwork(network, dtype)


class DeployedNetwork(nn.Module):
    """What :func:`optimize` makes.

    Args:
        network: In deploy form, see :func:`lora_sr.deploy.merge.deploy_form`. It is what the state dict has. Weights
            may be loaded and changed, but not by way of ``.data``, which torch does not count.
        dtype: What is computed in.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.network = network
        self._in_rows = False
        self._prepare()
        self.eval()

    def _prepare(self) -> None:
        self._program = self._graphs = None
        self.network.float()  # whatever somebody has made of it: kernels take bfloat16 for weights of their own form
        device = _device(self.network)
        if device.type == 'cpu':
            self._program = compile_network(self.network, self.dtype)
        if self._program is None:
            if self.dtype == torch.bfloat16:
                _round_kernels(self.network)
            if self.dtype != torch.float32:
                _cast_masks(self.network)
            rows = self._in_rows or device.type == 'mps'
            lay_out(self.network.to(self.dtype), torch.contiguous_format if rows else torch.channels_last)
        if device.type == 'cuda':
            self._graphs = _GraphPerSize(self.network, self.dtype)
        self._places = [
            (tensors, name)
            for module in self.network.modules()
            for tensors in (module._parameters, module._buffers)
            for name, value in tensors.items()
            if value is not None and not value.is_inference()  # which nothing changes
        ]
        self._stamp = self._weights()

    def _weights(self) -> list[tuple[int, int]]:
        """Where the weights are, and, where kernels have copies, how often torch has changed them."""
        is_copied = self._program is not None
        values = (tensors[name] for tensors, name in self._places)
        return [(value.data_ptr(), value._version if is_copied else 0) for value in values if value is not None]

    def _apply(self, *args: Any, **kwargs: Any) -> DeployedNetwork:
        super()._apply(*args, **kwargs)
        self._prepare()  # on the new device, in the dtype that it has been made for
        return self

    def train(self, mode: bool = True) -> DeployedNetwork:
        """Stays in eval mode."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_program': None, '_graphs': None}  # they hold addresses; a copy makes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    @property
    def engine(self) -> str:
        """What computes: ``kernels`` of ours, ``torch.compile``, or ``torch``."""
        if self._program is not None:
            return 'kernels'
        return 'torch' if self._graphs is None else 'torch.compile'

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', s * H, s * W), in float32."""
        if _is_watched(image):
            # Kernels and recorded graphs are no operations of torch: what they give would be taken for a constant.
            # Beside kernels of bfloat16 the network is in float32.
            return self.network(image.to(torch.float32 if self._program is not None else self.dtype)).float()
        if self._stamp != self._weights():
            self._prepare()
        with torch.inference_mode():
            if self._program is not None:
                return self._program(image)
            try:
                return _run(self.network, image, self.dtype) if self._graphs is None else self._graphs(image)
            except RuntimeError as error:
                if self._in_rows or 'view size is not compatible' not in str(error):
                    raise
        # Its views, as those of IPT, are of tensors in rows; layers give the format that they get.
        self._in_rows = True
        self.network.register_forward_pre_hook(_take_in_rows)
        self._prepare()
        return self(image)


def _run(network: Run, image: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return network(image.to(dtype=dtype, memory_format=_memory_format(image.device))).float()
    except RuntimeError as error:
        if dtype == torch.float32 or not re.search('dtype|scalar type|should be the same', str(error)):
            raise
        reason = str(error).partition('\n')[0].rstrip('.')
        raise InputError(
            f'The network must run in float32, for it makes tensors of its own in that, got {dtype} ({reason}).'
        ) from error


def _is_compiling() -> bool:
    """Whether torch.compile or torch.export looks at this."""
    if hasattr(torch.compiler, 'is_compiling'):
        return torch.compiler.is_compiling()
    dynamo: Any = sys.modules.get('torch._dynamo')  # of an earlier torch, whose import takes a second
    return dynamo is not None and dynamo.is_compiling()


def _is_watched(image: Tensor) -> bool:
    """Whether torch's operations are noted, to run them elsewhere or to count them."""
    # TorchScript and the older ONNX export trace; the newer one, torch.export and torch.compile compile; torch.fx has
    # proxies; make_fx, fake tensors and FlopCounterMode are modes.
    watched = _is_compiling() or torch.jit.is_tracing() or isinstance(image, Proxy)
    return watched or _get_current_dispatch_mode() is not None


def _cast_masks(network: nn.Module) -> None:
    """Let attention have its masks in the dtype of its features: SwinIR makes them anew, in float32, for each size."""
    for module in network.modules():
        if isinstance(module, torch.jit.ScriptModule) or 'mask' not in inspect.signature(module.forward).parameters:
            continue
        if _cast_like_first not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_like_first, with_kwargs=True)


def _cast_like_first(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(inputs[0].dtype) if is_real else value

    return tuple(map(cast, inputs)), {name: cast(value) for name, value in named.items()}


@torch.no_grad()
def _round_kernels(network: nn.Module) -> None:
    """Round the kernels of convolutions to bfloat16 such that their sums are kept. Rounded ones stay as they are."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(round_keeping_sums(module.weight.flatten(2)).view_as(module.weight))


def _memory_format(device: torch.device) -> torch.memory_format:
    """The one that is fast; MPS computes wrong values of slices of channels-last tensors (pytorch issue 180984)."""
    return torch.contiguous_format if device.type == 'mps' else torch.channels_last


def _take_in_rows(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(image.contiguous() for image in inputs)


def _device(network: nn.Module) -> torch.device:
    return next(chain(network.parameters(), network.buffers()), torch.empty(0)).device


class _Recording(NamedTuple):
    """A pass as a CUDA graph, from the tensor that it reads to the one that it writes."""

    graph: torch.cuda.CUDAGraph
    source: Tensor
    result: Tensor


class _GraphPerSize:
    """Runs a network on a GPU, compiled, and records the passes that come again as CUDA graphs.

    Args:
        network: It takes images in the channels-last format.
        dtype: What it takes and gives; images are float32.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.plain = network
        self.network = _compile(network)
        self.dtype = dtype
        self.graphs: OrderedDict[torch.Size, _Recording | str] = OrderedDict()
        self.lock = threading.Lock()  # a graph has one source and one result

    def __call__(self, image: Tensor) -> Tensor:
        size = image.shape
        with self.lock, torch.cuda.device(image.device), _fastest_algorithms():
            if size not in self.graphs:
                if len(self.graphs) == MOST_GRAPHS:
                    self.graphs.popitem(last=False)
                self.graphs[size] = SEEN_ONCE
                return self._run(image)
            self.graphs.move_to_end(size)
            if self.graphs[size] == SEEN_ONCE:
                self.graphs[size] = self._record(image)
            recording = self.graphs[size]
            if isinstance(recording, str):  # it cannot be recorded
                return self._run(image)
            recording.source.copy_(image)  # in the dtype and the format of the source, at once
            recording.graph.replay()
            return recording.result.to(torch.float32, copy=True)

    def _run(self, image: Tensor) -> Tensor:
        try:
            return _run(self.network, image, self.dtype)
        except Exception as error:  # whatever the compiler makes of a network, or of a machine without one
            if self.network is self.plain:
                raise
            LOG.warning(f'torch.compile cannot compile {type(self.plain).__name__}, which runs without: {error}')
            self.network = self.plain
            return _run(self.network, image, self.dtype)

    def _record(self, image: Tensor) -> _Recording | str:
        source = image.to(dtype=self.dtype, memory_format=torch.channels_last, copy=True)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side):  # what is allocated or chosen at a first pass must not be recorded
                self.network(source)
            current.wait_stream(side)
            graph, result = capture(lambda: self.network(source), side)
        except (RuntimeError, TypeError) as error:
            # Too little memory, a copy from the CPU on the way, as in SwinIR, or torch 2.0, which knows no such mode.
            LOG.info(f'a pass of size {tuple(image.shape)} cannot be recorded: {error}')
            return CANNOT_BE_RECORDED
        return _Recording(graph, source, result)


@contextlib.contextmanager
def _fastest_algorithms() -> Iterator[None]:
    """cuDNN tries which of its algorithms is the fastest for a size, which is used again in all of its passes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _compile(network: nn.Module) -> Run:
    """A network compiled at its first pass, for all heights and widths."""
    compiled = torch.compile(network, dynamic=True)
    try:
        from torch.fx.experimental import _config as config
    except ImportError:  # torch 2.0
        return compiled
    if not hasattr(config, 'use_duck_shape'):
        return compiled

    def run(image: Tensor) -> Tensor:
        # Else a square image at first is compiled for squares, and all other sizes, for seconds again, when they come.
        with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(image)

    return run
