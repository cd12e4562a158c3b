"""What every export has in common: the network that is exported, and the proof that the file gives its images."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from dataclasses import dataclass
from typing import Callable

import torch
from basicsr.archs import swinir_arch
from basicsr.archs.ridnet_arch import RIDNet
from torch import Tensor, nn

import lora_sr
from lora_sr.adapters import count_parameters
from lora_sr.archs import take_any_size
from lora_sr.archs.any_size import accepted_input
from lora_sr.archs.reparam import deploy_form
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import load_network
from lora_sr.errors import InputError
from lora_sr.runtime.half_range import fit_half_range
from lora_sr.runtime.synthetic import soft_image

# Batch, height and width of the images that every file is tried on; odd ones where the network takes them.
CHECKED_SIZES = ((1, 24, 32), (1, 33, 47), (2, 41, 25))
TRACED_SIZE = (1, 20, 28)  # none of those, so that nothing that was traced can be right by chance
FLOAT32_TOLERANCE = 1e-4  # of the range of values


@dataclass(frozen=True)
class Deployed:
    """A network as it is deployed: merged, folded, without gradients, on the CPU in float32.

    It takes (N, channels, H, W) with values in [0, value_range], H and W multiples of ``multiple``, and gives
    (N, channels, scale * H, scale * W) in the same range.
    """

    network: nn.Module
    channels: int
    multiple: int
    scale: int
    value_range: int

    @property
    def family(self) -> str:
        """The name of the network; that of a merged DSCLoRA is SPAN."""
        return SPAN.__name__ if isinstance(self.network, SPAN) else type(self.network).__name__

    def metadata(self) -> dict[str, str]:
        """What a program that runs the file may want to know."""
        return {
            'family': self.family,
            'scale': str(self.scale),
            'channels': str(self.channels),
            'value_range': f'[0, {self.value_range}]',
            'size_multiple': str(self.multiple),
            'lora_sr_version': lora_sr.__version__,
        }

    def image(self, batch: int, height: int, width: int) -> Tensor:
        """An image of soft structures, see :func:`lora_sr.runtime.synthetic.soft_image`; sides rounded up to fit."""
        size = [math.ceil(side / self.multiple) * self.multiple for side in (height, width)]
        return soft_image(batch, self.channels, *size) * self.value_range

    def checked_images(self) -> list[Tensor]:
        """One image of each of the sizes that a file is tried on."""
        return [self.image(*size) for size in CHECKED_SIZES]

    def difference(self, run: Callable[[Tensor], Tensor]) -> Difference:
        """How far the images of ``run`` are from the network's."""
        largest, psnr = 0.0, math.inf
        with torch.no_grad():
            for image in self.checked_images():
                expected, given = self.network(image), run(image)
                if given.shape != expected.shape or given.dtype != expected.dtype:
                    return Difference(math.inf, -math.inf)
                # An untrained network gives values far outside the range.
                error = (given - expected).double() / max(self.value_range, expected.abs().max().item())
                if not error.isfinite().all():
                    return Difference(math.inf, -math.inf)
                largest = max(largest, error.abs().max().item())
                if error.any():
                    psnr = min(psnr, -10 * math.log10(error.pow(2).mean().item()))
        return Difference(largest, psnr)


@dataclass(frozen=True)
class Difference:
    """The largest difference, relative to the range of values, and the lowest PSNR of an image in dB."""

    largest: float
    psnr: float

    def __str__(self) -> str:
        return f'{self.largest:.1e} of the range of values' + (f', PSNR {self.psnr:.1f} dB' if self.largest else '')


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how far the file's images are from the network's; ``checked_by`` ran the file."""

    deployed: Deployed
    form: str
    difference: Difference
    checked_by: str

    def __str__(self) -> str:
        deployed = self.deployed
        sizes = 'any' if deployed.multiple == 1 else f'height and width in multiples of {deployed.multiple}'
        tried = ', '.join('x'.join(map(str, image.shape)) for image in deployed.checked_images())
        return (
            f'network               {deployed.family} x{deployed.scale}, '
            f'{count_parameters(deployed.network).total:,} parameters\n'
            f'form                  {self.form}\n'
            f'images                {deployed.channels} channels in [0, {deployed.value_range}], size: {sizes}\n'
            f'largest difference    {self.difference} ({self.checked_by} against torch: {tried})'
        )


def deployed_network(checkpoint: str | os.PathLike, param_key: str | None = None) -> Deployed:
    """The network of a checkpoint as it is deployed, LKDN with its values within float16.

    Args:
        checkpoint: See :func:`lora_sr.load_network`; with LoRA or branches, or plain.
        param_key: Where the state dict is in it; by default ``params_ema``, else ``params``, else the top.

    Raises:
        InputError: The checkpoint cannot be read or folded, or its network takes images of one size alone, or gives
            values that are not finite.
    """
    network = load_network(checkpoint, param_key)
    try:
        network = deploy_form(network)
    except InputError as error:
        raise InputError(f'{checkpoint} cannot be folded: {error}') from None
    take_any_size(network, 1)  # padding is Python, which no file can hold
    accepted = accepted_input(network)
    if accepted is None:
        raise InputError(
            f'{checkpoint} cannot be exported: its {type(network).__name__} takes images of one size alone, as with an '
            'absolute position embedding, where any size or any multiple of a number is right.'
        )
    side = accepted.multiple * math.ceil(16 / accepted.multiple)
    with torch.no_grad():
        scale = network(torch.zeros(1, accepted.channels, side, side)).shape[-1] // side
    deployed = Deployed(network, *accepted, scale, 255 if isinstance(network, RIDNet) else 1)
    images = deployed.checked_images()
    with torch.no_grad():
        if not network(images[0]).isfinite().all():
            raise InputError(
                f'{checkpoint} gives values that are not finite: it has weights that are NaN or too large.'
            )
    fit_half_range(network, images)
    return deployed


@contextlib.contextmanager
def tracing():
    """What the tracer needs: no gradients, no warnings, and a SwinIR that does not make a constant of the batch size.

    Whether what was traced is right for other sizes is found out by trying, so its warnings say nothing new.
    """
    original = swinir_arch.window_reverse
    swinir_arch.window_reverse = _window_reverse
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            yield
    finally:
        swinir_arch.window_reverse = original


def _window_reverse(windows: Tensor, window_size: int, height: int, width: int) -> Tensor:
    """(N * windows, window_size, window_size, C) -> (N, height, width, C), without BasicSR's division to an int."""
    channels = windows.shape[-1]
    rows, columns = height // window_size, width // window_size
    grid = windows.view(-1, rows, columns, window_size, window_size, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)
