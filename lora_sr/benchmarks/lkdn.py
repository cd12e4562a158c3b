"""Time of LKDN beside the structure of its authors' code with the same weights, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from lora_sr.archs.lkdn import LKDB, LKDN
from lora_sr.archs.reparam import TOLERANCE, relative_difference

# LR of a 1280x720 output, and of a training batch.
IMAGE, BATCH = (1, 3, 180, 320), (16, 3, 48, 48)
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
REPEATS = 7
Form = tuple[str, str]  # names of a structure and of a memory format


class CopyingNorm(nn.Module):
    """A layer norm over the last axis that leaves the features contiguous in (N, C, H, W), as the authors' does."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        normalized: Tensor = self.norm(x)
        return normalized.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def with_official_structure(network: LKDN) -> LKDN:
    """A copy of ``network`` that does what the authors' code does besides.

    In each block it clones the input of the attention and copies the features after the layer norm.
    """
    network = deepcopy(network)
    for block in network.modules():
        if isinstance(block, LKDB):
            block.add_module('pixel_norm', CopyingNorm(block.pixel_norm))
            block.atten.register_forward_pre_hook(lambda module, inputs: inputs[0].clone())
    return network


def measure_times(
    forms: Mapping[Form, nn.Module], shape: tuple[int, ...], backward: bool, repeats: int = REPEATS
) -> dict[Form, float]:
    """Median seconds of each form, after one pass that is not counted. The forms take turns, so all meet the same load.

    Args:
        forms: (name, memory format's name) -> network in that memory format.
        shape: Shape (N, 3, H, W) of the input.
        backward: Measure forward and backward, as in training; else forward alone, without gradients.
        repeats: How often each is measured.

    Returns:
        The keys of ``forms`` -> seconds.
    """
    device = next(next(iter(forms.values())).parameters()).device
    image = torch.rand(shape, device=device)
    images = {name: image.contiguous(memory_format=memory_format) for name, memory_format in FORMATS.items()}
    times: dict[Form, list[float]] = {form: [] for form in forms}
    for _ in range(repeats + 1):
        for form, network in forms.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                output = network(images[form[1]])
                if backward:
                    output.mean().backward()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            times[form].append(time.perf_counter() - start)
    return {form: statistics.median(seconds[1:]) for form, seconds in times.items()}


def run(image_shape: tuple[int, ...] = IMAGE, batch_shape: tuple[int, ...] = BATCH, repeats: int = REPEATS) -> None:
    """Print times of LKDN x4 in our structure and in the authors', in both memory formats, and their ratios.

    Args:
        image_shape: Shape (N, 3, H, W) of the input that is measured forward.
        batch_shape: Shape of the input that is measured forward, and forward and backward.
        repeats: How often each is measured.

    Raises:
        RuntimeError: The outputs of the two structures differ by more than 1e-5 of the largest.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    threads = '' if device == 'cuda' else f' (threads: {torch.get_num_threads()})'
    torch.manual_seed(0)
    ours = LKDN().to(device)
    authors = with_official_structure(ours)
    networks = {'ours': ours, 'authors': authors}
    difference = _difference(ours, authors, torch.rand(batch_shape, device=device))
    if not difference <= TOLERANCE:
        raise RuntimeError(f'the outputs of the two structures differ by {difference:.1e} of the largest')
    forms = {
        (name, format_name): deepcopy(network).to(memory_format=memory_format)
        for format_name, memory_format in FORMATS.items()
        for name, network in networks.items()
    }
    cases = [
        measure_times(forms, shape, backward, repeats)
        for shape, backward in ((image_shape, False), (batch_shape, False), (batch_shape, True))
    ]
    print(f'LKDN x4, float32, {device}{threads}; image {image_shape}, batch {batch_shape}')
    print(f'{"":26}{"image":>12}{"batch":>12}{"batch, and backward":>22}')
    for format_name in FORMATS:
        for name in networks:
            forward, batch_forward, both = (seconds[name, format_name] for seconds in cases)
            print(f'{f"{name}, {format_name}":26}{forward:>10.3f} s{batch_forward:>10.3f} s{both:>20.3f} s')
        forward, batch_forward, both = (
            seconds['authors', format_name] / seconds['ours', format_name] for seconds in cases
        )
        print(f'{"authors / ours":26}{forward:>12.2f}{batch_forward:>12.2f}{both:>22.2f}')
    print(f'outputs of the two differ by {difference:.1e} of the largest, in float64')


@torch.no_grad()
def _difference(first: nn.Module, second: nn.Module, image: Tensor) -> float:
    # In float64, as GPUs round float32 convolutions differently from one memory format to the other.
    return relative_difference(*(deepcopy(network).double()(image.double()) for network in (first, second)))
