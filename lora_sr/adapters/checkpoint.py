"""LoRA in state dicts: which tensors it is, what configuration they tell, and merging without a network."""

from __future__ import annotations

import re

from torch import Tensor, nn

from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.layers import LORA_TENSORS, SHIFT_PREFIX, kind_of_shift, low_rank_update
from lora_sr.adapters.verbs import lora_layers
from lora_sr.errors import InputError


def is_lora_key(key: str) -> bool:
    """Whether a state dict's key names a tensor of LoRA, or the shift of a parameter beside it."""
    name = key.rsplit('.', 1)[-1]
    return name in LORA_TENSORS or name.startswith(SHIFT_PREFIX)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA tensors of ``model`` alone, under their names in its state dict."""
    return {key: value for key, value in model.state_dict().items() if is_lora_key(key)}


def describe_lora(model: nn.Module) -> LoRAConfig:
    """The configuration that gives the base of ``model`` the same LoRA layers: one exact name a layer.

    Raises:
        InputError: No layer carries LoRA.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA.')
    ranks_and_alphas = {name: (layer.rank, layer.lora_alpha.item()) for name, layer in layers.items()}
    return exact_config(ranks_and_alphas, lora_state_dict(model))


def infer_lora_config(state: dict[str, Tensor]) -> LoRAConfig:
    """The configuration of the LoRA layers in an adapted state dict: ranks from shapes, alphas from ``lora_alpha``.

    Raises:
        InputError: There are no LoRA tensors, or a layer lacks some of its tensors.
    """
    return exact_config(_lora_of_layers(state), state)


def _lora_of_layers(state: dict[str, Tensor]) -> dict[str, tuple[int, float]]:
    """Name -> rank and alpha of every layer with LoRA in an adapted state dict."""
    layers = {}
    for name in dict.fromkeys(key.rpartition('.')[0] for key in state if key.rsplit('.', 1)[-1] in LORA_TENSORS):
        missing = [tensor for tensor in (*LORA_TENSORS, 'weight') if f'{name}.{tensor}' not in state]
        if missing:
            raise InputError(f'the layer "{name}" carries LoRA but lacks {" and ".join(missing)}')
        weight = state[f'{name}.weight']
        kernel_height = weight.shape[2] if weight.ndim == 4 else 1
        layers[name] = state[f'{name}.lora_A'].shape[0] // kernel_height, state[f'{name}.lora_alpha'].item()
    if not layers:
        raise InputError('no layer carries LoRA')
    return layers


def merge_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapted state dict with every update added to its weight: the base's keys, as :func:`merge_lora` gives them.

    It needs no network, so it serves any that has layers with LoRA.

    Raises:
        InputError: There are no LoRA tensors, or a layer lacks some of its tensors.
    """
    merged = {key: value for key, value in state.items() if not is_lora_key(key)}
    for name, (rank, _) in _lora_of_layers(state).items():
        lora_A, lora_B, alpha, weight = (state[f'{name}.{tensor}'] for tensor in (*LORA_TENSORS, 'weight'))
        merged[f'{name}.weight'] = weight + low_rank_update(lora_A, lora_B, alpha * (1.0 / rank), weight.shape)
    for key in state:
        path, dot, last = key.rpartition('.')
        if last.startswith(SHIFT_PREFIX):
            shifted = f'{path}{dot}{last[len(SHIFT_PREFIX) :]}'
            merged[shifted] = merged[shifted] + state[key]
    return merged


def _kinds_of_shifts(state: dict[str, Tensor]) -> list[str]:
    """What ``also_train`` was, from the keys of the shifts."""
    kinds = set()
    for key in state:
        name, _, last = key.rpartition('.')
        if last.startswith(SHIFT_PREFIX):
            kinds.add(kind_of_shift(last[len(SHIFT_PREFIX) :], has_lora=f'{name}.lora_A' in state))
    return sorted(kinds)


def exact_config(layers: dict[str, tuple[int, float]], state: dict[str, Tensor]) -> LoRAConfig:
    """A configuration that names each layer; what most of them have is the rule, the rest are exceptions.

    Args:
        layers: Name -> rank and alpha of every layer with LoRA.
        state: A state dict with its tensors; which parameters carry shifts is read from its keys.
    """
    layers = {re.escape(name): values for name, values in layers.items()}
    ranks, alphas = ([values[i] for values in layers.values()] for i in (0, 1))
    rank, alpha = max(ranks, key=ranks.count), max(alphas, key=alphas.count)
    return LoRAConfig(
        target_modules=list(layers),
        rank=rank,
        alpha=alpha,
        rank_pattern={name: r for name, (r, _) in layers.items() if r != rank},
        alpha_pattern={name: a for name, (_, a) in layers.items() if a != alpha},
        also_train=_kinds_of_shifts(state),
    )
