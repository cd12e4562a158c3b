"""What constructors and builders of networks check alike."""

from __future__ import annotations

import math

from lora_sr.errors import InputError, shown


def check_arguments(network: str, num_in_ch: object, num_out_ch: object, **sizes: object) -> None:
    """Check the arguments of a network for RGB images.

    Args:
        network: What it is called, for messages.
        num_in_ch: Channels of its input.
        num_out_ch: Channels of its output.
        sizes: Widths, depths and its scale.

    Raises:
        InputError: Other than 3 channels, or a size that is no integer of at least 1.
    """
    for key, value in (('num_in_ch', num_in_ch), ('num_out_ch', num_out_ch)):
        if value != 3:
            raise InputError(f'"{key}" of {network} must be 3, for RGB images, got {shown(repr(value))}.')
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f'"{key}" of {network} must be an integer of at least 1, got {shown(repr(value))}.')


def scale_of(network: str, channels: int) -> int:
    """The scale s of a network for RGB images that shuffles 3 * s * s ``channels`` into pixels.

    Raises:
        InputError: There is no such scale.
    """
    scale = math.isqrt(channels // 3)
    if scale < 1 or channels != 3 * scale**2:
        raise InputError(
            f'the channels that {network} shuffles into pixels must be 3 times the square of its scale, got {channels}.'
        )
    return scale
