"""Spatial affinity distillation, exact, in memory that does not grow with the square of the number of positions."""
from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.errors import InputError

# Rows of an affinity matrix that are formed at a time: at 4096 positions, two blocks of 512 x 4096 float32 are 16 MB,
# small enough for a processor's cache to hold what one block needs and large enough for efficient products.
ROWS = 512


class _AffinityDistance(torch.autograd.Function):
    """Mean of |SᵀS - TᵀT| over samples and pairs of positions, for unit features S (N, Cs, P) and T (N, Ct, P).

    The gradient is as cheap to form as the value while a block of rows is at hand, so the forward pass computes both
    and keeps only the gradient, which is as large as S.  With D = SᵀS - TᵀT, which is symmetric, it is
    d/dS sum|D| = 2 S sign(D).
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, needs_grad: bool) -> Tensor:
        samples, _, positions = student.shape
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.empty_like(student) if needs_grad else None
        rows = min(ROWS, positions)
        ours, theirs = student.new_empty(2, rows, positions)
        for n in range(samples):
            s, t = student[n], teacher[n]
            for start in range(0, positions, rows):
                block = slice(start, min(start + rows, positions))
                count = block.stop - block.start
                # Two products and a difference, rather than one accumulated product: equal features give exactly zero.
                difference = torch.mm(s[:, block].T, s, out=ours[:count])
                difference -= torch.mm(t[:, block].T, t, out=theirs[:count])
                total += torch.abs(difference, out=theirs[:count]).sum()
                if needs_grad:
                    grad[n, :, block] = torch.mm(s, torch.sign(difference, out=difference).T)
        pairs = samples * positions**2
        if needs_grad:
            ctx.save_for_backward(grad.mul_(2 / pairs))
        return (total / pairs).to(student.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return ctx.saved_tensors[0] * grad_output, None, None


def spatial_affinity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of two feature maps' spatial affinity matrices.

    Each position's channel vector is brought to unit length; A = FᵀF (HW, HW) holds the cosine similarities of all
    pairs of positions; the distance is the mean of |A_student - A_teacher|. No (HW, HW) matrix is ever stored: extra
    memory is O(HW) per block of rows, in the forward and in the backward pass.

    Source: spatial affinity distillation of DSCLoRA (arXiv:2504.11271).

    Args:
        student: Features (N, Cs, H, W).
        teacher: Features (N, Ct, H, W); Ct may differ from Cs. No gradient flows into them.

    Returns:
        A scalar, 0 to 2.

    Raises:
        InputError: The number of samples or the spatial sizes differ.
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:1] + student.shape[2:] != (
            teacher.shape[:1] + teacher.shape[2:]):
        raise InputError(f'Spatial affinity compares feature maps (N, C, H, W) of equal N, H and W, but the student\'s '
                         f'are {tuple(student.shape)} and the teacher\'s {tuple(teacher.shape)}.')
    units = [F.normalize(features.flatten(2), dim=1).contiguous() for features in (student, teacher.detach())]
    return _AffinityDistance.apply(*units, torch.is_grad_enabled() and student.requires_grad)


@LOSS_REGISTRY.register()
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
            raise InputError(f'The affinity loss needs as many layers of the student ({len(student)}) as of the '
                             f'teacher ({len(teacher)}), at least one.')
        distances = [spatial_affinity_distance(s, t) for s, t in zip(student, teacher)]
        return self.loss_weight * torch.stack(distances).mean()
