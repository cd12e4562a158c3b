"""Structural reparameterization: from the branches that train to the one convolution that runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_sr.adapters import AdaptedModule, adapted_modules, merge_lora
from lora_sr.adapters.layers import base_class_of
from lora_sr.errors import InputError

# The largest relative difference between outputs that are to be the same up to rounding in float32.
TOLERANCE = 1e-5


HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class Foldable(nn.Module):
    """A module whose branches fold into fewer convolutions that compute the same, for :func:`fold` to find.

    In training it computes with the folded kernels, made of the branches anew at each pass: the branches get the same
    gradients as if each had computed, at a fraction of the operations and of the memory. Each branch computes in eval
    mode, where a layer has a hook or is none of ours, and where ``trains_folded`` is False.

    A subclass has ``in_channels``, and takes (N, in_channels, H, W).
    """

    in_channels: int
    trains_folded: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> what :meth:`branches` gives."""
        if self.training and self.trains_folded and self.is_training_form and not self._needs_branches():
            with _without_autocast(x.device):  # which would round what the branches add up to
                kernels = self.kernels()
            return self.convolve(x, *kernels)
        return self.branches(x)

    def _needs_branches(self) -> bool:
        """Whether a layer has a hook, which wants to be called, or is not computed by its weight alone, as PEFT's."""
        layers = [module for module in self.modules() if module is not self and not isinstance(module, nn.Sequential)]
        return any(
            base_class_of(layer) is not nn.Conv2d or any(getattr(layer, name) for name in HOOKS) for layer in layers
        )

    def branches(self, x: Tensor) -> Tensor:
        """What the module computes, branch by branch."""
        raise NotImplementedError

    def kernels(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Weights and biases of the folded convolutions, of the type of the branches.

        Args:
            dtype: What they are summed in; by default float32, or the branches' own if that is finer.
        """
        raise NotImplementedError

    def convolve(self, x: Tensor, *kernels: Tensor) -> Tensor:
        """What the module computes, by its folded kernels."""
        raise NotImplementedError

    @property
    def is_training_form(self) -> bool:
        """Whether the branches are still apart."""
        return True

    def folded(self) -> nn.Module:
        """The deploy form, a module of its own; summed in float64 and rounded once. Called without gradients."""
        raise NotImplementedError


def sum_type(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What kernels are summed in, see :meth:`Foldable.kernels`."""
    return dtype or torch.promote_types(weight.dtype, torch.float32)


def laid_out_as(kernel: Tensor, weight: Tensor) -> Tensor:
    """A kernel of the type and in the memory format of a weight, which decide upon those of what it gives."""
    is_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    knows = getattr(torch.amp, 'is_autocast_available', lambda kind: kind in ('cpu', 'cuda'))  # before torch 2.4
    return torch.autocast(device.type, enabled=False) if knows(device.type) else nullcontext()


def bias_of(layer: nn.Conv2d) -> Tensor:
    """The bias of a convolution that has one."""
    assert layer.bias is not None
    return layer.bias


def is_training_form(network: nn.Module) -> bool:
    """Whether any module of ``network`` has branches that :func:`fold` would fold."""
    return any(isinstance(module, Foldable) and module.is_training_form for module in network.modules())


def relative_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two outputs of one shape, relative to the largest value of the first; 0 if equal.

    NaN where either has one, so ask for ``not relative_difference(...) <= TOLERANCE``.
    """
    return 0.0 if torch.equal(first, second) else ((first - second).abs().max() / first.abs().max()).item()


@torch.no_grad()
def fold(network: nn.Module) -> nn.Module:
    """Fold every reparameterizable module of ``network`` to its deploy form, in place, and return the network.

    Each is compared with what replaces it, in float64 on a random image, before anything is replaced. Done once and
    for good: the branches are gone afterwards. What was frozen stays frozen, and a network in deploy form is left as it
    is. (Where ``network`` itself is a module that folds, only what is returned is folded.)

    Raises:
        InputError: A branch carries LoRA, which has to be merged first; a branch is in float16 or bfloat16, which
            would round what is folded; or a deploy form differs by more than 1e-5 of the largest output, as with NaN,
            or weights that leave float32.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in network.named_modules():
        if isinstance(module, Foldable) and module.is_training_form:
            where = f'{name} ({type(module).__name__})' if name else type(module).__name__
            if any(isinstance(part, AdaptedModule) for part in module.modules()):
                raise InputError(f'A branch of {where} carries LoRA: merge the LoRA before folding the branches.')
            for parameter in module.parameters():
                if parameter.dtype not in (torch.float32, torch.float64):
                    raise InputError(
                        f'{where} is in {str(parameter.dtype).rpartition(".")[2]}, which is too coarse for what its '
                        'branches add up to: fold the network in float32 first, and convert it afterwards.'
                    )
            replacement = module.folded().train(module.training)
            replacement.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
            difference = _difference(module, replacement)
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


def deploy_form(network: nn.Module) -> nn.Module:
    """A copy of ``network`` with its LoRA merged and its branches folded, in eval mode and frozen.

    Raises:
        InputError: As :func:`fold` does.
    """
    network = deepcopy(network)
    if any(True for _ in adapted_modules(network)):
        merge_lora(network)
    return fold(network).eval().requires_grad_(False)


def run_seeded(run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """What a network makes of an image on the CPU, with the same noise each time: AuraSR adds some.

    Args:
        run: The network.
        image: (N, C, H, W).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(image)


def _difference(branched: Foldable, plain: nn.Module) -> float:
    image = torch.randn(1, branched.in_channels, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return relative_difference(*(deepcopy(module).double().cpu().eval()(image) for module in (branched, plain)))
