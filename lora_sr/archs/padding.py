"""Padding around networks that want sizes in multiples: of attention windows, or for pixel unshuffling."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def pad_to_multiple(network: nn.Module, multiple: int) -> None:
    """Let a network take images of any size, in place, see :func:`lora_sr.archs.take_any_size`."""
    remove_padding(network)
    if multiple > 1:
        network.register_forward_pre_hook(_Pad(multiple))
        network.register_forward_hook(_Crop())


def is_padded(network: nn.Module) -> bool:
    """Whether a network takes images of any size by :func:`pad_to_multiple`."""
    return any(isinstance(hook, _Pad) for hook in network._forward_pre_hooks.values())


def remove_padding(network: nn.Module) -> None:
    """Undo what :func:`pad_to_multiple` did, in place."""
    for hooks in (network._forward_pre_hooks, network._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (_Pad, _Crop))]:
            del hooks[key]


class _Pad:
    """Pads the image that a network is called with, and notes its size on that network (which may be a replica)."""

    def __init__(self, multiple: int):
        self.multiple = multiple

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        network._size_to_crop_to = None  # type: ignore[assignment]
        if not inputs:
            return None
        height, width = inputs[0].shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        if not bottom and not right:
            return None
        network._size_to_crop_to = height, width  # type: ignore[assignment]
        mode = 'reflect' if bottom < height and right < width else 'replicate'
        return (F.pad(inputs[0], (0, right, 0, bottom), mode), *inputs[1:])


class _Crop:
    """Takes from the output what belongs to the image before it was padded."""

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        size: tuple[int, int] | None = network._size_to_crop_to  # type: ignore[assignment]
        if size is None:
            return None
        height, width = size
        scale = output.shape[-1] // inputs[0].shape[-1]
        return output[..., : height * scale, : width * scale]
