"""Structural re-parameterisation: from the branches that train to the one convolution that runs."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Network = TypeVar('Network', bound=nn.Module)


def is_training_form(network: nn.Module) -> bool:
    """Whether any module of ``network`` has branches that :func:`fold` would fold."""
    return any(getattr(module, 'is_training_form', False) for module in network.modules())


def fold(network: Network) -> Network:
    """Fold every re-parameterisable module of ``network`` to its deploy form, in place, and return ``network``.

    Done once and for good: the branches are gone afterwards. A network in deploy form is left as it is.

    Raises:
        InputError: A branch carries LoRA, which has to be merged first.
    """
    for module in list(network.modules()):
        if getattr(module, 'is_training_form', False):
            module.fold()
    return network
