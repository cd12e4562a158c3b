"""Option files of any text end in one sentence, and take no memory beyond their own."""

import os

import pytest

from lora_sr.errors import InputError
from lora_sr.option_file import LARGEST_FILE, load_options


def repeated(first: str, line: str) -> str:
    """Anchors of anchors: nine levels, each ten times the one before."""
    levels = (line.format(i, ', '.join([f'*a{i - 1}'] * 10)) for i in range(1, 9))
    return '\n'.join([first, *levels])


@pytest.mark.parametrize(
    'text, message',
    [
        ('a: ' + '9' * 10**5, 'line 1: an integer must fit in 64 bits, got 999'),
        ('a: 0x' + 'f' * 10**5, 'an integer must fit in 64 bits, got 0xfff'),
        ('a: -9223372036854775809', 'an integer must fit in 64 bits, got -9223372036854775809'),
        (repeated('a0: &a0 [x, x]', 'a{0}: &a{0} [{1}]'), 'must have at most 100000 values'),
        ('a: &a {b: 1}\nc:\n  <<: [' + ', '.join(['*a'] * 101) + ']', "'<<' must merge at most 100 mappings, got 101"),
        ('[' * 10**5, 'nest'),
        ('a: &a [*a]', 'recursive'),
        ('<<: 3', 'expected a mapping'),
        ('a: !!bool ten', 'a value is not what its tag says'),
        ('a: !!int ""', 'a value is not what its tag says'),
        ('a: !!timestamp now', 'a value is not what its tag says'),
        ('a: !<' + 'x' * 5000 + '> 1', 'is refused'),
        ('"\\e[31m\\n": 1\n"\\e[31m\\n": 2', r"the key '\x1b[31m\n' is given twice"),
        (b'a: \xff', 'is not a text file in UTF-8'),
        ('#' * (LARGEST_FILE + 1), 'must have at most 1,048,576 bytes, got 1,048,577'),
    ],
)
def test_one_sentence(tmp_path, text, message):
    file = tmp_path / 'a.yml'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_options(file)
    error = str(caught.value)
    assert message in error and error.isprintable() and len(error.replace(str(file), '')) < 300


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / 'fifo.yml')
    for path, what in ((tmp_path / 'fifo.yml', 'a pipe or a device'), ('/dev/zero', 'a pipe or a device')):
        with pytest.raises(InputError, match=f'must be a file, got {what}'):
            load_options(path)


def test_large_numbers_and_anchors_stay(tmp_path):
    file = tmp_path / 'a.yml'
    file.write_text('a: &a {b: 9223372036854775807}\nc: {<<: [*a], d: 0b11}\ne: *a')
    assert load_options(file) == {'a': {'b': 2**63 - 1}, 'c': {'b': 2**63 - 1, 'd': 3}, 'e': {'b': 2**63 - 1}}
