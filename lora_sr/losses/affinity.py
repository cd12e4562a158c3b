"""Spatial affinity distillation, exact, in memory that does not grow with the square of the number of positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_sr.errors import InputError

# Elements of each of the two buffers that hold rows of affinity matrices: 16 MB of float32 on a CPU, where larger ones
# gain nothing, and 128 MB on a GPU, which products of small blocks leave idle.
BUFFER_ELEMENTS, GPU_BUFFER_ELEMENTS = 2**22, 2**25
ROWS = 512  # at a time on a CPU


def _block_size(samples: int, positions: int, is_gpu: bool) -> tuple[int, int]:
    """How many samples, and how many rows of the affinity matrix of each, are formed at a time.

    On a GPU all rows where the buffer holds all matrices, as small blocks are bound by launches there; else half of the
    rows: the buffers are then a quarter of what the naive form keeps, if not less.
    """
    elements = GPU_BUFFER_ELEMENTS if is_gpu else BUFFER_ELEMENTS
    if is_gpu and samples * positions**2 <= elements:
        return samples, positions
    rows = min((positions + 1) // 2 if is_gpu else ROWS, positions, max(1, elements // positions))
    return min(samples, max(1, elements // (rows * positions))), rows


class _AffinityDistance(torch.autograd.Function):
    """Mean of |SᵀS - TᵀT| over samples and pairs of positions, for unit features S (N, Cs, P) and T (N, Ct, P).

    The gradient is as cheap to form as the value while a block of rows is at hand, so the forward pass computes both
    and keeps only the gradient, which is as large as S.  With D = SᵀS - TᵀT it is d/dS sum|D| = 2 S sign(D).  D is
    symmetric: a block of rows is formed from its diagonal on, and stands for its mirror image too.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, needs_grad: bool) -> Tensor:
        samples, _, positions = student.shape
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.zeros_like(student) if needs_grad else None
        group, rows = _block_size(samples, positions, student.is_cuda)
        buffers = student.new_empty(2, group * rows * positions)
        for first in range(0, samples, group):
            s, t = student[first : first + group], teacher[first : first + group]
            for start in range(0, positions, rows):
                stop = min(start + rows, positions)
                shape = (s.shape[0], stop - start, positions - start)
                ours, theirs = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
                # Two products and a difference, rather than one accumulated product: equal features give exactly zero.
                torch.bmm(s[:, :, start:stop].mT, s[:, :, start:], out=ours)
                difference = ours.sub_(torch.bmm(t[:, :, start:stop].mT, t[:, :, start:], out=theirs))
                absolute = torch.abs(difference, out=theirs)
                total += 2 * absolute.sum() - absolute[:, :, : stop - start].sum()
                if grad is not None:
                    sign = difference.sign_()
                    grad[first : first + group, :, start:stop] += s[:, :, start:] @ sign.mT
                    grad[first : first + group, :, stop:] += s[:, :, start:stop] @ sign[:, :, stop - start :]
        pairs = samples * positions**2
        if grad is not None:
            ctx.save_for_backward(grad.mul_(2 / pairs))
        return (total / pairs).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_output, None, None


def spatial_affinity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of two feature maps' spatial affinity matrices.

    Each position's channel vector is brought to unit length; A = FᵀF (HW, HW) holds the cosine similarities of all
    pairs of positions; the distance is the mean of |A_student - A_teacher|. Of the (HW, HW) matrices a block of rows
    is stored at a time, in the forward pass, and nothing of them for the backward pass.

    Source: spatial affinity distillation of DSCLoRA (arXiv:2504.11271).

    Args:
        student: Features (N, Cs, H, W).
        teacher: Features (N, Ct, H, W); Ct may differ from Cs. No gradient flows into them.

    Returns:
        A scalar, 0 to 2; in float64 for float64 features, else in float32, under autocast as well: half precision
        would lose the small differences that the loss is made of.

    Raises:
        InputError: The number of samples or the spatial sizes differ, or there are none.
    """
    fits = student.ndim == teacher.ndim == 4 and len(student) == len(teacher) and student.shape[2:] == teacher.shape[2:]
    if not fits or not student.numel() or not teacher.numel():
        raise InputError(
            f"Spatial affinity compares feature maps (N, C, H, W) of equal N, H and W, but the student's "
            f"are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    with torch.autocast(student.device.type, enabled=False):
        units = [F.normalize(features.to(dtype).flatten(2), dim=1) for features in (student, teacher.detach())]
        needs_grad = torch.is_grad_enabled() and student.requires_grad
        return _AffinityDistance.apply(units[0].contiguous(), units[1].contiguous(), needs_grad)


class SpatialAffinityLoss(nn.Module):
    """L_AD of DSCLoRA: :func:`spatial_affinity_distance`, averaged over layers.

    Args:
        loss_weight: Factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Features of corresponding layers, each (N, C, H, W) -> a scalar.

        Raises:
            InputError: The numbers of layers differ or are 0, or a pair does not fit.
        """
        if len(student) != len(teacher) or not student:
            raise InputError(
                f'The affinity loss needs as many layers of the student ({len(student)}) as of the '
                f'teacher ({len(teacher)}), at least one.'
            )
        distances = [spatial_affinity_distance(s, t) for s, t in zip(student, teacher)]
        return self.loss_weight * torch.stack(distances).mean()
