"""The one rule by which weights are found in a file: under which keys, and with what before their names."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_sr.adapters import is_lora_key
from lora_sr.checkpoints.ignoring import Ignored
from lora_sr.errors import InputError, shown

LOG = logging.getLogger('lora_sr')

# Keys under which trainers keep the network that is run, the first of them before the others.
WRAPPERS = (
    *('params', 'state_dict', 'model_state_dict', 'net_g', 'generator', 'netG', 'g', 'G'),
    *('model', 'module', 'net', 'network', 'weights', 'shadow'),
)
# What compilers and parallel wrappers put into names, wherever they wrapped a module, and before all of them.
ADDED = re.compile(r'^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
GENERATORS = ('params_ema.', 'net_g_ema.', 'generator_ema.', 'ema_model.', 'params.', 'net_g.', 'generator.', 'netG.')
WORDS = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+')
AVERAGE = {'ema', 'swa'}  # words in the names of moving averages
# Likewise of what is beside the network that is run: networks that judge or teach it, and what counts and scales.
BESIDE = {
    *('d', 'netd', 'disc', 'discriminator', 'teacher', 'vgg', 'perceptual', 'lpips', 'dists', 'cri', 'criterion'),
    *('loss', 'losses', 'metric', 'metrics', 'psnr', 'ssim', 'fid', 'optim', 'optimizer', 'optimizers', 'scheduler'),
    *('preprocessor', 'normalizer', 'scaler', 'step', 'steps', 'counter', 'epoch', 'updates', 'decay', 'initted'),
}
COUNTER = 'n_averaged'  # of torch's AveragedModel
DEEPEST = 8  # sections within sections, and parts before all names
LEAST_SHARE = 0.5  # of the tensors beside it that an average has
SHOWN = 4


@dataclass(frozen=True)
class Found:
    """Weights in a file.

    Args:
        param_key: Where they are: the keys of the sections around them, joined by dots; ``None`` for the file itself.
        prefix: What was taken from before their names, or out of the middle of them; empty where nothing was.
        state: The weights by name, on the CPU.
        unread: A moving average in the file that is not what was found, as it has no names or others; ``None`` where
            a section was named.
    """

    param_key: str | None
    prefix: str
    state: OrderedDict[str, Tensor]
    unread: str | None = None

    def warn(self, path: object) -> None:
        """Log that there is a moving average that is not read."""
        if self.unread is not None:
            LOG.warning(
                f'{path} has a moving average, {shown(self.unread)}, that has no names, or other than the network: '
                'the weights of the last iteration are read.'
            )


def find_weights(
    content: Mapping[str, Any],
    path: object,
    param_key: str | None = None,
    is_known: Callable[[Mapping[str, Tensor]], bool] = lambda state: False,
) -> Found:
    """Find the weights of a network in what a file holds.

    - Of the sections of a file the one of the generator counts: its moving average, if there is one with names and
      with as many tensors or so, else ``params``, ``state_dict`` and the like (:data:`WRAPPERS`), else the only one
      with weights that is not of a discriminator, a loss and the like (:data:`BESIDE`). Sections may stand within
      sections.
    - From the names goes what ``torch.compile`` and ``DataParallel`` put there, ``_orig_mod.`` and ``module.``.
    - A network that is known by these names keeps them. From all others goes what trainers put before all of them,
      ``net_g.``, ``generator.`` and the like (:data:`GENERATORS`), and anything else if the network is known without
      it. Where a whole trainer was saved, what stands beside its generator is left out if the generator is known, and
      its moving average comes first.

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
    unread = None
    if param_key is None and not any(map(is_average, (*prefix.split('.'), *'.'.join(names).split('.')))):
        firsts = (name.partition('.')[0] for name in value if name not in state)
        unread = next(filter(is_average, firsts), None) if len(state) < len(weights_of(value)) else None
        unread = unread or _unread_average(content)
    return Found('.'.join(names) or None, prefix, state, unread)


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
                if not _is_optimizer(value):
                    sections.append(((*keys, key), value))


def _is_optimizer(section: Mapping[Any, Any]) -> bool:
    return {'state', 'param_groups'} <= section.keys()


def is_average(name: str) -> bool:
    """Whether a key is that of a moving average of weights."""
    return not AVERAGE.isdisjoint(map(str.lower, WORDS.findall(name)))


def _is_beside(name: str) -> bool:
    """Whether a key is that of something beside the network that is run."""
    return not BESIDE.isdisjoint(map(str.lower, WORDS.findall(name)))


def _find(content: Mapping[str, Any], seen: set[int] | None = None, depth: int = 0) -> list[str] | None:
    """The keys that lead to the weights; ``None`` where there are none, or several may be meant."""
    if is_state_dict(content):
        return []
    if _is_optimizer(content):
        return None
    seen = {id(content)} if seen is None else seen
    found: dict[str, list[str]] = {}
    for key, value in content.items() if depth < DEEPEST else ():
        if isinstance(key, str) and isinstance(value, Mapping) and id(value) not in seen and not _is_beside(key):
            seen.add(id(value))
            inner = _find(value, seen, depth + 1)
            if inner is not None:
                found[key] = [key, *inner]
    averages = [key for key, keys in found.items() if any(map(is_average, keys))]
    others = [key for key in found if key not in averages]
    main = next((key for key in WRAPPERS if key in others), others[0] if len(others) == 1 else None)
    least = 0.0 if main is None else LEAST_SHARE * _count(content, found[main])
    averages = [key for key in averages if _count(content, found[key]) >= least]
    if averages:
        return found[averages[0]]
    return None if main is None else found[main]


def _count(content: Mapping[str, Any], keys: Sequence[str]) -> int:
    for key in keys:
        content = content[key]
    return len(weights_of(content))


def _unread_average(content: Mapping[str, Any]) -> str | None:
    """The key of a moving average in a file that has more than a number or two."""
    for keys, section in _walk(content):
        for key, value in section.items():
            has_more = isinstance(value, (Mapping, list, tuple)) and len(value) > 1
            if isinstance(key, str) and is_average(key) and has_more and not _is_beside(key):
                return '.'.join([*keys, key])
    return None


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
    is_averaged_model = COUNTER in weights and all(name.startswith('module.') for name in weights if name != COUNTER)
    names, added = _without_added([name for name in weights if not is_averaged_model or name != COUNTER], path)
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
    firsts = list(dict.fromkeys(name.partition('.')[0] for name in names))
    if len(firsts) > 1:
        averages = [first for first in firsts if is_average(first) and not _is_beside(first)]
        others = [first for first in firsts if not is_average(first) and not _is_beside(first)]
        firsts = [*averages, *others] if len(others) <= 1 else []
    starts = [f'{first}.' for first in firsts]
    return starts if all('.' in name for name in names if f'{name}.' in starts) else []


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
