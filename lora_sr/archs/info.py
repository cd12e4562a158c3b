"""What a network takes and gives: found once, by trying, and kept with the network."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_sr.archs.padding import pad_to_multiple, remove_padding

Network = TypeVar('Network', bound=nn.Module)

LARGEST_MULTIPLE = 64
SMALLEST_SIDE = 20  # pixels of an image that is tried
ATTRIBUTE = '_network_info'
# Networks whose values do not range from 0 to 1 -> the largest value.
VALUE_RANGES = {'basicsr.archs.ridnet_arch.RIDNet': 255}


@dataclass(frozen=True)
class NetworkInfo:
    """Which images a network takes, and which it gives.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        scale: Scale factor.
        size_multiple: Height and width of the input must be multiples of this. What :func:`take_any_size` does is left
            out of account.
        value_range: Values of the images range from 0 to this: 1, or 255 for a few old networks.
        fixed_size: Height and width of the input, where the network takes one size alone, as with an absolute position
            embedding.
        smallest: Height and width of the input must be at least this, but for what :func:`take_any_size` does.
        is_square: Likewise, they must be equal.
        halves: The types of 16 bits in which it runs, as far as is known.
    """

    in_channels: int
    out_channels: int
    scale: int
    size_multiple: int = 1
    value_range: int = 1
    fixed_size: tuple[int, int] | None = None
    smallest: int = 1
    is_square: bool = False
    halves: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def side(self, at_least: int) -> int:
        """The smallest side of an image that the network takes, in pixels, of at least so many."""
        return -(-max(at_least, self.smallest) // self.size_multiple) * self.size_multiple

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size of an image to try the network with: ``height`` and ``width`` rounded up, or the fixed size."""
        if self.is_square:
            height = width = max(height, width)
        return self.fixed_size or (self.side(height), self.side(width))


def network_info(network: nn.Module) -> NetworkInfo | None:
    """Which images a network takes and gives. It is tried once; the network, and copies of it, keep what was found.

    A class with a method ``declared_info`` is taken at its word, which is quicker: torch takes more than a second to
    get the ``meta`` device ready.

    A copy runs in eval mode on the ``meta`` device, where shapes are worked out and nothing is computed. A network that
    cannot run there, e.g. since it looks at values, is tried on the CPU, with small images.

    Args:
        network: Any network, (N, C, H, W) -> (N, C', f * H, f * W) with the same whole number f for both. Neither its
            weights nor the state of the random generator is changed.

    Returns:
        ``None`` where no multiple up to 64 is found for 3 channels, for 1, or for those that the first convolution
        takes.
    """
    if ATTRIBUTE not in vars(network):
        declare = getattr(type(network), 'declared_info', None)
        setattr(network, ATTRIBUTE, declare(network) if declare else _fixed(network) or _probe(network))
    found: NetworkInfo | None = vars(network)[ATTRIBUTE]
    return found


def set_info(network: nn.Module, info: NetworkInfo) -> None:
    """Note on a network what :func:`network_info` is to say of it."""
    setattr(network, ATTRIBUTE, info)


def refusal(network: nn.Module) -> str:
    """Why :func:`network_info` found nothing, as the end of a sentence: what the network says of an RGB image."""
    try:
        with torch.no_grad():
            _copy(network, 'cpu')(torch.zeros(1, 3, 32, 32))
    except Exception as error:  # whatever a network makes of it
        return f' ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""})'
    return ''


def take_any_size(network: Network, multiple: int | None = None) -> Network:
    """Let a network take images of any size, in place: what does not fit is padded before it and cropped behind it.

    Padding is at the bottom and on the right, by reflection, and by repeating the border where there is nothing more to
    be reflected. An image that fits passes as it is. The class and the state dict of the network stay.

    Args:
        network: Any network, as :func:`network_info` takes it; one that was given here before as well.
        multiple: Of what its sizes have to be multiples; by default what :func:`network_info` finds. With 1 nothing is
            padded.

    Returns:
        ``network`` itself.
    """
    info = None if multiple == 1 else network_info(network)
    if info is None:
        pad_to_multiple(network, multiple or 1)
    else:
        pad_to_multiple(network, multiple or info.size_multiple, info.smallest, info.is_square)
    return network


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class, named ``package.module.Class``, which is not imported for it."""
    return any(f'{kind.__module__}.{kind.__qualname__}' == name for kind in type(module).__mro__)


def _value_range(network: nn.Module) -> int:
    return next((top for name, top in VALUE_RANGES.items() if is_a(network, name)), 1)


def _fixed(network: nn.Module) -> NetworkInfo | None:
    """That of a SwinIR with an absolute position embedding, which is added to images of one size."""
    if not (is_a(network, 'basicsr.archs.swinir_arch.SwinIR') and network.ape):
        return None
    size: tuple[int, int] = tuple(network.patches_resolution)  # type: ignore[arg-type]
    channels: int = network.conv_first.in_channels  # type: ignore[assignment, union-attr]
    with torch.no_grad():
        output = _copy(network, 'cpu')(torch.zeros(1, channels, *size))
    return NetworkInfo(channels, output.shape[1], output.shape[-1] // size[1], fixed_size=size)


def _probe(network: nn.Module) -> NetworkInfo | None:
    found, ran = _try_sizes(_copy(network, 'meta'), 'meta')
    if not ran:
        found, _ = _try_sizes(_copy(network, 'cpu'), 'cpu')
    return found


def _copy(network: nn.Module, device: str) -> nn.Module:
    copy = deepcopy(network).float().to(device).eval()
    remove_padding(copy)
    return copy


@torch.no_grad()
def _try_sizes(network: nn.Module, device: str) -> tuple[NetworkInfo | None, bool]:
    """What :func:`network_info` finds on one device, and whether the network has run there with any image."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    channel_numbers = dict.fromkeys([3, 1] if first is None else [3, 1, first.in_channels])
    ran = False
    # What a forward pass makes without naming a device, such as a mask, has to be there as well.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        for multiple in range(1, LARGEST_MULTIPLE + 1):
            # Neighboring numbers have no factor in common, so height and width have none but those of `multiple`.
            times = -(-SMALLEST_SIDE // multiple)
            height, width = multiple * times, multiple * (times + 1)
            for channels in channel_numbers:
                try:
                    output = network(torch.zeros(1, channels, height, width))
                except Exception:  # whatever a network makes of an image that it does not take
                    continue
                ran = True
                if isinstance(output, Tensor) and output.ndim == 4:
                    scale = output.shape[2] // height
                    if scale > 0 and output.shape[2:] == (height * scale, width * scale):
                        info = NetworkInfo(channels, output.shape[1], scale, multiple, _value_range(network))
                        return info, ran
    return None, ran
