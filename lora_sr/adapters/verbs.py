"""Everything that is done to a network with LoRA, one free function each."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Iterator, TypeVar

import torch
from torch import nn

from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.layers import LORA_LAYERS, LoRALayer
from lora_sr.errors import InputError

Network = TypeVar('Network', bound=nn.Module)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and layer of every layer of ``model`` that carries LoRA, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def add_lora(model: Network, config: LoRAConfig) -> Network:
    """Give LoRA to the layers that ``config`` names, in place. The output of the network stays bit-equal.

    Args:
        model: Any network with ``nn.Conv2d`` or ``nn.Linear`` layers.
        config: Which layers, with which rank and alpha.

    Returns:
        ``model`` itself.

    Raises:
        InputError: A pattern matches no module (near names are listed), or none that can carry LoRA (their types are
            named), a rank or alpha is given for a layer that is not adapted, or a layer carries LoRA already. ``model``
            is unchanged then.
    """
    modules = dict(model.named_modules())
    modules.pop('')
    for key in ('target_modules', 'exclude_modules', 'rank_pattern', 'alpha_pattern'):
        for pattern in getattr(config, key):
            _check_pattern(key, pattern, modules)
    targets = [name for name, module in modules.items() if config.is_target(name) and _is_adaptable(module)]
    if not targets:
        raise InputError(
            f'exclude_modules {config.exclude_modules} leaves nothing of target_modules '
            f'{config.target_modules} to adapt.'
        )
    for name in targets:
        if isinstance(modules[name], LoRALayer):
            raise InputError(f'"{name}" carries LoRA already: merge it, or exclude it.')
    for key in ('rank_pattern', 'alpha_pattern'):
        for pattern in getattr(config, key):
            if not any(re.fullmatch(pattern, name) for name in targets):
                raise InputError(f'{key} "{pattern}" matches none of the adapted layers, which are {_some(targets)}.')
    replacements = {}
    for name in targets:
        base = modules[name]
        adapted = LORA_LAYERS[type(base)](base, config.rank_of(name), config.alpha_of(name))
        replacements[base] = adapted.train(base.training)
    _replace(model, replacements)
    return model


def mark_trainable(model: nn.Module, bias: str = 'none') -> None:
    """Let the LoRA tensors train, and freeze everything else.

    Args:
        model: A network with LoRA.
        bias: Biases that train besides: 'none', 'lora' (those of the adapted layers) or 'all'.

    Raises:
        InputError: No layer carries LoRA, or ``bias`` is another word.
    """
    if bias not in ('none', 'lora', 'all'):
        raise InputError(f'bias is "{bias}": it must be "none", "lora" or "all".')
    layers = list(lora_layers(model))
    if not layers:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: call add_lora first.')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bias == 'all' and name.rsplit('.', 1)[-1] == 'bias')
    for _, layer in layers:
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        if bias == 'lora' and layer.bias is not None:
            layer.bias.requires_grad_(True)


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: all of them, those that train, those of LoRA."""

    total: int
    trainable: int
    lora: int

    @property
    def trainable_share(self) -> float:
        """Share of the parameters that train, 0 to 1."""
        return self.trainable / self.total if self.total else 0.0


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a network. LoRA tensors are part of the total."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(
        total=sum(size for size, _ in sizes),
        trainable=sum(size for size, trains in sizes if trains),
        lora=sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in lora_layers(model)),
    )


@torch.no_grad()
def merge_lora(model: Network) -> Network:
    """Add every update to its weight, at the present scale, and put the plain layers back, in place.

    The merged weight is the very tensor that the adapted layer computes at each forward, so the outputs are equal to
    the bit. The result has the base network's layers and parameter names; what was frozen stays frozen.

    Returns:
        ``model`` itself.

    Raises:
        InputError: No layer carries LoRA.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: there is nothing to merge.')
    replacements = {}
    for _, layer in layers:
        merged = layer.to_base()
        merged.weight = nn.Parameter(layer.adapted_weight(), requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            merged.bias = nn.Parameter(layer.bias.clone(), requires_grad=layer.bias.requires_grad)
        replacements[layer] = merged.train(layer.training)
    _replace(model, replacements)
    return model


def remove_lora(model: Network) -> Network:
    """Drop every update and put the plain layers back, in place: the base network again. Returns ``model`` itself."""
    _replace(model, {layer: layer.to_base().train(layer.training) for _, layer in lora_layers(model)})
    return model


def set_lora_scale(model: nn.Module, scale: float) -> None:
    """Set the strength of every update at run time: 0 is the base network, 1 the adapted one, more exaggerates.

    Raises:
        InputError: No layer carries LoRA.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: there is nothing to scale.')
    for _, layer in layers:
        layer.lora_scale = float(scale)


def _check_pattern(key: str, pattern: str, modules: dict[str, nn.Module]) -> None:
    """Raise InputError unless ``pattern`` matches the name of a module that can carry LoRA."""
    matches = [name for name in modules if re.fullmatch(pattern, name)]
    adaptable = [name for name, module in modules.items() if _is_adaptable(module)]
    if set(matches) & set(adaptable):
        return
    kinds = ', '.join(sorted(layer.__name__ for layer in LORA_LAYERS))
    if matches:
        inside = [name for name in adaptable if name.startswith(f'{matches[0]}.')]
        hint = f'; inside it are {_some(inside)}' if inside else ''
        raise InputError(
            f'{key} "{pattern}" matches "{matches[0]}", a {type(modules[matches[0]]).__name__}, which '
            f'cannot carry LoRA ({kinds} can){hint}.'
        )
    near = difflib.get_close_matches(pattern.replace('\\', ''), adaptable, n=4, cutoff=0.3) or adaptable
    raise InputError(f'{key} "{pattern}" matches no module (the whole name must match); near names are {_some(near)}.')


def _some(names: list[str]) -> str:
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def _is_adaptable(module: nn.Module) -> bool:
    """Whether a module carries LoRA or can. A weight that is computed (``weight_norm``) cannot be adapted."""
    return isinstance(module, LoRALayer) or (type(module) in LORA_LAYERS and 'weight' in module._parameters)


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, also where one module stands under several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, replacements[module])
