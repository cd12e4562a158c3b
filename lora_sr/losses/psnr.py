"""PSNR as a loss: the mean error of images, each by its own measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_sr.errors import InputError


class PSNRLoss(nn.Module):
    """Minus the PSNR in dB, averaged over the images of a batch: mean of 10 * log10(MSE of an image + eps).

    MSE sums errors, so the images with the largest rule; here a patch counts by how much its error changes in
    proportion, as it does in the tables of the field, which average the PSNR of images.

    Source: HINet (arXiv:2105.06086), section 3.3.

    Args:
        loss_weight: Factor of the loss.
        eps: Added to the mean squared error, at range [0, 1], more than 0. Images closer than that (1e-6 is 60 dB)
            hardly pull.

    Raises:
        InputError: ``eps`` is not more than 0.
    """

    def __init__(self, loss_weight: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        if not eps > 0:
            raise InputError(f'"eps" of PSNRLoss must be more than 0, got {eps}.')
        self.loss_weight, self.eps = loss_weight, eps

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """(N, C, H, W) and (N, C, H, W), range [0, 1] -> scalar, negative for anything that resembles the target."""
        errors = (pred - target).square().flatten(1).mean(1)
        return self.loss_weight * 10 * torch.log10(errors + self.eps).mean()
