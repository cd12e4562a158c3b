"""Time of the deployed networks beside the same networks as the papers' code runs them, in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Callable, Sequence, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.adapters import count_parameters
from lora_sr.archs.complexity import count_flops
from lora_sr.archs.layout import lay_out
from lora_sr.archs.lkdn import LKDN, LKDN_S
from lora_sr.archs.reparam import bias_of, deploy_form
from lora_sr.archs.span import SPAN, Conv3XC, span_sizes
from lora_sr.benchmarks.lkdn import with_official_structure
from lora_sr.checkpoints import NetworkLike, load_network
from lora_sr.errors import InputError
from lora_sr.runtime.deployed import optimize
from lora_sr.runtime.synthetic import synthetic_image

Run = Callable[[Tensor], Tensor]
PUBLISHED = 'as published (eager, NCHW, float32)'
REFOLDING = 'the same, folding at each pass'
REPEATS = 9
MOST_PIXELS = 2**22  # of the LR image; the published forms take some 20 GB for them
COPIED = 2**26  # values that are copied to measure the bandwidth
MULTIPLIED = (256, 512, 1024, 2048)  # rows and columns of the matrices that are multiplied to measure the rate
LONG_PRODUCT = 0.05  # seconds


class RefoldingConv3XC(nn.Module):
    """SPAN's convolution as its authors' code runs it: its branches are folded again at each forward pass."""

    def __init__(self, branches: Conv3XC):
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        first, middle, last = cast('tuple[nn.Conv2d, ...]', tuple(self.branches.conv))
        skip = self.branches.sk
        outer = last.weight.flatten(1)
        weight = torch.einsum('op,pmhw,mi->oihw', outer, middle.weight, first.weight.flatten(1))
        inner = middle.weight.sum((2, 3)) @ bias_of(first) + bias_of(middle)
        bias = outer @ inner + bias_of(last) + bias_of(skip)
        weight = (weight + F.pad(skip.weight, (1, 1, 1, 1))).contiguous()
        return F.conv2d(x, weight, bias, padding=1)


@dataclass(frozen=True)
class Measured:
    """A form of a network: seconds, and how its image is beside that of the network in float64.

    ``equal`` is the share of equal 8-bit values, ``psnr`` is in dB. Both are NaN of a network with other weights.
    """

    seconds: float
    equal: float
    psnr: float


def run(sources: Mapping[str, NetworkLike], sizes: Sequence[tuple[int, int]] = ((256, 256),)) -> None:
    """Print times of networks in all their forms, and their ratios.

    Args:
        sources: Name -> what :func:`lora_sr.load_network` takes. By default SPAN with 26 and 28 channels, LKDN and
            LKDN-S, x4, with random weights.
        sizes: Heights and widths of the LR images.

    Raises:
        InputError: A checkpoint cannot be used, or a size is below 1.
    """
    for size in sizes:
        if min(size) < 1:
            raise InputError(f'The size must be at least 1x1, got {size[1]}x{size[0]} (width x height).')
        if size[0] * size[1] > MOST_PIXELS:
            raise InputError(f'The size must have at most {MOST_PIXELS:,} pixels, got {size[1]}x{size[0]}.')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    loaded = {name: load_network(source) for name, source in sources.items()}
    networks = loaded or _random_networks()
    where = torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    bandwidth, rates = measure_bandwidth(device), {dtype: measure_rate(device, dtype) for dtype in _dtypes(device)}
    print(f'{where}, torch {torch.__version__}; measured: {bandwidth / 1e9:.0f} GB/s copied, ', end='')
    print(', '.join(f'{rate / 1e12:.2f} TFLOP/s in {_name(dtype)}' for dtype, rate in rates.items()))
    for name, network in networks.items():
        network = _measurable(deploy_form(network).to(device))
        for height, width in sizes:
            channels = network.num_in_ch
            image = synthetic_image(1, channels, height, width).to(device)
            forms, preparing = make_forms(network, image)
            measured = measure(network, forms, image)
            print(f'\n{name}, LR {width}x{height} (width x height)')
            print(f'{"":44}{"time":>12}{"ratio":>8}{"beside float64: equal in 8 bits, PSNR":>40}')
            for form, row in measured.items():
                ratio = measured[PUBLISHED].seconds / row.seconds
                beside = '' if math.isnan(row.equal) else f'{row.equal:>30.4%}{row.psnr:>7.1f} dB'
                print(f'{form:44}{row.seconds * 1e3:>9.2f} ms{ratio:>8.2f}{beside}')
            operations = 2 * count_flops(network, height, width)
            for dtype, rate in rates.items():
                width_of_values = torch.empty(0, dtype=dtype).element_size()
                moved = width_of_values * count_parameters(network).total + 4 * image.numel() * (1 + network.upscale**2)
                bytes_ms, operations_ms = moved / bandwidth * 1e3, operations / rate * 1e3
                print(
                    f'{"floor of plain convolutions, " + _name(dtype):44}{max(bytes_ms, operations_ms):>9.2f} ms: '
                    f'bytes {bytes_ms:.2f} ms, operations {operations_ms:.2f} ms'
                )
            for form, times in preparing.items():
                print(f'{form}: {times}')


def make_forms(network: SPAN | LKDN, image: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """The forms in which a network runs, and what it takes until each of ours does.

    Args:
        network: SPAN or LKDN in deploy form.
        image: (1, C, H, W), of the size that is measured.
    """
    published = network if isinstance(network, SPAN) else with_official_structure(network)
    forms: dict[str, Run] = {PUBLISHED: published.to(memory_format=torch.contiguous_format)}
    if isinstance(network, SPAN):
        forms[REFOLDING] = refolding(network).to(image.device)
    last = deepcopy(network)
    lay_out(last, torch.channels_last)
    forms['torch, channels-last'] = lambda x: last(x.contiguous(memory_format=torch.channels_last))
    preparing = {}
    for dtype in _dtypes(image.device):
        start = time.perf_counter()
        optimized = optimize(network, dtype)
        ready = time.perf_counter()
        first = _seconds(optimized, image)
        smaller = image[..., : max(1, image.shape[2] // 2 + 1), :].contiguous()
        new_size = [_seconds(optimized, smaller) for _ in range(3)]
        name = f'lora_sr.optimize, {_name(dtype)} ({optimized.engine})'
        forms[name] = optimized
        preparing[name] = (
            f'ready in {ready - start:.2f} s, first pass {first * 1e3:.0f} ms; a new size, {smaller.shape[2]}x'
            f'{smaller.shape[3]}: {", ".join(f"{seconds * 1e3:.1f}" for seconds in new_size)} ms'
        )
    return forms, preparing


def refolding(network: SPAN) -> SPAN:
    """A SPAN of the same sizes with random weights that folds its branches at each forward pass."""
    other = SPAN(**span_sizes(network.state_dict())).eval()
    for name, module in list(other.named_modules()):
        if isinstance(module, Conv3XC):
            parent, _, child = name.rpartition('.')
            setattr(other.get_submodule(parent), child, RefoldingConv3XC(module))
    return other.requires_grad_(False)


@torch.no_grad()
def measure(network: nn.Module, forms: dict[str, Run], image: Tensor, repeats: int = REPEATS) -> dict[str, Measured]:
    """Median seconds of each form of a network, after two passes that are not counted; the forms take turns."""
    outputs = {name: form(image) for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, form in forms.items():
            seconds = _seconds(form, image)
            if turn:
                times[name].append(seconds)
    expected = deepcopy(network).double()(image.double())
    measured = {}
    for name, output in outputs.items():
        error = (output.double() - expected).pow(2).mean().item()
        equal = (_bits(output) == _bits(expected)).double().mean().item()
        psnr = -10 * math.log10(error) if error else math.inf
        if name == REFOLDING:
            equal = psnr = math.nan
        measured[name] = Measured(statistics.median(times[name]), equal, psnr)
    return measured


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read and written by a copy."""
    source = torch.zeros(COPIED, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / min(_seconds(target.copy_, source) for _ in range(5))


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of matrices, which are smaller where a product takes long."""
    for side in MULTIPLIED:
        matrix = torch.rand(side, side, device=device).to(dtype)
        seconds = min(_seconds(matrix.matmul, matrix) for _ in range(5))
        if seconds > LONG_PRODUCT:  # as of bfloat16 on a CPU that does not know it
            break
    return 2 * side**3 / seconds


def _measurable(network: nn.Module) -> SPAN | LKDN:
    if not isinstance(network, (SPAN, LKDN)):
        raise InputError(f'SPAN and LKDN are measured as their papers run them, not {type(network).__name__}.')
    return network


def _random_networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        'SPAN ch26 x4 (random weights)': SPAN(feature_channels=26, deploy=True),
        'SPAN ch28 x4 (random weights)': SPAN(feature_channels=28, deploy=True),
        'LKDN x4 (random weights)': LKDN(),
        'LKDN-S x4 (random weights)': LKDN_S(),
    }


def _dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == 'cuda' else [])


def _seconds(function: Run, argument: Tensor) -> float:
    if argument.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(argument)
    if argument.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _bits(image: Tensor) -> Tensor:
    return (image.double().clamp(0, 1) * 255).round()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition('.')[2]
