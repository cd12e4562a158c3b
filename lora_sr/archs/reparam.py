"""Structural re-parameterisation: from the branches that train to the one convolution that runs."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from lora_sr.adapters import LoRALayer
from lora_sr.errors import InputError

TOLERANCE = 1e-5


class Foldable(nn.Module):
    """A module whose branches fold into fewer convolutions that compute the same, for :func:`fold` to find.

    A subclass has ``in_channels``, and takes (N, in_channels, H, W).
    """

    in_channels: int

    @property
    def is_training_form(self) -> bool:
        """Whether the branches are still apart."""
        return True

    def folded(self) -> nn.Module:
        """The deploy form, a module of its own; summed in float64 and rounded once. Called without gradients."""
        raise NotImplementedError


def is_training_form(network: nn.Module) -> bool:
    """Whether any module of ``network`` has branches that :func:`fold` would fold."""
    return any(isinstance(module, Foldable) and module.is_training_form for module in network.modules())


@torch.no_grad()
def fold(network: nn.Module) -> nn.Module:
    """Fold every re-parameterisable module of ``network`` to its deploy form, in place, and return the network.

    Each is compared with what replaces it, in float64 on a random image, before anything is replaced. Done once and
    for good: the branches are gone afterwards. What was frozen stays frozen, and a network in deploy form is left as it
    is. (Where ``network`` itself is a module that folds, only what is returned is folded.)

    Raises:
        InputError: A branch carries LoRA, which has to be merged first; or a deploy form differs by more than 1e-5 of
            the largest output, as with NaN, or weights that leave float32.
    """
    replacements = {}
    for name, module in network.named_modules():
        if isinstance(module, Foldable) and module.is_training_form:
            where = f'{name} ({type(module).__name__})' if name else type(module).__name__
            if any(isinstance(part, LoRALayer) for part in module.modules()):
                raise InputError(f'A branch of {where} carries LoRA: merge the LoRA before folding the branches.')
            replacement = module.folded().train(module.training)
            replacement.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
            difference = _relative_difference(module, replacement)
            if not difference <= TOLERANCE:
                raise InputError(
                    f'The folded {where} differs from its branches by {difference:.1e} of the largest output, more '
                    f'than {TOLERANCE:.0e}: its weights are too large for float32, or NaN.'
                )
            replacements[module] = replacement
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if name and module in replacements:
            parent, _, child = name.rpartition('.')
            setattr(network.get_submodule(parent), child, replacements[module])
    return replacements.get(network, network)


def _relative_difference(branched: Foldable, plain: nn.Module) -> float:
    image = torch.randn(1, branched.in_channels, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (deepcopy(module).double().cpu()(image) for module in (branched, plain))
    return 0.0 if torch.equal(first, second) else ((first - second).abs().max() / first.abs().max()).item()
