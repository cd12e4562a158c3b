"""Patterns of names beside `re`, which tries each on each name."""

import random
import re

import pytest

from lora_sr.adapters import LoRAConfig
from lora_sr.adapters.patterns import Patterns, check_simple, matches_any
from lora_sr.errors import InputError

NAMES = [
    *(f'layers.{layer}.blocks.{block}.{part}' for layer in range(3) for block in range(12) for part in ('qkv', 'fc-1')),
    *('', 'conv', 'conv_1', 'a.b', 'a+b', 'a\\b', 'a b', 'ä', '1', 'x' * 60),
]
WORDS = [
    'conv',
    'x',
    '.',
    r'\.',
    r'\d',
    r'\d+',
    '.*',
    'layers',
    'qkv',
    '[a-c]',
    '(fc|qkv)',
    r'\-',
    '?',
    'ä',
    '|',
    r'\\',
    '$',
]


def test_as_re_finds_them():
    draw = random.Random(0)
    patterns = [re.escape(name) for name in NAMES] + NAMES[:40]
    while len(patterns) < 400:
        pattern = ''.join(draw.choices(WORDS, k=draw.randint(0, 5)))
        try:
            re.compile(pattern)
        except re.error:
            continue
        patterns.append(pattern)
    draw.shuffle(patterns)
    ours = Patterns(patterns)
    for name in NAMES:
        assert ours.matching(name) == tuple(pattern for pattern in patterns if re.fullmatch(pattern, name))
    for pattern in patterns:
        assert matches_any(pattern, NAMES) == any(re.fullmatch(pattern, name) for name in NAMES)


def test_the_first_counts():
    config = LoRAConfig(['.*'], rank=1, rank_pattern={r'b\..*': 2, r'a\.b': 3, '.*b': 4}, alpha_pattern={'c': 5.0})
    assert [config.rank_of(name) for name in ('b.x', 'a.b', 'c.b', 'c')] == [2, 3, 4, 1]
    assert config.alpha_of('c') == 5
    config.rank_pattern = {'c': 6}  # may be changed, as any attribute
    assert [config.rank_of(name) for name in ('b.x', 'c')] == [1, 6]


def test_plain_names_are_looked_up(monkeypatch):
    """Thousands of layers that are named exactly would take millions of expressions."""
    names = [name for name in NAMES if name]
    ours = Patterns(map(re.escape, names))
    monkeypatch.setattr(ours, '_expressions', [])
    assert [ours.matching(name) for name in names] == [(re.escape(name),) for name in names]


@pytest.mark.parametrize('pattern', ['a*a*a*b', '.*.*.*b', r'(a*)(a*)(a*)b', '(?=a*a*b)a'])
def test_patterns_of_files_have_few_steps(pattern):
    """As many as `re` may take: with these a single name takes a hundredth of a second, and many names minutes."""
    check_simple(pattern)
    own = LoRAConfig(['x'], rank_pattern={pattern: 2})
    assert own.rank_of('a' * 490) == 8
    given = LoRAConfig.from_json(own.to_json())
    assert given.rank_of('a' * 490) == 8
    with pytest.raises(InputError, match='must be simpler: with so many names, and as long ones, it takes too long'):
        for index in range(100_000):
            given.rank_of('a' * 480 + str(index))
    assert own == given
