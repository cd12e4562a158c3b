"""The weights of a mix of adapters that serve a small set of paired images best."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lora_sr.adapters import Adapter, merge_adapter, mix_adapters
from lora_sr.archs import network_info
from lora_sr.data.sources import Source, find_sources, read_image
from lora_sr.errors import InputError
from lora_sr.images.bicubic import bicubic_downscale
from lora_sr.images.luma import psnr
from lora_sr.runtime.pixels import image_to_tensor, tensor_to_image

MAX_STEPS = 6
SHRINKS = (1.0, 0.5, 0.25)  # of a step, tried in turn until one is better
MIN_GAIN = 1e-3  # dB that a step has to bring for another one
DIFFERENCE = 0.05  # of a weight: the outputs are smooth in it, and float32 leaves four digits of their differences
LEAST_ERROR = 1e-6  # mean squared: below 8 bits


@dataclass(frozen=True)
class FittedMix:
    """The weights that :func:`fit_mix` found, and mean PSNR (Y) in dB: of the base, with the first ones, with these."""

    weights: list[float]
    images: int
    psnr_base: float
    psnr_before: float
    psnr_after: float


@torch.no_grad()
def fit_mix(
    network: nn.Module,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    gt_folder: str | os.PathLike,
    lr_folder: str | os.PathLike | None,
    scale: int,
) -> FittedMix:
    """Find the weights w of a mix of adapters, delta W = sum over i of w_i * delta W_i, for some pairs of images.

    Gauss-Newton steps on the mean over the images of log(MSE), i.e. on their mean PSNR, over the values of R, G and B
    as the network gives them. The derivative of the output by each weight is a central difference, so any network
    will do. A step counts if it raises what the field's tables have, the mean PSNR on Y of 8-bit outputs, ``scale``
    pixels of border left out: the result is never worse than the start. One image is in memory at a time; a step runs
    the network 2n + 2 to 2n + 4 times on each, for n adapters.

    Args:
        network: The base network, RGB in [0, 1], (1, 3, H, W) -> (1, 3, scale * H, scale * W). It is as before
            afterwards.
        adapters: The adapters, which fit it.
        weights: Where to start, a weight for each adapter.
        gt_folder: Folder of the original images.
        lr_folder: Folder of the LR images of the same names (or with ``x{scale}`` behind); ``None`` for those that
            :func:`lora_sr.data.sources.find_sources` knows of, or else made by bicubic.
        scale: Scale factor.

    Raises:
        InputError: A folder or an image that cannot be used, or a network of another scale.
    """
    if scale < 1:
        raise InputError(f'The scale is {scale}: it has to be a whole number of at least 1.')
    info = network_info(network)
    if info is not None and info.scale != scale:
        raise InputError(f'The scale must be {info.scale}, that of the network, got {scale}.')
    sources = find_sources([gt_folder], [scale], None if lr_folder is None else [lr_folder])
    base = {key: value.clone() for key, value in network.state_dict().items()}
    search = _Search(network.eval(), base, adapters, sources, scale)
    current = torch.tensor(weights, dtype=torch.float64)
    try:
        base_psnr, before = search.psnr(torch.zeros_like(current)), search.psnr(current)
        best = before
        for _ in range(MAX_STEPS):
            step = search.step(current)
            for shrink in SHRINKS:
                psnr = search.psnr(current + shrink * step)
                if psnr > best:
                    break
            else:
                break
            current, gain, best = current + shrink * step, psnr - best, psnr
            if gain < MIN_GAIN:
                break
    finally:
        network.load_state_dict(base)
    return FittedMix(current.tolist(), len(sources), base_psnr, before, best)


@dataclass
class _Search:
    network: nn.Module
    base: dict[str, Tensor]
    adapters: Sequence[Adapter]
    sources: list[Source]
    scale: int

    def psnr(self, weights: Tensor) -> float:
        """The mean PSNR in dB with those weights."""
        self._set(weights)
        return float(np.mean([self._psnr(source) for source in self.sources]))

    def _psnr(self, source: Source) -> float:
        original, lr = self._pair(source)
        output = self._run(source, original, lr)
        return psnr(tensor_to_image(output), original, self.scale)

    def step(self, weights: Tensor) -> Tensor:
        """The change of the weights for which the mean log(MSE), with outputs linear in the weights, is least."""
        count = len(weights)
        hessian, gradient = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for source in self.sources:
            original, lr = self._pair(source)
            truth = image_to_tensor(original)[0]

            def run(at: Tensor, source: Source = source, original: np.ndarray = original, lr: Tensor = lr) -> Tensor:
                self._set(at)
                inner = self._run(source, original, lr)[0, :, self.scale : -self.scale, self.scale : -self.scale]
                return inner.flatten()

            error = (run(weights) - truth[:, self.scale : -self.scale, self.scale : -self.scale].flatten()).double()
            jacobian = torch.stack(
                [
                    (run(weights + change) - run(weights - change)).double() / (2 * DIFFERENCE)
                    for change in DIFFERENCE * torch.eye(count, dtype=torch.float64)
                ]
            )
            share = 1 / (len(error) * error.square().mean().clamp(min=LEAST_ERROR))
            hessian += share * jacobian @ jacobian.T
            gradient += share * jacobian @ error
        # Adapters that do the same share the step, and one that does nothing stays.
        return -torch.linalg.pinv(hessian, rtol=1e-6, hermitian=True) @ gradient

    def _set(self, weights: Tensor) -> None:
        self.network.load_state_dict(merge_adapter(self.base, mix_adapters(zip(self.adapters, weights.tolist()))))

    def _pair(self, source: Source) -> tuple[np.ndarray, Tensor]:
        """The original, uint8 of shape (H, W, 3), BGR, cropped to a multiple of the scale; and its LR (1, 3, h, w)."""
        original = read_image(source.hr)
        height, width = (length - length % self.scale for length in original.shape[:2])
        cropped = np.ascontiguousarray(original[:height, :width])
        wanted = height // self.scale, width // self.scale
        if self.scale in source.lr:
            name, small = source.lr[self.scale], read_image(source.lr[self.scale])
        elif min(wanted) > 2:
            name, small = source.hr, bicubic_downscale(cropped, self.scale)
        else:
            raise InputError(
                f'{source.hr} must have at least {3 * self.scale} pixels each way, for the border is left out, got '
                f'{_size(original.shape)}.'
            )
        there = small.shape[:2]
        if there != wanted:
            raise InputError(
                f'{name} must have {_size(wanted)} pixels (width x height), since {source.hr} has '
                f'{_size(original.shape)} and the scale is {self.scale}, got {_size(there)}.'
            )
        if min(there) <= 2:
            raise InputError(
                f'{name} must have more than 2 pixels each way, for the border is left out, got {_size(there)}.'
            )
        return cropped, image_to_tensor(small)

    def _run(self, source: Source, original: np.ndarray, lr: Tensor) -> Tensor:
        output = self.network(lr)
        if tuple(output.shape[2:]) != original.shape[:2]:
            raise InputError(
                f'The network must have the scale {self.scale}, got one that makes {_size(output.shape[2:])} pixels of '
                f'an LR image of {_size(lr.shape[2:])} pixels, for {source.hr}.'
            )
        return output


def _size(shape: Sequence[int]) -> str:
    """Height and width as width x height."""
    return f'{shape[1]} x {shape[0]}'
