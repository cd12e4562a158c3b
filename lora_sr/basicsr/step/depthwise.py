"""Large depthwise convolutions on a CPU: their gradients by the convolutions of 3x3 and without dilation that are fast.

oneDNN has fast kernels for the forward pass of depthwise convolutions, on CPUs without AVX-512 not for dilated ones
whose taps reach further than 4 pixels; for the gradient of the weight only up to 3x3, and for that of the input only
without dilation. What it falls back to takes five to a hundred times as long: of a step of LKDN, whose attention has
two 5x5 in each block, half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SIDE = 3  # of the windows of a kernel that are computed at once
FAST_REACH = 4  # pixels from the middle of a dilated kernel to its last tap, without AVX-512
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith('AVX512')


def is_large_depthwise(module: nn.Module) -> bool:
    """Whether :func:`depthwise_conv2d` computes what a module does, with a kernel of 5x5 or more."""
    if not isinstance(module, nn.Conv2d) or not 1 < module.groups == module.in_channels == module.out_channels:
        return False
    side, dilation = module.kernel_size[0], module.dilation[0]
    return (
        side > SIDE
        and side % 2 == 1
        and module.kernel_size == (side, side)
        and module.dilation == (dilation, dilation)
        and module.stride == (1, 1)
        and module.padding == (side // 2 * dilation,) * 2
        and module.padding_mode == 'zeros'
    )


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """A depthwise convolution of stride 1 whose output is as large as its input.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, k, k), k odd.
        bias: (C,), or None.
        dilation: Distance of the taps.

    Returns:
        (N, C, H, W), as ``F.conv2d`` gives it, with the same gradients up to rounding.
    """
    dtype = _dtype_of_autocast()
    if dtype is not None:  # it casts the arguments of torch's functions, but not of ours
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    output: Tensor = _DepthwiseConv2d.apply(x, weight, bias, dilation)
    return output


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolved(x, weight, bias, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # A convolution's transpose is the convolution with the kernel turned around.
        of_x = _convolved(grad, weight.flip(2, 3), None, ctx.dilation) if needs_x else None
        of_weight = _gradient_of_weight(x, grad, weight.shape[2], ctx.dilation) if needs_weight else None
        return of_x, of_weight, grad.sum((0, 2, 3)) if needs_bias else None, None


def _dtype_of_autocast() -> torch.dtype | None:
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None  # before torch 2.4


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    half, channels = weight.shape[2] // 2, len(weight)
    with torch.autocast(x.device.type, enabled=False):
        if dilation == 1 or half * dilation <= FAST_REACH or HAS_AVX512:
            return F.conv2d(x, weight, bias, 1, half * dilation, dilation, channels)
        phases = F.conv2d(_phases(x, dilation), weight, bias, 1, half, 1, channels)
    return _of_phases(phases, dilation, x)


def _gradient_of_weight(x: Tensor, grad: Tensor, side: int, dilation: int) -> Tensor:
    """The gradient (C, 1, side, side), window by window of 3x3 taps; where two overlap, they agree."""
    x, grad = _phases(x, dilation), _phases(grad, dilation)
    channels, height, width = grad.shape[1:]
    padded = F.pad(x, (side // 2,) * 4)
    window = x.new_empty(channels, 1, SIDE, SIDE)  # whose shape alone counts
    result = x.new_empty(channels, 1, side, side)
    starts = [min(start, side - SIDE) for start in range(0, side, SIDE)]
    for top in starts:
        for left in starts:
            seen = padded[:, :, top : top + height + SIDE - 1, left : left + width + SIDE - 1]
            arguments: Any = ([channels], [1, 1], [0, 0], [1, 1], False, [0, 0], channels, [False, True, False])
            part = torch.ops.aten.convolution_backward(grad, seen, window, *arguments)[1]
            result[:, :, top : top + SIDE, left : left + SIDE] = part
    return result


def _phases(x: Tensor, dilation: int) -> Tensor:
    """Every ``dilation``-th row and column as an image of its own: (N, C, H, W) -> (N * dilation^2, C, ...).

    What is missing in the last rows and columns is 0.
    """
    if dilation == 1:
        return x
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % dilation, 0, -height % dilation))
    number, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(number, height // dilation, dilation, width // dilation, dilation, channels)
    phases = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, height // dilation, width // dilation, channels)
    return phases.permute(0, 3, 1, 2)


def _of_phases(phases: Tensor, dilation: int, like: Tensor) -> Tensor:
    """What :func:`_phases` has taken apart: (N * dilation^2, C, ...) -> the shape and the layout of ``like``."""
    number, channels, height, width = like.shape
    rows, columns = phases.shape[2:]
    parts = phases.permute(0, 2, 3, 1).reshape(number, dilation, dilation, rows, columns, channels)
    images = parts.permute(0, 3, 1, 4, 2, 5).reshape(number, rows * dilation, columns * dilation, channels)
    return torch.empty_like(like).copy_(images[:, :height, :width].permute(0, 3, 1, 2))
