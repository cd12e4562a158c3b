"""What a network costs: multiply-adds, activations and convolutions, as the field's tables count them.

Two conventions are in use, and they differ in what norms, averages and interpolations cost, so both are here:
:func:`count_multi_adds` is that of the papers' tables, for an output of 1280x720, and :func:`count_flops` that of the
NTIRE challenge, for an input of 256x256. For a network of convolutions alone, such as SPAN, they are equal.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_sr.adapters import adapted_modules, merge_lora
from lora_sr.archs.info import is_a, network_info

OUTPUT_HEIGHT, OUTPUT_WIDTH = 720, 1280  # the output of which the papers' tables give the multiply-adds
CHALLENGE_SIDE = 256  # pixels of the input of which the challenge's tables give the FLOPs


def count_multi_adds(network: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of one forward pass; nothing is computed for it.

    The convention is that of the tool ``thop``, with which the LKDN paper counts: every multiplication by a weight of a
    convolution or a linear layer is one, biases are free, and a layer norm is 2 for each of its values, 4 with its own
    weight and bias. Unlike ``thop``, and like the papers on transformers, it has the products of features in attention.
    Activations are not counted. A layer with LoRA counts as the merged one.

    Args:
        network: Any network, in training or in deploy form. It is not changed.
        height: Height of the input (1, C, height, width), in pixels; C is 3, or what the network takes instead.
        width: Its width.
    """
    return _count_operations(network, height, width)['multi_adds']


def count_multi_adds_720p(network: nn.Module, scale: int) -> int:
    """Multiply-adds for an output of 1280x720 pixels, as in the field's tables; x3 starts from 426x240, rounded down.

    Args:
        network: See :func:`count_multi_adds`.
        scale: Its scale factor.
    """
    return count_multi_adds(network, OUTPUT_HEIGHT // scale, OUTPUT_WIDTH // scale)


def count_flops(network: nn.Module, height: int = CHALLENGE_SIDE, width: int = CHALLENGE_SIDE) -> int:
    """FLOPs of one forward pass as the NTIRE efficient SR challenge gives them, which are multiply-adds.

    Since 2024 the challenge counts with ``FlopCountAnalysis`` of the library fvcore. Beside multiplications by weights,
    these are the products of features in attention; 5 for each value of a layer or group norm (4 without weights), and
    2 (or 1) of a batch norm that runs; 4 for each value that is interpolated bilinearly, 1 for the nearest neighbor;
    and 1 for each value that is averaged over height and width. What is done element by element is free.

    Args:
        network: As for :func:`count_multi_adds`.
        height: Height of the input (1, C, height, width), in pixels; 256 in the challenge's tables.
        width: Its width.
    """
    return _count_operations(network, height, width)['flops']


def count_activations(network: nn.Module, height: int = CHALLENGE_SIDE, width: int = CHALLENGE_SIDE) -> int:
    """Activations of one forward pass: values that its convolutions give, as the NTIRE challenge counts them.

    The count is from I. Radosavovic et al., "Designing Network Design Spaces" (CVPR 2020). Linear layers have none.

    Args:
        network: As for :func:`count_flops`.
        height: Height of the input (1, C, height, width), in pixels; 256 in the challenge's tables.
        width: Its width.
    """
    return _count_operations(network, height, width)['activations']


def count_convolutions(network: nn.Module) -> int:
    """Convolutions that one forward pass runs, as the NTIRE challenge counts them: one that runs twice counts twice.

    Args:
        network: As for :func:`count_flops`.
    """
    return _count_operations(network, CHALLENGE_SIDE, CHALLENGE_SIDE)['convolutions']


@torch.no_grad()
def _count_operations(network: nn.Module, height: int, width: int) -> Counter[str]:
    """The counts of a copy on the ``meta`` device; on the CPU if it cannot run there, as it looks at values, say."""
    with torch.random.fork_rng(devices=[]):
        try:
            return _count_copy(network, height, width, 'meta')
        except Exception:  # whatever a network makes of tensors without values
            return _count_copy(network, height, width, 'cpu')


def _count_copy(network: nn.Module, height: int, width: int, device: str) -> Counter[str]:
    """The counts of a copy in which LoRA is merged, and what runs as one convolution is one."""
    info = network_info(network)
    copy = deepcopy(network).to(device).eval()
    if any(True for _ in adapted_modules(copy)):
        merge_lora(copy)
    for module in list(copy.modules()):
        for name, child in module.named_children():
            if is_a(child, 'basicsr.archs.ecbsr_arch.ECB'):
                activation = getattr(child, 'act', nn.Identity())
                setattr(module, name, nn.Sequential(child.get_submodule('conv3x3'), activation))
    counter = _OperationCounter()
    # The device is also for what a forward pass makes without naming one.
    with torch.device(device), counter:
        copy(torch.zeros(1, 3 if info is None else info.in_channels, height, width))
    return counter.counts


class _OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs within it into ``counts``: ``multi_adds``, ``flops``, ``activations``, ``convolutions``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == 'convolution':
            values, weight, is_transposed = args[0], args[1], args[6]
            steps = (values if is_transposed else output)[0, 0].numel()
            self._add(len(values) * weight.numel() * steps)
            self.counts['activations'] += output.numel()
            self.counts['convolutions'] += 1
        elif name in ('mm', 'bmm', 'addmm', 'baddbmm'):
            first = args[1 if 'add' in name else 0]
            self._add(output.numel() * first.shape[-1])
        elif name in ('native_layer_norm', 'native_group_norm'):
            has_weight = args[2 if name == 'native_layer_norm' else 1] is not None
            self._add(args[0].numel() * (4 if has_weight else 2), args[0].numel() * (5 if has_weight else 4))
        elif 'batch_norm' in name:
            self._add(0, args[0].numel() * (1 if args[1] is None else 2))
        elif name in ('upsample_nearest2d', 'upsample_bilinear2d'):
            self._add(0, output.numel() * (4 if name == 'upsample_bilinear2d' else 1))
        elif name == '_adaptive_avg_pool2d' or (name == 'mean' and self._is_of_pixels(*args)):
            self._add(0, args[0].numel())
        return output

    def _add(self, multi_adds: int, flops: int | None = None) -> None:
        """By the two conventions, which agree where ``flops`` is left out."""
        self.counts['multi_adds'] += multi_adds
        self.counts['flops'] += multi_adds if flops is None else flops

    @staticmethod
    def _is_of_pixels(values: Tensor, dimensions: list[int] | None = None, *_: Any) -> bool:
        """Whether an average is over height and width, as pooling to one pixel is."""
        return values.ndim == 4 and dimensions is not None and {d % 4 for d in dimensions} == {2, 3}
