"""The page of families says what the script finds: each cell is tried again."""

import importlib.util
import re

import pytest
from tiny_run import REPOSITORY

from lora_sr.checkpoints.families import FAMILIES
from lora_sr.runtime.native.library import load_library

spec = importlib.util.spec_from_file_location('family_reference', REPOSITORY / 'scripts' / 'family_reference.py')
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


def test_every_family_has_a_row():
    assert reference.SECTIONS.keys() == FAMILIES.keys()
    names = reference.document(line=lambda name: f'| {name} |')
    committed = reference.DOCUMENT.read_text(encoding='utf-8')
    rows = '|'.join(map(re.escape, reference.rows()))
    assert re.sub(rf'^(\| ({rows}) \|).*$', r'\1', committed, flags=re.M) == names, f'run {reference.COMMAND}'


@pytest.mark.slow
@pytest.mark.parametrize('name', reference.rows())
def test_a_row_says_what_can_be_done(name):
    if load_library() is None:
        pytest.skip('there is no C++ compiler for the kernels')
    lines = reference.DOCUMENT.read_text(encoding='utf-8').splitlines()
    assert reference.row(name) in lines, f'run {reference.COMMAND}'
