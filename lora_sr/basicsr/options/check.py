"""What the checks of all sections share: the options, the sentences, and the tools to find them."""

from __future__ import annotations

import contextlib
import difflib
import dis
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import MODEL_REGISTRY, Registry

from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.schema import Kind
from lora_sr.errors import did_you_mean, printable

OWN_MODULES = ('basicsr.', 'lora_sr.')
MOST_PROBLEMS, LONGEST_PROBLEM = 20, 300  # lines, letters of each


def find(registry: Registry | dict, name: object) -> Callable | None:
    """What has that name in a registry or dictionary, or None."""
    known = registry if isinstance(registry, dict) else dict(iter(registry))  # its keys() lacks a [] to go with it
    # With a suffix BasicSR registers what Real-ESRGAN registers too, and so it finds it.
    return known.get(f'{name}_basicsr', known.get(name)) if isinstance(name, str) else None


def _named_keys(entry: Callable | None) -> set[str]:
    """The keys that the code of a class of BasicSR's reads: in a clone somebody may have taught it more of them."""
    keys = set()
    for base in getattr(entry, '__mro__', ()):
        if base.__module__.startswith('basicsr.'):
            with contextlib.suppress(OSError, TypeError):  # no source
                keys.update(re.findall(r"""opt(?:\['\w+'\])?(?:\[|\.get\()['"](\w+)['"]""", inspect.getsource(base)))
    return keys


def _reads_others(function: Callable, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function or class may read keys that are no parameters: some of BasicSR's take any, and ignore them."""
    rest = [name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    is_known = function.__module__.startswith(OWN_MODULES)
    if not rest or not is_known and not (inspect.isclass(function) and issubclass(function, torch.optim.Optimizer)):
        return bool(rest)
    code = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    return any(instruction.argval == rest[0] for instruction in dis.get_instructions(code))


def _nearest(key: str, known: list[str], needed: list[str], cutoff: float) -> str | None:
    """The known key that another may be meant to be: of equally near ones, one of the same letters, or a needed one."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=cutoff)

    def nearness(name: str) -> tuple[float, bool, bool]:
        return difflib.SequenceMatcher(None, name, key).ratio(), sorted(name) == sorted(key), name in needed

    return max(near, key=nearness, default=None)


def for_screen(problems: list[str]) -> list[str]:
    """Sentences for a screen: a line each, of bounded length, and not too many of them."""
    short = [_shortened(printable(problem)) for problem in problems]
    if len(short) <= MOST_PROBLEMS:
        return short
    return [*short[: MOST_PROBLEMS - 1], f'… and {len(short) - MOST_PROBLEMS + 1} more problems']


def _shortened(sentence: str) -> str:
    """A sentence without its middle, where that is long: a value of thousands of letters, or a list of all names."""
    if len(sentence) <= LONGEST_PROBLEM:
        return sentence
    end = LONGEST_PROBLEM // 3
    return f'{sentence[: LONGEST_PROBLEM - end - 3]} … {sentence[-end:]}'


class Check:
    """The check of one option file: its options, what has been found wrong with them, and the tools to find it.

    Args: see :func:`lora_sr.basicsr.options.check_options`.
    """

    def __init__(self, opt: dict, is_train: bool, root: Path, processes: int):
        self.opt, self.is_train, self.root, self.processes = opt, is_train, root, processes
        self.problems: list[str] = []
        self.misspelled: dict[str, str] = {}  # whole names of keys, with a dot at the end: as they stand, as meant
        self.networks: dict = {}
        self.lr_sizes: dict[str, dict[tuple[int, int], str]] = {}  # of each validation or test set: its images
        model = opt.get('model_type')
        self.ours = model == schema.DISTILLATION
        self.facts = {'train' if is_train else 'test', *self.readers(MODEL_REGISTRY, model, schema.MODELS)}
        if is_train and model in schema.DEGRADING.split() and opt.get('high_order_degradation', True):
            self.facts.add('degrading')

    def add(self, sentence: object) -> None:
        """Keep a sentence about what is wrong."""
        self.problems.append(str(sentence))

    def add_missing(self, sentence: str, *keys: str) -> None:
        """Keep a sentence about keys that are missing, unless one of them, or its section, is told to be misspelled."""
        if not any(f'{key}.'.startswith(meant) for key in keys for meant in self.misspelled.values()):
            self.add(sentence)

    def readers(self, registry: Registry, name: object, known: str) -> set[str]:
        """The facts about what reads a section: a model's or dataset's name, and ``reads:KEY`` as its code has it.

        Of one of somebody else's, it is ``open``, since it may read keys that the schema does not know, and with a +
        those that it inherits from: what they read is known, but it may do without.
        """
        found = find(registry, name)
        if name in known.split() and getattr(found, '__module__', '').startswith(OWN_MODULES):
            is_ours = found.__module__.startswith('lora_sr.')  # it does not read all that its bases do
            return {str(name), *(f'reads:{key}' for key in ([] if is_ours else _named_keys(found)))}
        bases = {base.__name__ for base in getattr(found, '__mro__', ())}
        return {'open', *(f'+{base}' for base in bases.intersection(known.split()))}

    def is_section(self, where: str, given: object) -> bool:
        """Check that something is a section of keys."""
        if not isinstance(given, dict):
            self.add(f'{where} has to be a section of keys, not {given!r}')
        return isinstance(given, dict)

    def section(
        self, where: str, given: Any, facts: set[str] | None = None, also: dict[str, schema.Key] | None = None
    ) -> bool:
        """Check a section that the schema describes: its keys, and the values of those that it knows.

        Args:
            where: What the section is called, e.g. ``datasets.train``; empty for the top of the file.
            given: The section.
            facts: What holds for it; by default what holds for the run.
            also: Keys that may stand there besides.

        Returns:
            Whether it is a section that has all it needs, with values of the right kind.
        """
        if not self.is_section(where, given):
            return False
        name = '.'.join(['datasets', '*', *where.split('.')[2:]]) if where.startswith('datasets.') else where
        facts = self.facts if facts is None else facts
        known = {fact.lstrip('+') for fact in facts}
        entries = {**schema.SECTIONS[name], **(also or {})}
        keys = {key: entry for key, entry in entries.items() if entry.is_known(known)}
        # Nobody reads `x-…`: there stands what the file itself repeats, under anchors.
        own = {
            key: value
            for key, value in given.items()
            if key in keys or not (str(key).startswith('x-') or f'reads:{key}' in facts)
        }
        needed = [key for key, entry in keys.items() if entry.is_needed(facts)]
        self.keys(where, own, list(keys), needed, 'open' in facts)
        prefix = f'{where}.' if where else ''
        values = [self.value(f'{prefix}{key}', own[key], entry.kind) for key, entry in keys.items() if key in own]
        return own.keys() >= set(needed) and all(values)

    def value(self, where: str, value: Any, kind: Kind) -> bool:
        """Check that a value is of a kind."""
        fault = kind.fault(where, value)
        if fault:
            self.add(fault)
        return not fault

    def keys(self, where: str, given: dict, known: list[str], needed: list[str], is_open: bool = False) -> bool:
        """Check the keys of a section. Returns whether it has all it needs, and nothing that nobody knows.

        Args:
            is_open: whether others may read other keys there; then only what is almost a known key is told.
        """
        prefix = f'{where}.' if where else ''
        complete = True
        absent = [key for key in known if key not in given]
        for key in [key for key in given if key not in known]:
            near = _nearest(str(key), absent, needed, cutoff=0.85 if is_open else 0.6)
            if near is not None:
                absent.remove(near)
                self.misspelled[f'{prefix}{key}.'] = f'{prefix}{near}.'
                complete = complete and near not in needed
                self.add(f"{prefix}{key} is not a known key; did you mean '{near}'?")
            elif not is_open:
                complete = False
                self.add(f'{prefix}{key} is not a known key; the keys here are {", ".join(known)}')
        for key in needed:
            if key in absent:
                complete = False
                self.add(f'{prefix}{key} is missing')
        return complete

    def registered(self, where: str, name: object, registry: Registry | dict, what: str) -> Callable | None:
        """The class or function of that name in a registry or dictionary, or None."""
        found = find(registry, name)
        if name is None:
            self.add(f'{where} is missing')
        elif not isinstance(name, str):
            self.add(f'{where} has to be a name, not {name!r}')
        elif found is None:
            known = [name for name, _ in (registry.items() if isinstance(registry, dict) else registry)]
            self.add(f"{where}: there is no {what} '{name}'; {did_you_mean(name, known)}")
        return found

    def arguments(
        self, where: str, function: Callable, given: dict, ours: tuple[str, ...] = (), supplied: tuple[str, ...] = ()
    ) -> bool:
        """Check keys of a section against the parameters of what they are handed to. Returns whether it takes them.

        Args:
            ours: keys of the section that are not handed on.
            supplied: parameters that come from elsewhere.
        """
        parameters = inspect.signature(function).parameters
        named = [
            name
            for name, p in parameters.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in supplied
        ]
        needed = [name for name in named if parameters[name].default is inspect.Parameter.empty]
        given = {key: value for key, value in given.items() if key != 'type'}
        before = len(self.problems)
        self.keys(where, given, [*named, *ours], needed, is_open=_reads_others(function, parameters))
        if function.__module__.startswith((*OWN_MODULES, 'torch.')):
            for key in [key for key in given if key in named]:
                self._like_default(f'{where}.{key}', given[key], parameters[key].default)
        return len(self.problems) == before

    def _like_default(self, where: str, value: object, default: object) -> None:
        """Check that an argument is of the kind that its default shows; None and what it stands for say nothing."""
        wanted = ''
        items = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(default, bool):
            wanted = '' if value in (True, False) else 'true or false'
        elif isinstance(default, (int, float)):
            wanted = '' if value is None or all(map(schema.is_number, items)) else 'a number'
        elif isinstance(default, (list, tuple)) and all(map(schema.is_number, default)):
            wanted = '' if value is None or all(map(schema.is_number, items)) else 'a list of numbers'
        elif isinstance(default, str):
            wanted = '' if value is None or isinstance(value, str) else 'a text'
        if wanted:
            self.add(f'{where} has to be {wanted}, not {value!r}')

    def subsection(self, name: str) -> dict:
        """A section of the file, empty where it is missing or is none (which is told elsewhere)."""
        value = self.opt.get(name)
        return value if isinstance(value, dict) else {}

    def output_folder(self) -> Path:
        """The folder `experiments` or `results`, in which the run has a folder of its own."""
        key, name = ('experiments_root', 'experiments') if self.is_train else ('results_root', 'results')
        # BasicSR's master branch lets the option file choose the folder.
        return Path(os.path.expanduser(str(self.subsection('path').get(key) or self.root / name)))
