"""From the section of an option file to the network that it describes."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lora_sr.archs import AdaptSR
from lora_sr.archs.registry import OWN, Arch, find_arch, known_archs
from lora_sr.checkpoints.bounds import at_most
from lora_sr.checkpoints.by_file import spandrel
from lora_sr.checkpoints.imports import IMPORTED, reason_of
from lora_sr.errors import InputError, MissingBasicSR, did_you_mean, shown

# Long before it fills the memory, or takes for ever.
MOST_VALUES, MOST_TENSORS = 2 * 10**9, 100_000
# Networks that are made of others, or of a file, found without BasicSR.
DESCRIBED: dict[str, Arch] = {arch.__name__: arch for arch in (AdaptSR, spandrel)}
SHOWN = 80  # letters of a list of names
TOO_LARGE = f'the network must have at most {MOST_VALUES:,} values in {MOST_TENSORS:,} tensors, got more'


def build_network(section: object, where: str = 'network_g') -> nn.Module:
    """Build the network of a section such as ``network_g``, without weights.

    Args:
        section: ``type``, the name of a network of this package or of BasicSR's registry, and its arguments.
        where: What the section is called, for messages.

    Raises:
        InputError: There is no network of that name, an argument is not known to it or missing, or it refuses them.
    """
    arch, known = _check_section(section, where)
    return construct(arch, known, where)


def construct(arch: Arch, section: Mapping[str, Any], where: str) -> nn.Module:
    """Build the network of a section whose type and keys are known.

    Raises:
        InputError: It refuses the values.
    """
    arguments = {key: value for key, value in section.items() if key != 'type'}
    try:
        with at_most(MOST_VALUES, MOST_TENSORS, TOO_LARGE), without_old_calls():
            return arch(**arguments)
    except InputError as error:
        raise InputError(f'{where}: {error}') from None
    except Exception as error:  # whatever a constructor, also one of others, makes of wrong values
        reason = reason_of(error)
        is_ours = arch.__module__.startswith(('lora_sr.', 'basicsr.'))  # others' may fetch things
        with torch.device('meta'):
            key = refused_key(arch, arguments) if is_ours else None
        if key is not None:
            value = shown(repr(arguments[key]))
            raise InputError(f'{where}.{key}: {section["type"]} cannot be built with {value}{reason}') from error
        raise InputError(f'{where}: {section["type"]} cannot be built from these values{reason}') from error


@contextlib.contextmanager
def without_old_calls() -> Iterator[None]:
    """Networks of BasicSR and others call torch as it was, which it tells whoever builds one."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'torch.meshgrid', UserWarning)
        yield


def refused_key(build: Callable[..., object], arguments: Mapping[str, Any]) -> str | None:
    """The one argument without which, or with small numbers in its place, something can be built."""
    for key in arguments:
        rest = {other: value for other, value in arguments.items() if other != key}
        for instead in ({}, {key: 4}, {key: [4]}):
            with contextlib.suppress(Exception):
                build(**rest, **instead)
                return key
    return None


def _check_section(section: object, where: str) -> tuple[Arch, Mapping[str, Any]]:
    """Check the type and the keys of a section. Returns what it names, and the section."""
    if not isinstance(section, Mapping):
        raise InputError(f'{where} has to be a section of keys, not {shown(repr(section))}')
    name = section.get('type')
    if not isinstance(name, str):
        wrong = 'is missing' if name is None else f'has to be a name, not {shown(repr(name))}'
        raise InputError(f'{where}.type {wrong}')
    arch, known = find_known(name)
    if arch is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = did_you_mean(name, known) if near else f'known are {_some(sorted(known))}'
        raise InputError(
            f"{where}.type: there is no network '{shown(name, 40)}'; {hint} (--import teaches a network of "
            'your own, {type: spandrel, path: FILE} is one of spandrel)'
        )
    _check_arguments(where, arch, {key: value for key, value in section.items() if key != 'type'})
    if arch is AdaptSR:
        _check_section(section['base'], f'{where}.base')  # whose mistakes are told by their own names
    return arch, section


def find_known(name: str) -> tuple[Arch | None, Mapping[str, Arch]]:
    """The network of that name, and all that there are: without BasicSR, this package's and imported modules'."""
    if name in DESCRIBED:
        return DESCRIBED[name], {}
    try:
        arch = find_arch(name)
        known = {} if arch is not None else known_archs()
    except MissingBasicSR:
        arch, known = None, OWN
    for module in IMPORTED:
        found = getattr(module, name, None)
        if arch is None and isinstance(found, type) and issubclass(found, nn.Module):
            arch = found
    return arch, known


def _check_arguments(where: str, arch: Any, arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(arch).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [key for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for key in arguments:
        if key not in named and not takes_any:
            near = difflib.get_close_matches(str(key), [other for other in named if other not in arguments], n=1)
            hint = f"did you mean '{near[0]}'?" if near else f'the keys here are {_some(named)}'
            raise InputError(f'{where}.{shown(str(key))} is not a known key; {hint}')
    for key in named:
        if parameters[key].default is inspect.Parameter.empty and key not in arguments:
            raise InputError(f'{where}.{key} is missing')


def _some(names: Iterable[str]) -> str:
    """Names as a list, which ends early where it is long."""
    text = ', '.join(names)
    return text if len(text) <= SHOWN else f'{text[:SHOWN].rpartition(", ")[0]}, …'
