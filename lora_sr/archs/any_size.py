"""Images of any size, for networks that want sizes in multiples: of attention windows, or for pixel unshuffling."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar('Network', bound=nn.Module)

LARGEST_MULTIPLE = 64
SMALLEST_SIDE = 20  # pixels of an image that is tried


class AcceptedInput(NamedTuple):
    """What a network takes: images of so many channels, whose height and width are multiples of ``multiple``."""

    channels: int
    multiple: int


def size_multiple(network: nn.Module) -> int:
    """The smallest number of which height and width have to be multiples for ``network`` to take an image.

    Args:
        network: See :func:`accepted_input`.

    Returns:
        That number: 1 for a network that takes any size, and where none up to 64 is found.
    """
    found = accepted_input(network)
    return 1 if found is None else found.multiple


def accepted_input(network: nn.Module) -> AcceptedInput | None:
    """Which images a network takes, found by trying, without knowing it.

    A copy of it runs in eval mode on the ``meta`` device, where shapes are worked out and nothing is computed. A
    network that cannot run there at all, e.g. since it looks at values, is tried on the CPU, with small images.

    Args:
        network: Any network, (N, C, H, W) -> (N, C', f * H, f * W) with the same whole number f for both. Neither it
            nor the state of the random generator is changed. What :func:`take_any_size` did is left out of account.

    Returns:
        Channels and multiple; ``None`` where no multiple up to 64 is found for 3 channels, for 1, or for those that the
        first convolution takes.
    """
    copy = deepcopy(network).eval()
    _remove_hooks(copy)
    found, ran = _try_sizes(copy.to('meta'), 'meta')
    if not ran:
        copy = deepcopy(network).cpu().eval()
        _remove_hooks(copy)
        found, _ = _try_sizes(copy, 'cpu')
    return found


def take_any_size(network: Network, multiple: int | None = None) -> Network:
    """Let a network take images of any size, in place: what does not fit is padded before it and cropped behind it.

    Padding is at the bottom and on the right, by reflection, or by repeating the border where the image is smaller than
    what is to be reflected. An image that fits passes as it is. The class and the state dict of the network stay.

    Args:
        network: Any network, as :func:`accepted_input` takes it; one that was given here before as well.
        multiple: Of what its sizes have to be multiples; found by :func:`size_multiple` by default. With 1 nothing
            is padded.

    Returns:
        ``network`` itself.
    """
    if multiple is None:
        multiple = size_multiple(network)
    _remove_hooks(network)
    if multiple > 1:
        network.register_forward_pre_hook(_Pad(multiple))
        network.register_forward_hook(_Crop())
    return network


class _Pad:
    """Pads the image that a network is called with, and notes its size on that network (which may be a replica)."""

    def __init__(self, multiple: int):
        self.multiple = multiple

    def __call__(self, network: nn.Module, inputs: tuple) -> tuple | None:
        network._size_to_crop_to = None
        if not inputs:
            return None
        height, width = inputs[0].shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        if not bottom and not right:
            return None
        network._size_to_crop_to = height, width
        mode = 'reflect' if bottom < height and right < width else 'replicate'
        return (F.pad(inputs[0], (0, right, 0, bottom), mode), *inputs[1:])


class _Crop:
    """Takes from the output what belongs to the image before it was padded."""

    def __call__(self, network: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if network._size_to_crop_to is None:
            return None
        height, width = network._size_to_crop_to
        scale = output.shape[-1] // inputs[0].shape[-1]
        return output[..., : height * scale, : width * scale]


def _remove_hooks(network: nn.Module) -> None:
    for hooks in (network._forward_pre_hooks, network._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (_Pad, _Crop))]:
            del hooks[key]


@torch.no_grad()
def _try_sizes(network: nn.Module, device: str) -> tuple[AcceptedInput | None, bool]:
    """What :func:`accepted_input` finds on one device, and whether the network has run there with any image."""
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
                    factor = output.shape[2] // height
                    if factor > 0 and output.shape[2:] == (height * factor, width * factor):
                        return AcceptedInput(channels, multiple), ran
    return None, ran
