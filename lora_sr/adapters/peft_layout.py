"""An adapter in the layout of PEFT, whose updates of a k x k convolution have another form than ours."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_sr.adapters.adapter import Adapter, describe_misfit
from lora_sr.adapters.foreign_files import PEFT_PREFIX
from lora_sr.adapters.layers import join, low_rank_update
from lora_sr.errors import InputError, shown

SHOWN = 3  # of what cannot be written

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# PEFT has no LoRA for transposed convolutions, and counts attention's twice or once, depending on its version.
_KINDS = (*_CONVOLUTIONS, nn.Embedding, nn.Linear)


@torch.no_grad()
def peft_layout(adapter: Adapter, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What stands in PEFT's files for an adapter.

    PEFT's update of a convolution is B * A with ``lora_A`` (r, in, kh, kw) and ``lora_B`` (out, r, 1, 1). Where kh is 1
    and there are no groups, our factors are these, and so are those of linear layers and embeddings. Else, and for
    deltas of weights, the update is factored anew, in float64: exactly, with the least rank that does.

    Args:
        adapter: An adapter that fits the network.
        network: The base; its layers tell what state dicts do not.

    Returns:
        The tensors of ``adapter_model.safetensors`` and the content of ``adapter_config.json``.

    Raises:
        InputError: The adapter does not fit, changes something for which PEFT has no LoRA, which is named, changes
            nothing, or its values are not finite.
    """
    misfit = describe_misfit(adapter, network.state_dict())
    if misfit:
        raise InputError(f'The adapter does not fit {type(network).__name__}: {misfit}.')
    every_name = dict(network.named_modules(remove_duplicate=False))
    modules = dict(network.named_modules())  # PEFT knows a module that stands twice by its first name
    updates: dict[str, Tensor | None] = dict.fromkeys(adapter.layers)
    obstacles = []
    for key, delta in adapter.deltas.items():
        name, _, last = key.rpartition('.')
        if last == 'weight' and isinstance(every_name.get(name), _KINDS):
            updates[name] = delta
        else:
            obstacles.append(f'{shown(key)} is no weight of a layer')
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, update in updates.items():
        if name not in modules and name in every_name:
            continue
        layer = modules[name]
        obstacle = _obstacle(layer)
        if obstacle:
            obstacles.append(f'{shown(name)} {obstacle}')
            continue
        if update is None and _has_our_factors(layer):
            lora_A, lora_B, alpha = adapter.update_of(name)
            down, up, ranks[name], alphas[name] = lora_A, lora_B, adapter.rank_of(name), alpha.item()
        else:
            update = _weight_update(adapter, name, layer) if update is None else update
            _check_finite(name, update)
            down, up = _factored(update, layer)
            ranks[name] = down.shape[0]
            alphas[name] = float(ranks[name])
        _check_finite(name, down, up, torch.tensor(alphas[name]))
        tensors.update(_named(name, layer, down, up))
    if obstacles:
        more = f' and {len(obstacles) - SHOWN} more' if len(obstacles) > SHOWN else ''
        raise InputError(f'PEFT has no LoRA for {len(obstacles)} of its updates: {"; ".join(obstacles[:SHOWN])}{more}.')
    if not tensors:
        raise InputError('There is nothing to write: the adapter changes nothing.')
    return tensors, _config(ranks, alphas)


def _check_finite(name: str, *values: Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise InputError(f'The update of {shown(name)} must be of finite numbers, got others.')


def _obstacle(layer: nn.Module) -> str | None:
    """Why PEFT has no LoRA for a layer that is the same as ours."""
    if type(layer) not in _KINDS:
        return f'is a {type(layer).__name__}'
    if isinstance(layer, _CONVOLUTIONS):
        # PEFT runs the update as a convolution of its own, to which it hands neither on.
        if set(layer.dilation) != {1}:
            return 'is dilated'
        if layer.padding_mode != 'zeros':
            return f'has {layer.padding_mode} padding'
    return None


def _has_our_factors(layer: nn.Module) -> bool:
    if not isinstance(layer, _CONVOLUTIONS):
        return True
    return layer.groups == 1 and (not isinstance(layer, nn.Conv2d) or layer.kernel_size[0] == 1)


def _weight_update(adapter: Adapter, name: str, layer: nn.Module) -> Tensor:
    lora_A, lora_B, alpha = (value.double() for value in adapter.update_of(name))
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return low_rank_update(lora_A, lora_B, alpha / adapter.rank_of(name), weight.shape)


def _factored(update: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """``down`` (r, in * kernel) and ``up`` (out, r / groups) of the least rank whose product is the update.

    Each group has factors of its own; as PEFT's ``down`` reads the channels of all groups, it is zero for the others.
    """
    groups = getattr(layer, 'groups', 1)
    matrices = update.double().reshape(groups, update.shape[0] // groups, -1)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    noise = values[:, :1] * max(matrices.shape[1:]) * torch.finfo(torch.float64).eps
    rank = max(1, int((values > noise).sum(1).max()))
    roots = values[:, :rank].sqrt()
    up = (left[:, :, :rank] * roots[:, None]).reshape(update.shape[0], rank)
    own = roots[:, :, None] * right[:, :rank]  # groups, rank, columns of a group
    down = own.new_zeros(groups, rank, groups, own.shape[2])
    for group in range(groups):
        down[group, :, group] = own[group]
    return down.reshape(groups * rank, -1).float(), up.float()


def _named(name: str, layer: nn.Module, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The two under PEFT's names and in its shapes."""
    if isinstance(layer, nn.Embedding):
        parts = {'lora_embedding_A': up.T, 'lora_embedding_B': down.T}
    else:
        parts = {'lora_A.weight': down, 'lora_B.weight': up}
    if isinstance(layer, _CONVOLUTIONS):
        kernel = layer.kernel_size
        parts['lora_A.weight'] = down.reshape(down.shape[0], layer.in_channels, *kernel)
        parts['lora_B.weight'] = up.reshape(*up.shape, *[1] * len(kernel))
    return {PEFT_PREFIX + join(name, part): value.contiguous() for part, value in parts.items()}


def _config(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """``adapter_config.json``: each layer by its whole name, as PEFT's lists of names take their ends for them."""
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        'peft_type': 'LORA',
        'task_type': None,
        'base_model_name_or_path': None,
        'inference_mode': True,
        'target_modules': '|'.join(map(re.escape, ranks)),
        'r': int(rank),
        'lora_alpha': _whole(alpha),
        'rank_pattern': {f'^{re.escape(name)}': value for name, value in ranks.items() if value != rank},
        'alpha_pattern': {f'^{re.escape(name)}': _whole(value) for name, value in alphas.items() if value != alpha},
        'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': False,
        'use_rslora': False,
        'use_dora': False,
        'modules_to_save': None,
    }


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float:
    return int(value) if math.isfinite(value) and value == int(value) else value
