"""The one rule by which weights are found in a file: under which keys, and with what before their names."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_sr.adapters import is_lora_key
from lora_sr.checkpoints.ignoring import Ignored
from lora_sr.errors import InputError, shown

# Keys under which trainers keep the generator, as BasicSR, Lightning, timm, KAIR, StyleGAN and others name it. The
# moving average comes first, as it is what people publish.
AVERAGES = (
    *('params_ema', 'params-ema', 'ema', 'state_dict_ema', 'ema_state_dict', 'model_ema', 'ema_model'),
    *('net_g_ema', 'generator_ema', 'g_ema', 'G_ema', 'netG_ema'),
)
WRAPPERS = (
    *AVERAGES,
    *('params', 'state_dict', 'model_state_dict', 'net_g', 'generator', 'netG', 'g', 'G'),
    *('model', 'module', 'net', 'network', 'weights', 'shadow'),
)
# What compilers and parallel wrappers put into names, wherever they wrapped a module, and before all of them.
ADDED = re.compile(r'^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.')
GENERATORS = (
    *('params_ema.', 'net_g_ema.', 'generator_ema.', 'ema_model.'),
    *('params.', 'net_g.', 'generator.', 'netG.'),
)
NETWORKS = ('model.', 'net.', 'network.')  # as trainers also call it, and parts of networks are called
# Beside the generator in the state dict of a whole trainer: networks that judge or teach, averages, and counters.
COMPANION = re.compile(
    r'd|params|initted|(net_?[dD]|discriminator|vgg|perceptual|lpips|dists|teacher|net_t|criterion|cri|loss(es)?|'
    r'metrics?|psnr|ssim|net_?[gG]|generator|ema|model_ema|ema_model|online_model|g_ema|step)(_\w+)?'
)
COUNTER = 'n_averaged'  # of torch's AveragedModel
DEEPEST = 4  # sections within sections, and parts before all names
SHOWN = 4


@dataclass(frozen=True)
class Found:
    """Weights in a file.

    Args:
        param_key: Where they are: the keys of the sections around them, joined by dots; ``None`` for the file itself.
        prefix: What was taken from before their names, or out of the middle of them; empty where nothing was.
        state: The weights by name, on the CPU.
    """

    param_key: str | None
    prefix: str
    state: OrderedDict[str, Tensor]


def find_weights(
    content: Mapping[str, Any],
    path: object,
    param_key: str | None = None,
    is_known: Callable[[Mapping[str, Tensor]], bool] = lambda state: False,
) -> Found:
    """Find the weights of a network in what a file holds.

    - Of the sections of a file the one of the generator counts: its moving average, if there is one and it is not
      empty, else ``params``, ``state_dict`` and the like (:data:`WRAPPERS`), else the only one with weights. Sections
      may stand within sections.
    - From the names goes what ``torch.compile`` and ``DataParallel`` put there, ``_orig_mod.`` and ``module.``.
    - A network that is known by these names keeps them. From all others goes what trainers put before all of them,
      ``net_g.``, ``generator.`` and the like (:data:`GENERATORS`), and anything else if the network is known without
      it. Where a whole trainer was saved, what stands beside its generator is left out if the generator is known.

    Args:
        content: What the file holds.
        path: The file, for messages.
        param_key: The section, where it is known; its keys are joined by dots.
        is_known: Whether a state dict is that of a network at hand.

    Raises:
        InputError: There is no such section, there are no weights, or several sections may be meant.
    """
    value = content if param_key is None else _section(content, param_key, path)
    keys = _find(value)
    if keys is None:
        raise InputError(_nothing_in(content, param_key, path))
    for key in keys:
        value = value[key]
    arrays = [name for name, one in value.items() if isinstance(one, Ignored) and one.is_array]
    if arrays:
        raise InputError(f'{path} must hold tensors, got an array of numpy for {shown(arrays[0])}.')
    names = [*([] if param_key is None else [param_key]), *keys]
    state, prefix = _without_prefix(weights_of(value), is_known, path)
    versions = getattr(value, '_metadata', None)  # of the modules, which some of them look at when they load
    if isinstance(versions, Mapping):
        state._metadata = {  # type: ignore[attr-defined]
            name: {'version': value['version']}
            for name, value in versions.items()
            if isinstance(value, Mapping) and isinstance(value.get('version'), int)
        }
    return Found('.'.join(names) or None, prefix, state)


def bare_weights(state: Mapping[str, Tensor], path: object = 'a state dict') -> OrderedDict[str, Tensor]:
    """The weights of a network in memory, without what ``torch.compile`` and ``DataParallel`` put into their names."""
    names, _ = _without_added(state, path)
    return OrderedDict((name, _plain(state[old])) for name, old in names.items())


def state_dicts(content: Mapping[str, Any]) -> dict[str, int]:
    """All state dicts in a file: where they are, and how many tensors they have."""
    found = {}
    for keys, value in _walk(content):
        if is_state_dict(value):
            found['.'.join(keys)] = len(weights_of(value))
    return found


def is_state_dict(value: Any) -> bool:
    """Whether a value is a mapping of names to tensors: at least one, and beside them nothing but plain values."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(one, Tensor) for one in value.values())
        and all(isinstance(name, str) for name in value)
        and not any(isinstance(one, (Mapping, list, tuple, set)) and len(one) > 0 for one in value.values())
    )


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without what is none."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _walk(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every section of a file that may hold weights, once, with the keys that lead to it; the file itself first."""
    sections: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), content)]
    seen = {id(content)}
    for keys, section in sections:  # which grow
        yield keys, section
        for key, value in section.items() if len(keys) < DEEPEST else ():
            if isinstance(key, str) and isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                if 'optim' not in key.lower() and not {'state', 'param_groups'} <= value.keys():
                    sections.append(((*keys, key), value))


def _find(content: Mapping[str, Any], seen: set[int] | None = None, depth: int = 0) -> list[str] | None:
    """The keys that lead to the weights; ``None`` where there are none, or several may be meant."""
    seen = {id(content)} if seen is None else seen
    for key in WRAPPERS if depth < DEEPEST else ():
        value = content.get(key)
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            inner = _find(value, seen, depth + 1)
            if inner is not None:
                return [key, *inner]
    if is_state_dict(content):
        return []
    found = [keys for keys, section in _walk(content) if is_state_dict(section)] if depth == 0 else []
    generators = [keys for keys in found if not any(map(COMPANION.fullmatch, keys))]
    return list(generators[0]) if len(generators) == 1 else None


def _section(content: Mapping[str, Any], param_key: str, path: object) -> Mapping[str, Any]:
    """A section by its keys, joined by dots, which may stand in a key as well."""
    section, rest = content, param_key
    while rest:
        keys = [key for key in section if isinstance(key, str) and f'{rest}.'.startswith(f'{key}.')]
        key = max(keys, key=len, default='')
        if not isinstance(section.get(key), Mapping):
            there = ', '.join(shown(str(key)) for key in list(section)[:SHOWN])
            raise InputError(f'{path} has no "{shown(param_key)}": it has {there or "nothing"}.')
        section, rest = section[key], rest[len(key) + 1 :]
    return section


def _nothing_in(content: Mapping[str, Any], param_key: str | None, path: object) -> str:
    found = [shown(name) for name in state_dicts(content) if name]
    where = '' if param_key is None else f' under "{shown(param_key)}"'
    if not found and any(
        isinstance(one, Ignored) and one.is_array for _, section in _walk(content) for one in section.values()
    ):
        return f'{path} must hold tensors, got arrays of numpy.'
    if not found:
        return f'{path} holds no state dict{where}, i.e. no mapping of names to tensors.'
    more = f' and {len(found) - SHOWN} more' if len(found) > SHOWN else ''
    return (
        f'{path} holds no state dict{where}, i.e. no mapping of names to tensors, that is a network by its name: there '
        f'is one under {" and one under ".join(found[:SHOWN])}{more}, which the param_key has to name.'
    )


def _without_prefix(
    weights: Mapping[str, Tensor], is_known: Callable[[Mapping[str, Tensor]], bool], path: object, depth: int = 0
) -> tuple[OrderedDict[str, Tensor], str]:
    """Weights without what is not of their names in the network, and that."""
    is_average = COUNTER in weights and all(name.startswith('module.') for name in weights if name != COUNTER)
    names, added = _without_added([name for name in weights if not is_average or name != COUNTER], path)
    state = OrderedDict((name, _plain(weights[old])) for name, old in names.items())
    starts = _starts(state) if depth < DEEPEST and not all(map(is_lora_key, state)) else []
    if not starts or is_known(state):
        return state, added
    best = state, added
    for start in starts:
        inside = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
        found, more = _without_prefix(inside, is_known, path, depth + 1)
        if is_known(found):
            return found, added + start + more
        if start in GENERATORS and len(inside) == len(state):
            best = found, added + start + more
    return best


def _starts(names: Collection[str]) -> list[str]:
    """What may stand before the names of a network: before all of them, or beside what is no network to be run."""
    firsts = dict.fromkeys(name.partition('.')[0] for name in names)
    if len(firsts) == 1:
        return [f'{first}.' for first in firsts if all(name.startswith(f'{first}.') for name in names)]
    starts = [start for start in (*GENERATORS, *NETWORKS) if start[:-1] in firsts]
    return [start for start in starts if all(COMPANION.fullmatch(first) for first in firsts if first != start[:-1])]


def _without_added(names: Iterable[str], path: object) -> tuple[dict[str, str], str]:
    """Name -> name in the file, without what compilers and parallel wrappers put into it; and that."""
    found, taken = {name: name for name in names}, ''
    while True:
        parts = dict.fromkeys(part for name in found for part in ADDED.findall(name))
        if not parts:
            return found, taken
        taken += ''.join(parts)
        renamed: dict[str, str] = {}
        for name, old in found.items():
            new = ADDED.sub('', name)
            if new in renamed:
                raise InputError(f'{path} must have each name once, got {shown(renamed[new])} and {shown(old)}.')
            renamed[new] = old
        found = renamed


def _plain(value: Tensor) -> Tensor:
    # Next to nothing is defined for float8.
    value = value.float() if value.element_size() == 1 and value.is_floating_point() else value
    return value.detach().cpu()
