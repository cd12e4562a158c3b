"""Regular expressions that must match the whole name of a module or of a parameter."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable

from lora_sr.errors import InputError, shown

# Of a pattern in a file, which somebody else has written: a name of 512 letters, each escaped, and more.
LONGEST_PATTERN, MOST_REPEATS = 2048, 3
MOST_STEPS = 3e8  # that patterns of a file may take on all names together: some seconds
LITERAL = re.compile(r'(?:\w|\\\W)+', re.DOTALL)
BACK_REFERENCE = re.compile(r'(?<!\\)(?:\\\\)*(?:\\[1-9]|\(\?P=|\(\?\()')


class Patterns:
    """Patterns in an order. Those that are plain names, of which an exact configuration has thousands, cost nothing.

    Args:
        patterns: The regular expressions.
        most_steps: How many steps they may take on all names together, each of no more than :data:`MOST_REPEATS`
            repetitions, see :func:`check_simple`.
    """

    def __init__(self, patterns: Iterable[str], most_steps: float = math.inf):
        self.patterns = tuple(patterns)
        self.steps_left = most_steps
        self._names: dict[str, list[int]] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for number, pattern in enumerate(self.patterns):
            name = _literal(pattern)
            if name is None:
                self._expressions.append((number, re.compile(pattern)))
            else:
                self._names.setdefault(name, []).append(number)
        self._found: dict[str, tuple[str, ...]] = {}

    def matching(self, name: str) -> tuple[str, ...]:
        """Those that match a name, in their order.

        Raises:
            InputError: They take more steps than they may.
        """
        if name not in self._found:
            numbers = [*self._names.get(name, ())]
            for number, expression in self._expressions:
                if self.steps_left < math.inf:
                    self.steps_left -= _most_steps(expression.pattern, name)
                    if self.steps_left < 0:
                        raise InputError(
                            f'The pattern {shown(repr(expression.pattern))} must be simpler: with so many names, and '
                            'as long ones, it takes too long.'
                        )
                if expression.fullmatch(name):
                    numbers.append(number)
            self._found[name] = tuple(self.patterns[number] for number in sorted(numbers))
        return self._found[name]


def matches_any(pattern: str, names: Collection[str]) -> bool:
    """Whether a pattern matches any of some names."""
    literal = _literal(pattern)
    if literal is not None:
        return literal in names
    expression = re.compile(pattern)
    return any(expression.fullmatch(name) for name in names)


def check_simple(pattern: str) -> None:
    """Refuse a pattern that may take for ever on a name: `re` cannot be stopped.

    Raises:
        InputError: It is long, has many repetitions, repeats a group, or refers to one.
    """
    bare = _without_escapes(pattern[:LONGEST_PATTERN])
    is_simple = (
        not re.search(r'\)[*+?{]', bare) and not BACK_REFERENCE.search(pattern) and _repeats(bare) <= MOST_REPEATS
    )
    if len(pattern) > LONGEST_PATTERN or not is_simple:
        raise InputError(
            f'The pattern {shown(repr(pattern))} must be simpler: of at most {LONGEST_PATTERN} letters and '
            f'{MOST_REPEATS} repetitions, none of them of a group, and without references to one.'
        )


def _literal(pattern: str) -> str | None:
    """The one name that a pattern matches; ``None`` where it is not plain."""
    if not LITERAL.fullmatch(pattern):
        return None
    return re.sub(r'\\(\W)', r'\1', pattern)


@functools.lru_cache(maxsize=None)
def _repeats(bare: str) -> int:
    return len(re.findall(r'[*+?{]', bare))


def _most_steps(pattern: str, name: str) -> int:
    """In how many ways as many repetitions can share out the letters of a name."""
    repeats = _repeats(_without_escapes(pattern))
    return math.comb(len(name) + repeats, repeats)


@functools.lru_cache(maxsize=None)
def _without_escapes(pattern: str) -> str:
    return re.sub(r'\\.', 'x', pattern, flags=re.DOTALL)
