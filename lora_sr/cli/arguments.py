"""Arguments that several sub-commands take."""

from __future__ import annotations

import argparse
from typing import Callable

from lora_sr.errors import InputError


def named(path: str) -> Callable[[str], tuple[str, str]]:
    """A type for argparse: ``NAME=path`` to (name, path). ``path`` says what the path is, e.g. ``FOLDER``."""

    def parse(argument: str) -> tuple[str, str]:
        name, equals, value = argument.partition('=')
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f'{argument!r} should be NAME={path}')
        return name, value

    return parse


def by_name(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The pairs that :func:`named` gave, as name -> path.

    Raises:
        InputError: A name is given twice.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f'The name "{name}" is given {names.count(name)} times: give each its own.')
    return dict(pairs)
