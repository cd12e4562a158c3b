"""LoRA in state dicts: which tensors it is, what configuration they tell, and merging without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.layers import DELTA_PREFIX, LORA_TENSORS, join, low_rank_update, rows_of_unit, weight_key
from lora_sr.adapters.verbs import adapted_modules, lora_layers
from lora_sr.errors import InputError, shown

LONGEST_NAME = 512  # letters of the name of a tensor


def is_lora_key(key: str) -> bool:
    """Whether a state dict's key names a tensor of LoRA, or the delta of a parameter beside it."""
    return key.rpartition('.')[2] in LORA_TENSORS or is_delta_key(key)


def only_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA tensors and the deltas of a state dict."""
    return {key: value for key, value in state.items() if is_lora_key(key)}


def without_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without its LoRA tensors and deltas."""
    return {key: value for key, value in state.items() if not is_lora_key(key)}


def is_delta_key(key: str) -> bool:
    """Whether a state dict's key names the delta of a parameter."""
    return key.rpartition('.')[2].startswith(DELTA_PREFIX)


def key_of_base(delta: str) -> str:
    """The key of the parameter that a delta is added to."""
    name, _, last = delta.rpartition('.')
    return join(name, last[len(DELTA_PREFIX) :])


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA tensors and the deltas of ``model`` alone, under their names in its state dict."""
    return only_lora(model.state_dict())


def describe_lora(model: nn.Module) -> LoRAConfig:
    """The configuration that gives the base of ``model`` the same updates: an exact name for each.

    Raises:
        InputError: No layer carries LoRA.
    """
    if not any(True for _ in adapted_modules(model)):
        raise InputError(f'No layer of {type(model).__name__} carries LoRA.')
    layers = {name: (layer.rank, layer.lora_alpha.item()) for name, layer in lora_layers(model)}
    return exact_config(layers, lora_state_dict(model))


def infer_lora_config(state: Mapping[str, Tensor]) -> LoRAConfig:
    """The configuration of an adapted state dict: ranks from shapes, alphas from ``lora_alpha``, deltas from keys.

    Raises:
        InputError: There are no LoRA tensors, or a layer lacks some of its tensors.
    """
    _check_adapted(state)
    _check_deltas(state)
    layers = _layers_with_lora(state)
    ranks_and_alphas = {name: (rank, state[join(name, 'lora_alpha')].item()) for name, rank in layers.items()}
    return exact_config(ranks_and_alphas, state)


def _check_adapted(state: Mapping[str, Tensor]) -> None:
    if not any(map(is_lora_key, state)):
        raise InputError('no layer carries LoRA')


def _layers_with_lora(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> rank of every layer with LoRA in an adapted state dict."""
    ranks = {}
    for name in dict.fromkeys(key.rpartition('.')[0] for key in state if key.rpartition('.')[2] in LORA_TENSORS):
        keys = [*(join(name, tensor) for tensor in LORA_TENSORS), weight_key(name, state)]
        missing = [key.rpartition('.')[2] for key in keys if key not in state]
        if missing:
            raise InputError(f'the layer "{shown(name)}" carries LoRA but lacks {" and ".join(missing)}')
        lora_A, lora_B, alpha, weight = (state[key] for key in keys)
        # Of a kernel for each channel by itself `lora_B` has a row for each; no other has, but where kernels are 1 x 1.
        is_flat = weight.ndim == 4 and weight.shape[1] == 1 and lora_B.shape[:1] == weight.shape[:1]
        unit = 1 if is_flat else rows_of_unit(weight.shape)
        if not (
            lora_A.ndim == lora_B.ndim == 2
            and weight.ndim > 1
            and alpha.numel() == 1
            and 0 < unit <= lora_A.shape[0] == lora_B.shape[1]
            and lora_A.shape[0] % unit == 0
            and lora_B.shape[0] * lora_A.shape[1] == weight.numel()
        ):
            raise InputError(
                f'the LoRA of "{shown(name)}" is damaged: lora_A {tuple(lora_A.shape)} and lora_B '
                f'{tuple(lora_B.shape)} make no update of a weight {tuple(weight.shape)}'
            )
        if not weight.is_floating_point() or lora_A.dtype != lora_B.dtype or not lora_A.is_floating_point():
            raise InputError(
                f'the LoRA of "{shown(name)}" must be of floating-point numbers as its weight is, got {lora_A.dtype} '
                f'and {lora_B.dtype} beside {weight.dtype}'
            )
        ranks[name] = lora_A.shape[0] // unit
    return ranks


def _check_deltas(state: Mapping[str, Tensor]) -> None:
    """Raise InputError for a delta without its base, or of another shape or type than an update of it."""
    for key, delta in state.items():
        if not is_delta_key(key):
            continue
        base = None if is_lora_key(key_of_base(key)) else state.get(key_of_base(key))
        if base is None:
            raise InputError(f'{shown(key)} is the delta of {shown(key_of_base(key))}, which is not there')
        if base.shape != delta.shape or not delta.is_floating_point():
            raise InputError(
                f'{shown(key)} must be floating-point numbers of shape {tuple(base.shape)}, got {delta.dtype} of '
                f'{tuple(delta.shape)}'
            )


def merge_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapted state dict with every update added to its weight: the base's keys, as :func:`merge_lora` gives them.

    It needs no network, so it serves any that has layers with LoRA. Entries that are one tensor stay one, and those
    that nothing updates are the very tensors of ``state``.

    Raises:
        InputError: There are no LoRA tensors, a layer lacks some of its tensors, or of entries that are one tensor
            some are updated and others are not, or otherwise.
    """
    _check_adapted(state)
    _check_deltas(state)
    merged = without_lora(state)
    ties = _tied_keys(merged)
    updates: dict[str, tuple[Tensor, ...]] = {}
    for name, rank in _layers_with_lora(state).items():
        key = weight_key(name, state)
        lora_A, lora_B, alpha = updates[key] = tuple(state[join(name, tensor)] for tensor in LORA_TENSORS)
        merged[key] = state[key] + low_rank_update(lora_A, lora_B, alpha * (1.0 / rank), state[key].shape)
    for key, delta in state.items():
        if is_delta_key(key):
            updates[key_of_base(key)] = (delta,)
            merged[key_of_base(key)] = merged[key_of_base(key)] + delta
    for keys in ties:
        first, *others = (updates.get(key, ()) for key in keys)
        if not all(len(other) == len(first) and all(map(torch.equal, other, first)) for other in others):
            names = ' and '.join(map(shown, keys[:3])) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
            raise InputError(f'{names} are one tensor, but are not updated alike')
        if first:
            merged.update(dict.fromkeys(keys, merged[keys[0]]))
    return merged


def _tied_keys(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The keys of every tensor that has several, as in the state dict of a network with tied weights."""
    places: dict[tuple[object, ...], list[str]] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.data_ptr():  # a tensor on the device meta has none
            places.setdefault((value.device, value.data_ptr(), value.shape, value.stride()), []).append(key)
    return [keys for keys in places.values() if len(keys) > 1]


def exact_config(layers: Mapping[str, tuple[int, float]], state: Mapping[str, Tensor]) -> LoRAConfig:
    """A configuration that names each layer; what most of them have is the rule, the rest are exceptions.

    Args:
        layers: Name -> rank and alpha of every layer with LoRA.
        state: A state dict with the deltas, whose parameters are named likewise.
    """
    target_parameters = sorted(re.escape(key_of_base(key)) for key in state if is_delta_key(key))
    if not layers:
        return LoRAConfig(target_parameters=target_parameters)
    ranks = {re.escape(name): rank for name, (rank, _) in layers.items()}
    alphas = {re.escape(name): alpha for name, (_, alpha) in layers.items()}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    return LoRAConfig(
        target_modules=list(ranks),
        rank=rank,
        alpha=alpha,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        target_parameters=target_parameters,
    )
