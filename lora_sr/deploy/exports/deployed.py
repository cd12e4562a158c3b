"""What every export has in common: the network that is exported, and the proof that the file gives its images."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn

import lora_sr
from lora_sr.adapters import count_parameters
from lora_sr.archs import NetworkInfo, network_info, take_any_size
from lora_sr.archs.info import refusal
from lora_sr.archs.reparam import deploy_form, run_seeded
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import NetworkLike, Origin, open_network
from lora_sr.checkpoints.community import architecture_name
from lora_sr.checkpoints.networks import PathLike, input_files
from lora_sr.checkpoints.origin import KEY
from lora_sr.deploy.exports.attention import use_plain_attention
from lora_sr.deploy.merge import merged_origin
from lora_sr.errors import InputError, shown
from lora_sr.runtime.float16 import fit_float16
from lora_sr.runtime.synthetic import synthetic_image

# Batch, height and width of the images that every file is tried on; odd ones where the network takes them.
CHECKED_SIZES = ((1, 24, 32), (1, 33, 47), (2, 41, 25))
TRACED_SIZE = (1, 20, 28)  # none of those, so that nothing that was traced can be right by chance
FLOAT32_TOLERANCE = 1e-4  # of the range of values
LONGEST_REASON = 160  # letters of what torch or onnxruntime says
FRAME = re.compile(r'.+\(\d+\): [\w<>]+$')  # of a stack, as the tracer writes it
PYTHON_CALL = re.compile(r"Could not export Python function call '(\w+)'")
ENDS_TRACER = ('GRL',)  # by a fault in its memory, as of torch 2.14


@dataclass(frozen=True)
class Deployed:
    """A network as it is deployed: merged, folded, without gradients, on the CPU in float32.

    Args:
        network: The network as it goes into a file.
        reference: The network before it was changed for that; what a file gives is compared with it.
        info: Which images it takes and gives.
        name: What its source is called in messages.
        origin: Where it comes from.
        files: The checkpoint and the adapters that it was made of.
    """

    network: nn.Module
    reference: nn.Module
    info: NetworkInfo
    name: str
    origin: Origin
    files: Sequence[PathLike] = ()

    @property
    def family(self) -> str:
        """The name of the network; that of a merged DSCLoRA is SPAN."""
        if isinstance(self.network, SPAN):
            return SPAN.__name__
        return architecture_name(self.network) or type(self.network).__name__

    def metadata(self) -> dict[str, str]:
        """What a program that runs the file may want to know."""
        return {
            'family': self.family,
            'scale': str(self.info.scale),
            'channels': str(self.info.in_channels),
            'value_range': f'[0, {self.info.value_range}]',
            'size_multiple': str(self.info.size_multiple),
            **({'smallest_side': str(self.info.smallest)} if self.info.smallest > 1 else {}),
            **({'is_square': 'true'} if self.info.is_square else {}),
            'lora_sr_version': lora_sr.__version__,
            KEY: self.origin.to_json(),
        }

    def image(self, batch: int, height: int, width: int) -> Tensor:
        """An image of soft structures, see :mod:`lora_sr.runtime.synthetic`; its sides are rounded up to fit."""
        return synthetic_image(batch, self.info.in_channels, *self.info.size(height, width)) * self.info.value_range

    def checked_images(self) -> list[Tensor]:
        """One image of each of the sizes that a file is tried on."""
        return [self.image(*size) for size in CHECKED_SIZES]

    def difference(self, run: Callable[[Tensor], Tensor], images: Sequence[Tensor] | None = None) -> Difference:
        """How far the images of ``run`` are from the network's, of those that are checked or of others."""
        largest, psnr = 0.0, math.inf
        with torch.no_grad():
            for image in self.checked_images() if images is None else images:
                expected, given = (run_seeded(one, image) for one in (self.reference, run))
                if given.shape != expected.shape or given.dtype != expected.dtype:
                    return Difference(math.inf, -math.inf)
                # An untrained network gives values far outside the range.
                error = (given - expected).double() / max(self.info.value_range, expected.abs().max().item())
                if not error.isfinite().all():
                    return Difference(math.inf, -math.inf)
                largest = max(largest, error.abs().max().item())
                if error.any():
                    psnr = min(psnr, -10 * math.log10(error.pow(2).mean().item()))
        return Difference(largest, psnr)

    def limits(self, run: Callable[[Tensor], Tensor]) -> str | None:
        """To which images what was traced is limited, as a part of a sentence; ``None`` where it is right for none."""
        for batch, limit in ((1, 'one image at a time alone'), (0, 'one size alone, of which it makes constants')):
            images = [self.image(*TRACED_SIZE), *(image for image in self.checked_images() if len(image) <= batch)]
            try:
                if self.difference(run, images).largest <= FLOAT32_TOLERANCE:
                    return f'what torch traces of its {self.family} is right for {limit}'
            except Exception:  # whatever a file makes of an image that it does not take
                continue
        return None


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
        info = deployed.info
        sizes = _sizes(info)
        tried = ', '.join('x'.join(map(str, image.shape)) for image in deployed.checked_images())
        return (
            f'network               {deployed.family} x{info.scale}, '
            f'{count_parameters(deployed.network).total:,} parameters\n'
            f'form                  {self.form}\n'
            f'images                {info.in_channels} channels in [0, {info.value_range}], size: {sizes}\n'
            f'largest difference    {self.difference} ({self.checked_by} against torch: {tried})'
        )


def deployed_network(source: NetworkLike, param_key: str | None = None) -> Deployed:
    """The network of a checkpoint as it is deployed, LKDN with its values within float16.

    Args:
        source: See :func:`lora_sr.load_network`; with LoRA or branches, or plain.
        param_key: Where the state dict is in a file; by default where
            :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.

    Raises:
        InputError: The checkpoint cannot be read or folded, or its network takes images of one size alone, or gives
            values that are not finite.
    """
    opened = open_network(source, param_key)
    try:
        network = deploy_form(opened.network).cpu().float()
    except InputError as error:
        raise InputError(f'{opened.name} cannot be folded: {error}') from None
    take_any_size(network, 1)  # padding is Python, which no file can hold
    reference = deepcopy(network)
    use_plain_attention(network)
    info = network_info(network)
    if info is None:
        raise InputError(
            f'{opened.name} cannot be exported: {type(network).__name__} must take one image, of any size '
            f'or of multiples of a number, and give one that is a whole number of times as large{refusal(network)}.'
        )
    if info.fixed_size is not None:
        raise InputError(
            f'{opened.name} cannot be exported: its {type(network).__name__} takes images of one size alone, as with '
            'an absolute position embedding, where any size or any multiple of a number is right.'
        )
    files = input_files(source, opened.checkpoint)
    deployed = Deployed(network, reference, info, opened.name, merged_origin(opened), files)
    images = deployed.checked_images()
    with torch.no_grad():
        if not network(images[0]).isfinite().all():
            raise InputError(
                f'{opened.name} gives values that are not finite: it has weights that are NaN or too large.'
            )
    fit_float16(network, images)
    return deployed


def exporter_reason(error: Exception) -> str:
    """What an exporter or a runtime says, in a line; torch puts a stack before it, or behind."""
    lines = [line for line in str(error).strip().splitlines() if not FRAME.match(line)] or [type(error).__name__]
    python = PYTHON_CALL.search(lines[0])
    if python:
        return f'its {shown(python[1])} is Python code, which no file can hold'
    said = [line for line in lines if 'Error: ' in line] or lines
    return shown(said[-1 if said is not lines else 0].rstrip('.: '), LONGEST_REASON)


def check_traceable(deployed: Deployed, form: str) -> None:
    """Check that torch survives the tracing of a network.

    Raises:
        InputError: It does not.
    """
    if architecture_name(deployed.network) in ENDS_TRACER:
        raise InputError(
            f'{deployed.name} cannot be exported as {form}: torch ends the process when it traces a {deployed.family}.'
        )


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """What the tracer needs: no gradients, no warnings, plain operators.

    A SwinIR does not make a constant of the batch size in it.

    Whether what was traced is right for other sizes is found out by trying, so its warnings say nothing new.
    """
    swinir: Any = sys.modules.get('basicsr.archs.swinir_arch')  # there if the network is one
    original = getattr(swinir, 'window_reverse', None)
    if swinir is not None:
        swinir.window_reverse = _window_reverse
    # Whole layers of transformers in one operator of torch's own, which 2.2 and later lets one switch off.
    mha = getattr(torch.backends, 'mha', None)
    fast = mha is not None and mha.get_fastpath_enabled()
    if mha is not None:
        mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            yield
    finally:
        if swinir is not None:
            swinir.window_reverse = original
        if mha is not None:
            mha.set_fastpath_enabled(fast)


def _window_reverse(windows: Tensor, window_size: int, height: int, width: int) -> Tensor:
    """(N * windows, window_size, window_size, C) -> (N, height, width, C), without BasicSR's division to an int."""
    channels = windows.shape[-1]
    rows, columns = height // window_size, width // window_size
    grid = windows.view(-1, rows, columns, window_size, window_size, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def _sizes(info: NetworkInfo) -> str:
    """Which sizes of images a file takes: what :func:`lora_sr.archs.take_any_size` does is not in it."""
    words = []
    if info.size_multiple > 1:
        words.append(f'in multiples of {info.size_multiple}')
    if info.smallest > info.size_multiple:
        words.append(f'of at least {info.smallest}')
    if info.is_square:
        words.append('equal')
    return f'height and width {", ".join(words)}' if words else 'any'
