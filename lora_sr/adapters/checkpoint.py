"""The adapter alone: LoRA tensors in a safetensors file, with their configuration as metadata."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.layers import LORA_TENSORS, SHIFT_PREFIX, low_rank_update
from lora_sr.adapters.verbs import add_lora, lora_layers, remove_lora
from lora_sr.errors import InputError

CONFIG_KEY = 'lora_config'


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
    also_train = _kinds_of_shifts(lora_state_dict(model))
    return _exact_config({name: (layer.rank, layer.lora_alpha.item()) for name, layer in layers.items()}, also_train)


def infer_lora_config(state: dict[str, Tensor]) -> LoRAConfig:
    """The configuration of the LoRA layers in an adapted state dict: ranks from shapes, alphas from ``lora_alpha``.

    Raises:
        InputError: There are no LoRA tensors, or a layer lacks some of its tensors.
    """
    return _exact_config(_lora_of_layers(state), _kinds_of_shifts(state))


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
        if last == f'{SHIFT_PREFIX}bias' and f'{name}.lora_A' in state:
            kinds.add('bias')
        elif last in (f'{SHIFT_PREFIX}weight', f'{SHIFT_PREFIX}bias'):
            kinds.add('norm')
        elif last.startswith(SHIFT_PREFIX):
            kinds.add('position')
    return sorted(kinds)


def _exact_config(layers: dict[str, tuple[int, float]], also_train: list[str]) -> LoRAConfig:
    """A configuration for layers of given names, ranks and alphas; what most have is the rule, the rest exceptions."""
    layers = {re.escape(name): values for name, values in layers.items()}
    ranks, alphas = ([values[i] for values in layers.values()] for i in (0, 1))
    rank, alpha = max(ranks, key=ranks.count), max(alphas, key=alphas.count)
    return LoRAConfig(
        target_modules=list(layers),
        rank=rank,
        alpha=alpha,
        rank_pattern={name: r for name, (r, _) in layers.items() if r != rank},
        alpha_pattern={name: a for name, (_, a) in layers.items() if a != alpha},
        also_train=also_train,
    )


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the LoRA tensors of ``model`` and their configuration to ``path``, a ``.safetensors`` file.

    Raises:
        InputError: No layer carries LoRA, or ``path`` has another suffix.
    """
    if Path(path).suffix != '.safetensors':
        raise InputError(f'An adapter is a .safetensors file, but the path is {path}.')
    metadata = {CONFIG_KEY: describe_lora(model).to_json()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in lora_state_dict(model).items()}
    Path(path).write_bytes(save(tensors, metadata=metadata))


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Load an adapter file into ``model``: into its LoRA layers, or, where it has none, after adding them.

    Raises:
        InputError: The file is missing or is no adapter, or it does not fit: the layers that differ are named. Then
            ``model`` is unchanged.
    """
    config, tensors = read_adapter(path)
    was_adapted = any(True for _ in lora_layers(model))
    if not was_adapted:
        add_lora(model, config)
    own = lora_state_dict(model)
    differing = sorted(
        key
        for key in own.keys() | tensors.keys()
        if key not in own or key not in tensors or own[key].shape != tensors[key].shape
    )
    if differing:
        if not was_adapted:
            remove_lora(model)
        listed = ', '.join(
            f'{key} ({_shape(own, key)} here, {_shape(tensors, key)} in the file)' for key in differing[:3]
        )
        raise InputError(
            f'The adapter {path} does not fit {type(model).__name__}: {len(differing)} tensors differ, e.g. {listed}.'
        )
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)


def read_adapter(path: str | os.PathLike) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Configuration and tensors of an adapter file.

    Raises:
        InputError: The file is missing, cannot be read, or holds no adapter.
    """
    if not Path(path).is_file():
        raise InputError(f'There is no adapter file {path}.')
    try:
        with safe_open(os.fspath(path), framework='pt') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f'{path} cannot be read as a safetensors file: {error}.') from None
    if CONFIG_KEY not in metadata or not all(map(is_lora_key, tensors)):
        raise InputError(f'{path} holds no adapter: its metadata lacks "{CONFIG_KEY}", or it has other tensors too.')
    return LoRAConfig.from_json(metadata[CONFIG_KEY]), tensors


def _shape(tensors: dict[str, Tensor], key: str) -> str:
    return 'x'.join(map(str, tensors[key].shape)) or 'scalar' if key in tensors else 'absent'
