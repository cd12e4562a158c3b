"""Any registered network with LoRA, for option files."""

from __future__ import annotations

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora, mark_trainable
from lora_sr.errors import InputError


@ARCH_REGISTRY.register()
def LoRANetwork(
    base: dict,
    target_modules: list[str],
    rank: int = 8,
    alpha: float | None = None,
    exclude_modules: list[str] | None = None,
    rank_pattern: dict | None = None,
    alpha_pattern: dict | None = None,
) -> nn.Module:
    """The network ``base`` with LoRA on the layers that are named. Only the LoRA tensors train.

    It is of the base's class, and its state dict is the base's with the LoRA tensors beside. So a checkpoint of the
    base loads strictly, and merging gives the base back.

    Args:
        base: The section of the network to adapt: ``type``, and the arguments of that network.
        target_modules: As of :class:`lora_sr.adapters.LoRAConfig`, and so the others.
        rank: Rank r of the update.
        alpha: Numerator of the update's scale alpha / r; the rank by default. An adapted checkpoint brings its own.
        exclude_modules: Layers that stay as they are although a target matches them.
        rank_pattern: Regular expression of layer names -> rank, for layers that differ.
        alpha_pattern: Likewise for alpha.

    Raises:
        InputError: As LoRAConfig, ``add_lora`` and the base network do.
    """
    if not isinstance(base, dict) or base.get('type') not in ARCH_REGISTRY:
        raise InputError(f'"base" of LoRANetwork has to be the section of a registered network, not {base!r}.')
    arguments = dict(base)
    # Not BasicSR's `build_network`: it logs, and a logger that exists before a run gets no file in it.
    network = ARCH_REGISTRY.get(arguments.pop('type'))(**arguments)
    add_lora(network, LoRAConfig(target_modules, rank, alpha, exclude_modules, rank_pattern, alpha_pattern))
    mark_trainable(network)
    return network
