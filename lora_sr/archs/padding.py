"""Padding around networks that want sizes in multiples: of attention windows, or for pixel unshuffling."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def pad_to_multiple(network: nn.Module, multiple: int, smallest: int = 1, is_square: bool = False) -> None:
    """Let a network take images of any size, in place, see :func:`lora_sr.archs.take_any_size`."""
    remove_padding(network)
    if multiple > 1 or smallest > 1 or is_square:
        network.register_forward_pre_hook(_Pad(multiple, smallest, is_square))
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

    def __init__(self, multiple: int, smallest: int, is_square: bool):
        self.multiple, self.smallest, self.is_square = multiple, smallest, is_square

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        network._size_to_crop_to = None  # type: ignore[assignment]
        if not inputs:
            return None
        height, width = inputs[0].shape[-2:]
        tall, wide = (-(-max(side, self.smallest) // self.multiple) * self.multiple for side in (height, width))
        if self.is_square:
            tall = wide = max(tall, wide)
        if (tall, wide) == (height, width):
            return None
        network._size_to_crop_to = height, width  # type: ignore[assignment]
        # By reflection as far as there is something to reflect.
        image = F.pad(inputs[0], (0, min(wide - width, width - 1), 0, min(tall - height, height - 1)), 'reflect')
        if image.shape[-2:] != (tall, wide):
            image = F.pad(image, (0, wide - image.shape[-1], 0, tall - image.shape[-2]), 'replicate')
        return (image, *inputs[1:])


class _Crop:
    """Takes from the output what belongs to the image before it was padded."""

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        size: tuple[int, int] | None = network._size_to_crop_to  # type: ignore[assignment]
        if size is None:
            return None
        height, width = size
        scale = output.shape[-1] // inputs[0].shape[-1]
        return output[..., : height * scale, : width * scale]
