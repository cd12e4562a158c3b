"""The network that a file of weights is of, for option files."""

from __future__ import annotations

import os

from torch import nn

from lora_sr.checkpoints.checkpoint import BASE, Checkpoint
from lora_sr.checkpoints.community import build_community
from lora_sr.checkpoints.families import discriminator_of
from lora_sr.errors import InputError, shown


def spandrel(path: str, param_key: str | None = None) -> nn.Module:
    """The network of a file of weights whose architecture spandrel knows, for option files; it has the weights.

    Args:
        path: The file, see :class:`lora_sr.checkpoints.Checkpoint`.
        param_key: Where the weights are in it; by default they are found, the average first.

    Returns:
        The network: (N, C, H, W) in [0, 1] -> (N, C, scale * H, scale * W), without clipping.

    Raises:
        InputError: The file cannot be read, carries LoRA, or spandrel does not know its network.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f'path must be a file of weights, got {shown(repr(path))}.')
    checkpoint = Checkpoint.read(os.path.expanduser(path), param_key)
    discriminator = discriminator_of(checkpoint.state)
    if checkpoint.architecture is None:
        kind = f'a {checkpoint.family}, to be named by its own type' if checkpoint.family else 'one of none'
        kind = kind if discriminator is None else f'a discriminator ({discriminator})'
        raise InputError(f'{path} must be of an architecture of spandrel, got {kind}.')
    if checkpoint.form != BASE:
        raise InputError(f'{path} must be a base, got a checkpoint with LoRA: merge it with `lora-sr merge`.')
    return build_community(checkpoint.in_file, path)
