"""Everything that is done to a network with LoRA, one free function each."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Iterator, TypeVar

import torch
from torch import nn

from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.groups import is_adaptable, layer_groups
from lora_sr.adapters.layers import LORA_LAYERS, POSITION, AdaptedModule, LoRALayer, add_shift
from lora_sr.errors import InputError

Network = TypeVar('Network', bound=nn.Module)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and layer of every layer of ``model`` that carries LoRA, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Likewise for every module that carries an update of any kind: LoRA, or the shift of a parameter."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module


def add_lora(model: Network, config: LoRAConfig) -> Network:
    """Give LoRA to the layers that ``config`` names, in place. The output of the network stays bit-equal.

    ``weight`` of such a layer is then computed at each reading: whoever writes into it writes into a copy.

    Args:
        model: Any network with ``nn.Conv2d`` or ``nn.Linear`` layers.
        config: Which layers, with which rank and alpha.

    Returns:
        ``model`` itself.

    Raises:
        InputError: A pattern matches no module (near names are listed), or none that can carry LoRA (their types are
            named), a group or what trains besides is not there, a rank or alpha is given for a layer that is not
            adapted, layers share a weight, or a layer carries LoRA already. ``model`` is unchanged then.
    """
    modules = dict(model.named_modules())
    modules.pop('')
    for key in ('target_modules', 'exclude_modules', 'rank_pattern', 'alpha_pattern'):
        for pattern in getattr(config, key):
            _check_pattern(key, pattern, modules)
    groups = layer_groups(model)
    for group in config.groups:
        if group != 'all' and group not in groups.values():
            there = ', '.join(dict.fromkeys(groups.values()))
            raise InputError(f'{type(model).__name__} has no layer of the group "{group}"; its groups are {there}.')
    targets = [name for name, group in groups.items() if config.is_target(name, group)]
    if not targets:
        wanted = ' and '.join(
            f'{key} {getattr(config, key)}' for key in ('groups', 'target_modules') if getattr(config, key)
        )
        raise InputError(f'exclude_modules {config.exclude_modules} and ranks of 0 leave nothing of {wanted} to adapt.')
    for name in targets:
        if isinstance(modules[name], LoRALayer):
            raise InputError(f'"{name}" carries LoRA already: merge it, or exclude it.')
    for key in ('rank_pattern', 'alpha_pattern'):
        for pattern in getattr(config, key):
            is_zero = key == 'rank_pattern' and config.rank_pattern[pattern] == 0
            if not is_zero and not any(re.fullmatch(pattern, name) for name in targets):
                raise InputError(f'{key} "{pattern}" matches none of the adapted layers, which are {_some(targets)}.')
    weights = [modules[name].weight for name in targets]
    shared = [name for name, weight in zip(targets, weights) if sum(weight is other for other in weights) > 1]
    if shared:
        raise InputError(f'{_some(shared)} share one weight, which two updates would part: exclude all but one.')
    shifts = _shifts(model, targets, config.also_train)
    replacements = {}
    for name in targets:
        base = modules[name]
        adapted = LORA_LAYERS[type(base)](base, config.rank_of(name), config.alpha_of(name))
        replacements[base] = adapted.train(base.training)
    for module, names in shifts.items():
        add_shift(replacements.get(module, module), names)
    _replace(model, replacements)
    return model


def _shifts(model: nn.Module, targets: list[str], also_train: list[str]) -> dict[nn.Module, tuple[str, ...]]:
    """Which parameters of which modules are to carry a shift.

    Raises:
        InputError: There is nothing of a kind that is to train.
    """
    found: dict[str, dict[nn.Module, tuple[str, ...]]] = {kind: {} for kind in also_train}
    for name, module in model.named_modules():
        own = tuple(key for key, value in module._parameters.items() if value is not None)
        if name in targets:
            kind, names = 'bias', tuple(key for key in own if key == 'bias')
        elif 'norm' in type(module).__name__.lower():
            kind, names = 'norm', own
        else:
            kind, names = 'position', tuple(key for key in own if POSITION.search(key))
        if names and kind in found:
            found[kind][module] = names
    for kind, shifts in found.items():
        if not shifts:
            raise InputError(f'also_train of LoRA has "{kind}", but {type(model).__name__} has nothing of that kind.')
    return {module: names for shifts in found.values() for module, names in shifts.items()}


def mark_trainable(model: nn.Module) -> None:
    """Let the updates train, i.e. the LoRA tensors and the shifts beside them, and freeze everything else.

    That includes the statistics that ``BatchNorm`` and ``spectral_norm`` keep: such layers compute as in eval mode also
    while the network trains, until the updates are merged or removed.

    Raises:
        InputError: No layer carries LoRA.
    """
    if not any(True for _ in lora_layers(model)):
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: call add_lora first.')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_update(name))
    for module in model.modules():
        if _keeps_statistics(module) and _compute_as_in_eval not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_compute_as_in_eval, prepend=True)  # before spectral_norm's own


def _keeps_statistics(module: nn.Module) -> bool:
    # `spectral_norm` puts its vectors into the layer, or into a parametrisation of it.
    return isinstance(module, nn.modules.batchnorm._NormBase) or hasattr(module, 'weight_u') or hasattr(module, '_u')


def _compute_as_in_eval(module: nn.Module, inputs: tuple) -> None:
    module.training = False


def _let_statistics_move(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _compute_as_in_eval:
                del module._forward_pre_hooks[key]
                module.training = model.training


def _is_update(name: str) -> bool:
    return name.rsplit('.', 1)[-1].startswith('lora_')


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: all of them, those that train, those of LoRA and of the shifts beside it."""

    total: int
    trainable: int
    lora: int

    @property
    def trainable_share(self) -> float:
        """Share of the parameters that train, 0 to 1."""
        return self.trainable / self.total if self.total else 0.0


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a network. LoRA tensors are part of the total."""
    parameters = list(model.named_parameters())
    return ParameterCount(
        total=sum(value.numel() for _, value in parameters),
        trainable=sum(value.numel() for _, value in parameters if value.requires_grad),
        lora=sum(value.numel() for name, value in parameters if _is_update(name)),
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
    modules = dict(adapted_modules(model)).values()
    if not modules:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: there is nothing to merge.')
    for module in modules:
        base = {name: value for name, value in module._parameters.items() if not _is_update(name)}
        merged = {name: getattr(module, name) for name in base}  # base plus update, where there is one
        module.drop_update()
        for name, value in merged.items():
            if value is not base[name]:
                module._parameters[name] = nn.Parameter(value, requires_grad=base[name].requires_grad)
    _let_statistics_move(model)
    return model


def remove_lora(model: Network) -> Network:
    """Drop every update, in place: the base network again, with its plain layers. Returns ``model`` itself."""
    for _, module in adapted_modules(model):
        module.drop_update()
    _let_statistics_move(model)
    return model


def set_lora_scale(model: nn.Module, scale: float) -> None:
    """Set the strength of every update at run time: 0 is the base network, 1 the adapted one, more exaggerates.

    Raises:
        InputError: No layer carries LoRA.
    """
    modules = dict(adapted_modules(model)).values()
    if not modules:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: there is nothing to scale.')
    for module in modules:
        module.lora_scale = float(scale)


def _check_pattern(key: str, pattern: str, modules: dict[str, nn.Module]) -> None:
    """Raise InputError unless ``pattern`` matches the name of a module that can carry LoRA."""
    matches = [name for name in modules if re.fullmatch(pattern, name)]
    adaptable = [name for name, module in modules.items() if is_adaptable(module)]
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


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, also where one module stands under several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, replacements[module])
