"""Everything that is done to a network with LoRA, one free function each."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.groups import layer_groups
from lora_sr.adapters.layers import (
    DELTA_PREFIX,
    LORA_LAYERS,
    AdaptedModule,
    LoRALayer,
    base_class_of,
    carries_delta,
    delta_kind,
    give_deltas,
    give_lora,
    is_adaptable,
    is_depthwise,
    join,
    matrix_shape,
    rows_of_unit,
    weight_name,
)
from lora_sr.adapters.patterns import matches_any
from lora_sr.errors import InputError

LARGEST_EXCESS = 8  # times the full rank: the usual rank of 8 goes onto any layer

Network = TypeVar('Network', bound=nn.Module)

Place = tuple[nn.Module, str]  # a module, and the name of a parameter of its own

logger = logging.getLogger('lora_sr')


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and layer of every layer of ``model`` that carries LoRA, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Likewise for every module that carries an update of any kind: LoRA, or the delta of a parameter."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedModule):
            yield name, module


def add_lora(model: Network, config: LoRAConfig) -> Network:
    """Give LoRA to the layers that ``config`` names, in place. The output of the network stays bit-equal.

    ``weight`` of such a layer is then computed at each reading: whoever writes into it writes into a copy. Layers that
    share a weight share its update. What :func:`left_alone` finds is logged, and so are ranks beyond a full one.

    Args:
        model: Any network with layers that can carry LoRA: convolutions, also transposed ones, of 1, 2 or 3 dimensions,
            ``nn.Linear``, ``nn.Embedding`` and ``nn.MultiheadAttention``.
        config: Which layers, with which rank and alpha.

    Returns:
        ``model`` itself.

    Raises:
        InputError: A pattern matches no module (near names are listed), or none that can carry LoRA (their types are
            named), a group or what trains besides is not there, a rank or alpha is given for a layer that is not
            adapted, the ranks are many times the full rank of every layer, modules share a tensor that they would not
            update alike, or a layer carries LoRA already. ``model`` is unchanged then.
    """
    targets, depthwise = _targets(model, config)
    _check_ranks(targets, config)
    _attach(model, config, targets, depthwise)
    rest = left_alone(model)
    if rest:
        logger.info(
            'Left alone, since neither LoRA nor a delta can be given to it: %s.',
            ', '.join(f'{name or "the network itself"} ({kind}, {count:,} parameters)' for name, kind, count in rest),
        )
    return model


def attach_updates(model: nn.Module, config: LoRAConfig) -> None:
    """:func:`add_lora` for what has been trained or mixed: of any rank, and without a word on what is left alone."""
    _attach(model, config, *_targets(model, config))


def _check_ranks(targets: dict[str, nn.Module], config: LoRAConfig) -> None:
    """Tell where a rank is larger than any update needs, and raise InputError if it is so many times everywhere."""
    beyond = {}
    for name, layer in targets.items():
        weight = _weight(layer)
        groups = getattr(layer, 'groups', 1)
        full = -(-min(matrix_shape(weight.shape, groups)) // rows_of_unit(weight.shape, groups))
        if config.rank_of(name) > full:
            beyond[name] = full
    if not beyond:
        return
    name = max(beyond, key=beyond.__getitem__)
    if len(beyond) == len(targets) and config.rank_of(name) > LARGEST_EXCESS * beyond[name]:
        raise InputError(
            f'LoRA rank must be at most {LARGEST_EXCESS * beyond[name]}, {LARGEST_EXCESS} times the full rank of '
            f'{name}, got {config.rank_of(name)}.'
        )
    logger.info(
        'The rank exceeds the full rank of %d of %d layers: in %s it is %d, where %d reaches every update.',
        *(len(beyond), len(targets), name, config.rank_of(name), beyond[name]),
    )


def _attach(model: nn.Module, config: LoRAConfig, targets: dict[str, nn.Module], depthwise: set[nn.Module]) -> None:
    deltas = _deltas(model, config, set(targets.values()), depthwise)
    planned: dict[Place, Hashable] = {place: 'delta' for place in deltas}
    for name, layer in targets.items():
        shape = matrix_shape(_weight(layer).shape, getattr(layer, 'groups', 1))
        planned[layer, weight_name(layer)] = config.rank_of(name), config.alpha_of(name), shape
    _check_ties(model, planned)

    adapted: dict[nn.Parameter, LoRALayer] = {}  # by weight
    for name, layer in targets.items():
        weight = _weight(layer)
        adapted[weight] = give_lora(layer, config.rank_of(name), config.alpha_of(name), adapted.get(weight))
    values = {value: nn.Parameter(torch.zeros_like(value)) for value in deltas.values()}
    for module in dict.fromkeys(module for module, _ in deltas):
        give_deltas(module, {key: values[value] for (owner, key), value in deltas.items() if owner is module})


def _weight(layer: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, layer._parameters[weight_name(layer)])


def _targets(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], set[nn.Module]]:
    """The layers that are to receive LoRA, by name, and the depth-wise ones that are to receive a delta instead.

    Raises:
        InputError: As :func:`add_lora` does, for modules.
    """
    # Under all names: a configuration read from a state dict names a module that has several by each of them.
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop('')
    adaptable = [name for name, module in modules.items() if is_adaptable(module)]
    for key in ('target_modules', 'exclude_modules', 'rank_pattern', 'alpha_pattern'):
        for pattern in getattr(config, key):
            _check_pattern(key, pattern, modules, adaptable, config)
    groups = layer_groups(model)
    for group in config.groups:
        if group != 'all' and group not in groups.values():
            there = ', '.join(dict.fromkeys(groups.values()))
            raise InputError(f'{type(model).__name__} has no layer of the group "{group}"; its groups are {there}.')
    targets = {name: modules[name] for name, group in groups.items() if config.is_target(name, group)}
    for name, layer in targets.items():
        if isinstance(layer, AdaptedModule):
            raise InputError(f'"{name}" carries LoRA already: merge it, or exclude it.')
    depthwise = {
        modules[name]
        for name in groups
        if 'depthwise' in config.also_train and is_depthwise(modules[name]) and not config.is_excluded(name)
        if not isinstance(modules[name], LoRALayer)
    }
    targets = {name: layer for name, layer in targets.items() if layer not in depthwise}
    if not targets and not depthwise and not config.target_parameters:
        wanted = ' and '.join(
            f'{key} {getattr(config, key)}' for key in ('groups', 'target_modules') if getattr(config, key)
        )
        raise InputError(f'exclude_modules {config.exclude_modules} and ranks of 0 leave nothing of {wanted} to adapt.')
    chosen = set(targets.values())
    adapted = {name for name, module in modules.items() if module in chosen}
    for key in ('rank_pattern', 'alpha_pattern'):
        for pattern in getattr(config, key):
            is_zero = key == 'rank_pattern' and config.rank_pattern[pattern] == 0
            if not is_zero and not matches_any(pattern, adapted):
                raise InputError(
                    f'{key} "{pattern}" matches none of the adapted layers, which are {_some(list(targets))}.'
                )
    return targets, depthwise


def _deltas(
    model: nn.Module, config: LoRAConfig, targets: set[nn.Module], depthwise: set[nn.Module]
) -> dict[Place, nn.Parameter]:
    """The parameters that are to carry a delta.

    Raises:
        InputError: There is nothing of a kind that is to train, a pattern matches no parameter that can carry a delta,
            or a parameter carries one already.
    """
    found: dict[Place, nn.Parameter] = {}
    kinds: set[str | None] = set()
    matched: set[str] = set()
    possible: list[str] = []
    is_frozen = not any(value.requires_grad for name, value in model.named_parameters() if not _is_update(name))
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in _own_parameters(module):
            kind, full = delta_kind(module, key), join(name, key)
            applies = {
                'bias': module in targets or module in depthwise,
                'depthwise': module in depthwise,
                'parameters': not config.is_excluded(name) and (value.requires_grad or is_frozen),
            }
            is_wanted = kind in config.also_train and applies.get(kind, True)
            has_lora = (module in targets or isinstance(module, LoRALayer)) and key == weight_name(module)
            if (kind is not None or is_adaptable(module)) and not has_lora:
                possible.append(full)
                patterns = config.parameters_of(full)
                matched.update(patterns)
                is_wanted = is_wanted or bool(patterns)
            if is_wanted and carries_delta(module, key):
                raise InputError(f'"{full}" carries a delta already: merge it first.')
            if is_wanted:
                found[module, key] = value
                kinds.add(kind)
    for kind in config.also_train:
        if kind not in kinds:
            raise InputError(f'also_train of LoRA has "{kind}", but {type(model).__name__} has nothing of that kind.')
    for pattern in config.target_parameters:
        if pattern not in matched:
            near = difflib.get_close_matches(pattern.replace('\\', ''), possible, n=4, cutoff=0.3) or possible
            raise InputError(
                f'target_parameters "{pattern}" matches no parameter that can carry a delta; near names are '
                f'{_some(near)}.'
            )
    return found


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of the parameters of a module itself, as the base has them."""
    for key, value in module._parameters.items():
        if value is not None and not _is_update(key):
            yield key, value


def _check_ties(model: nn.Module, planned: dict[Place, Hashable]) -> None:
    """Raise InputError where modules share a parameter and would not update it alike, so that merging would part it.

    Args:
        model: The network.
        planned: What a parameter of a module is to receive, besides the updates that are there.
    """
    places: dict[nn.Parameter, list[tuple[str, Hashable]]] = {}
    for name, module in model.named_modules():
        for key, value in _own_parameters(module):
            update = planned.get((module, key)) or _update_of(module, key)
            places.setdefault(value, []).append((join(name, key), update))
    for shared in places.values():
        if len({update for _, update in shared}) > 1:
            names = [name for name, _ in shared]
            raise InputError(
                f'{" and ".join(names)} are one tensor, which must be updated alike under every name: exclude all of '
                'them, or give all of them the same rank and alpha.'
            )


def _update_of(module: nn.Module, key: str) -> Hashable:
    """The tensors that update a parameter of a module, and their strength; None if nothing does."""
    if isinstance(module, AdaptedModule) and carries_delta(module, key):
        return module._parameters[DELTA_PREFIX + key], module.lora_scale
    if isinstance(module, LoRALayer) and key == module.weight_name:
        return module.lora_A, module.lora_B, module.lora_scale
    return None


class LeftAlone(NamedTuple):
    """A module that LoRA does not reach: its name, its type, and the number of its parameters."""

    name: str
    kind: str
    parameters: int


def left_alone(model: nn.Module) -> list[LeftAlone]:
    """The modules of a network whose parameters carry no update and, by their kind, can carry neither LoRA nor a delta.

    E.g. recurrent layers, subclasses of layers, and layers whose weight is computed (``weight_norm``).
    """
    found: dict[str, LeftAlone] = {}
    seen = set()
    for name, module in model.named_modules():
        is_layer = base_class_of(module) in LORA_LAYERS
        is_reached = is_layer and (is_adaptable(module) or carries_delta(module, weight_name(module)))
        count = 0
        for key, value in _own_parameters(module):
            is_alone = (
                not is_reached and not carries_delta(module, key) and (is_layer or delta_kind(module, key) is None)
            )
            if is_alone and value not in seen:
                count += value.numel()
            seen.add(value)
        if count:
            # What `parametrize` puts below a layer is the layer's own.
            layer = name.partition('.parametrizations.')[0]
            before = found[layer].parameters if layer in found else 0
            found[layer] = LeftAlone(layer, base_class_of(model.get_submodule(layer)).__name__, before + count)
    return list(found.values())


def mark_trainable(model: nn.Module) -> None:
    """Let the updates train, i.e. the LoRA tensors and the deltas beside them, and freeze everything else.

    That includes the statistics that ``BatchNorm`` and ``spectral_norm`` keep: such layers compute as in eval mode also
    while the network trains, until the updates are merged or removed.

    Raises:
        InputError: No layer carries LoRA.
    """
    if not any(True for _ in adapted_modules(model)):
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: call add_lora first.')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_update(name))
    for module in model.modules():
        if _keeps_statistics(module) and _compute_as_in_eval not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_compute_as_in_eval, prepend=True)  # before spectral_norm's own


def _keeps_statistics(module: nn.Module) -> bool:
    # `spectral_norm` puts its vectors into the layer, or into a parametrization of it.
    return isinstance(module, nn.modules.batchnorm._NormBase) or hasattr(module, 'weight_u') or hasattr(module, '_u')


def _compute_as_in_eval(module: nn.Module, inputs: tuple[Any, ...]) -> None:
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
    """Numbers of parameters: all of them, those that train, those of LoRA and of the deltas beside it."""

    total: int
    trainable: int
    lora: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a network, shared ones once. LoRA tensors are part of the total."""
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

    Layers that share a weight share the merged one.

    Returns:
        ``model`` itself.

    Raises:
        InputError: No layer carries LoRA, or modules share a tensor and do not update it alike. ``model`` is unchanged
            then.
    """
    modules = dict(adapted_modules(model)).values()
    if not modules:
        raise InputError(f'No layer of {type(model).__name__} carries LoRA: there is nothing to merge.')
    _check_ties(model, {})
    merged: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        updated = [(key, base, getattr(module, key)) for key, base in _own_parameters(module)]
        module.drop_update()
        for key, base, value in updated:
            if value is not base:  # base plus update
                module._parameters[key] = merged.setdefault(base, nn.Parameter(value, base.requires_grad))
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


def _check_pattern(
    key: str, pattern: str, modules: dict[str, nn.Module], adaptable: list[str], config: LoRAConfig
) -> None:
    """Raise InputError unless ``pattern`` matches the name of a module that can carry LoRA.

    With ``parameters`` that trains besides, also a module can be excluded that has any.
    """
    if matches_any(pattern, adaptable):
        return
    matched = [name for name in modules if matches_any(pattern, [name])]
    if key == 'exclude_modules' and 'parameters' in config.also_train:
        own = (
            delta_kind(modules[name], parameter) for name in matched for parameter, _ in _own_parameters(modules[name])
        )
        if 'parameters' in own:
            return
    kinds = ', '.join(sorted(layer.__name__ for layer in LORA_LAYERS if hasattr(nn, layer.__name__)))
    if matched:
        inside = [name for name in adaptable if name.startswith(f'{matched[0]}.')]
        hint = f'; inside it are {_some(inside)}' if inside else ''
        raise InputError(
            f'{key} "{pattern}" matches "{matched[0]}", a {type(modules[matched[0]]).__name__}, which '
            f'cannot carry LoRA ({kinds} can){hint}.'
        )
    near = difflib.get_close_matches(pattern.replace('\\', ''), adaptable, n=4, cutoff=0.3) or adaptable
    raise InputError(f'{key} "{pattern}" matches no module (the whole name must match); near names are {_some(near)}.')


def _some(names: list[str]) -> str:
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
