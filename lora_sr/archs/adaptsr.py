"""AdaptSR: any registered network with LoRA, for option files."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from lora_sr.adapters import LoRAConfig, add_lora, base_weight, layer_groups, mark_trainable
from lora_sr.archs.info import take_any_size
from lora_sr.archs.registry import find_arch
from lora_sr.errors import InputError


def AdaptSR(base: dict[str, Any], lora: dict[str, Any]) -> nn.Module:
    """The network ``base`` with LoRA on its convolutions, attention and MLPs. Only the updates train.

    It is of the base's class, and its state dict is the base's with the updates beside. So a checkpoint of the base
    loads strictly, as does an adapted one, and merging gives the base back. A network that wants sizes in multiples (of
    its windows) takes images of any size. Layers that the base freezes itself stay as they are.

    Source: AdaptSR (arXiv:2503.07748), section 3.

    Args:
        base: The section of the network to adapt: ``type``, and the arguments of that network.
        lora: What to adapt, and how: the arguments of :class:`lora_sr.adapters.LoRAConfig`.

    Returns:
        The network: RGB in [0, 1], (N, 3, H, W) -> (N, 3, scale * H, scale * W), as the base gives it.

    Raises:
        InputError: As LoRAConfig, ``add_lora`` and the base network do.
    """
    arch = find_arch(base['type']) if isinstance(base, dict) and isinstance(base.get('type'), str) else None
    if arch is None:
        raise InputError(f'"base" of AdaptSR has to be the section of a registered network, not {base!r}.')
    if not isinstance(lora, dict):
        raise InputError(f'"lora" of AdaptSR has to be a section, e.g. {{groups: [all], rank: 8}}, not {lora!r}.')
    # Not BasicSR's `build_network`: it logs, and a logger that exists before a run gets no file in it.
    network = arch(**{key: value for key, value in base.items() if key != 'type'})
    config = LoRAConfig.from_dict(lora)
    # What a network freezes itself it also writes itself, as a folded copy of branches: past any update.
    own = [
        re.escape(name) for name in layer_groups(network) if not base_weight(network.get_submodule(name)).requires_grad
    ]
    add_lora(network, replace(config, exclude_modules=[*config.exclude_modules, *own]))
    mark_trainable(network)
    return take_any_size(network)
