"""Option files: read safely, and changed from the command line without running code."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from lora_sr.errors import InputError, shown
from lora_sr.files import check_regular

LARGEST_FILE = 2**20  # bytes; in one of BasicSR there are a few thousand
MOST_VALUES = 10**5  # in a file, where what an anchor names counts at each of its places
MOST_MERGED = 100  # mappings in a list of `<<`
LARGEST_INTEGER, LONGEST_INTEGER = 2**63 - 1, 100  # the second one in letters

_MAPPING_TAG = yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG
# YAML 1.1 wants a dot and a signed exponent in a float, so that `lr: 1e-4` would be a string; YAML 1.2 does not.
_EXPONENT_FLOAT = re.compile(r'^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$')

_INTEGER = re.compile(r'^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o?[0-7]+|0b[01]+)$')


class OptionLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # type: ignore[misc]
    """A safe YAML loader that keeps the order of keys, reads `1e-4` as a float and refuses a key given twice."""

    def construct_options(self, node: yaml.MappingNode) -> OrderedDict:
        seen = set()
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag != 'tag:yaml.org,2002:merge' and isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key '{shown(key)}' is given twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
            elif isinstance(value_node, yaml.SequenceNode) and len(value_node.value) > MOST_MERGED:
                raise yaml.constructor.ConstructorError(
                    problem=f"'<<' must merge at most {MOST_MERGED} mappings, got {len(value_node.value)}",
                    problem_mark=key_node.start_mark,
                )
        self.flatten_mapping(node)
        return OrderedDict(self.construct_pairs(node, deep=True))

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # a merge of merges of merges
            raise yaml.constructor.ConstructorError(
                problem=f'a mapping must have at most {MOST_VALUES} keys', problem_mark=node.start_mark
            )

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        value = self.construct_yaml_int(node) if len(text) <= LONGEST_INTEGER else LARGEST_INTEGER + 1
        if abs(value) > LARGEST_INTEGER:
            raise yaml.constructor.ConstructorError(
                problem=f'an integer must fit in 64 bits, got {shown(text)}', problem_mark=node.start_mark
            )
        return int(value)

    def construct_tuple(self, node: yaml.Node) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def construct_refused(self, node: yaml.Node) -> None:
        tag = shown(node.tag.replace('tag:yaml.org,2002:', '!!'))
        raise yaml.constructor.ConstructorError(
            problem=f"the tag '{tag}' is refused, since an option file holds plain values only",
            problem_mark=node.start_mark,
        )


# Nor does YAML 1.2 read `2024-01-01` as a date or `12:30` as 750.
OptionLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((':timestamp', ':int'))]
    for first, resolvers in OptionLoader.yaml_implicit_resolvers.items()
}
OptionLoader.add_implicit_resolver('tag:yaml.org,2002:int', _INTEGER, list('-+0123456789'))
OptionLoader.add_implicit_resolver('tag:yaml.org,2002:float', _EXPONENT_FLOAT, list('-+.0123456789'))
OptionLoader.add_constructor(_MAPPING_TAG, OptionLoader.construct_options)
OptionLoader.add_constructor('tag:yaml.org,2002:int', OptionLoader.construct_integer)
OptionLoader.add_constructor('tag:yaml.org,2002:python/tuple', OptionLoader.construct_tuple)
OptionLoader.add_constructor(None, OptionLoader.construct_refused)


class OptionDumper(yaml.SafeDumper):
    """A safe YAML dumper that writes an OrderedDict as a mapping, in its order."""


OptionDumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))


def load_options(path: str | os.PathLike) -> dict:
    """Read an option file.

    Raises:
        InputError: there is no such file, it is none, it is larger than any option file, it is no text in UTF-8, it is
            not valid YAML, it holds a tag that would run code (the line is named), or it is not a mapping.
    """
    check_regular(path, 'the option file')
    try:
        size = os.path.getsize(path)
        if size > LARGEST_FILE:
            raise InputError(f'the option file {path} must have at most {LARGEST_FILE:,} bytes, got {size:,}')
        with open(path, encoding='utf-8') as file:
            options = _parse(file.read(), f'the option file {path}')
    except OSError as error:
        raise InputError(f'the option file {path} cannot be read: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise InputError(f'the option file {path} is not a text file in UTF-8') from error
    if not isinstance(options, dict):
        raise InputError(f"the option file {path} holds no options; it has to be a mapping such as 'name: my_run'")
    return options


def _unshared(value: Any, source: str, counter: Iterator[int]) -> Any:
    """A copy in which what an anchor names stands at each of its places by itself, so that one can be changed."""
    if next(counter) > MOST_VALUES:  # anchors of anchors of anchors
        raise InputError(f'{source} must have at most {MOST_VALUES} values, those that its anchors repeat included')
    if isinstance(value, dict):
        return type(value)((key, _unshared(inner, source, counter)) for key, inner in value.items())
    return [_unshared(inner, source, counter) for inner in value] if isinstance(value, list) else value


def apply_overrides(options: dict, entries: Iterable[str] | None) -> None:
    """Set each `a:b=value` of `entries` in `options`, in place; the value is YAML, and `none` stands for null.

    A dataset that is set to null is left out.

    Raises:
        InputError: an entry without `=`, a path that is not in the options (the keys that exist there are listed),
            or a value that is not valid YAML. Nothing is changed then.
    """
    changed = copy.deepcopy(options)
    for entry in entries or ():
        path, equals, text = entry.partition('=')
        if not equals:
            raise InputError(f"--force_yml {shown(entry)}: there is no '='; write it as train:total_iter=1000")
        place, keys = changed, [key.strip() for key in path.split(':')]
        for depth, key in enumerate(keys):
            if not isinstance(place, dict) or key not in place:
                raise InputError(f'--force_yml {shown(entry)}: {_what_exists(place, keys[:depth], key)}')
            if depth < len(keys) - 1:
                place = place[key]
        text = text.strip()
        value = None if text.lower() == 'none' else _parse(text, f'--force_yml {shown(entry)}')
        # At once, for the next one may be of a section that this one gives.
        if value is None and place is changed.get('datasets'):
            del place[keys[-1]]  # `datasets:val_2=~` leaves a dataset out
        else:
            place[keys[-1]] = value
    options.clear()
    options.update(changed)


def _what_exists(place: Any, parents: list[str], key: str) -> str:
    where = f"'{':'.join(parents)}'" if parents else 'the option file'
    if not isinstance(place, dict):
        return f"{where} is a single value and has no key '{key}'"
    keys = ', '.join(map(str, place))
    return f"{where} has no key '{key}'; the keys there are {keys} (others have to stand in the file first)"


def _parse(text: str, source: str) -> Any:
    try:
        return _unshared(yaml.load(text, Loader=OptionLoader), source, itertools.count())
    except InputError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        line = '' if mark is None or source.startswith('--') else f', line {mark.line + 1}'
        problem = getattr(error, 'problem', None) or str(error).splitlines()[0]
        raise InputError(f'{source}{line}: {shown(problem, 200)}') from error
    except (TypeError, ValueError) as error:  # e.g. `!!float ten`, or a list as a key
        raise InputError(f'{source}: {shown(str(error), 200)}') from error
    except (LookupError, AttributeError) as error:  # e.g. `!!bool ten`, or `!!timestamp now`
        raise InputError(f'{source}: a value is not what its tag says') from error
    except RecursionError:
        raise InputError(f'{source}: its values are nested too deeply') from None
