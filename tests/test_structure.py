"""The rooms of the package: who may import whom, held against the imports in the code.

Imports inside functions count everywhere, since they bind two modules as much as those at the top. Imports under
``TYPE_CHECKING`` count for the rooms, as a type from above is knowledge of what is above, but not for the circles,
as they never run.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'lora_sr'

BASE = {'adapted_folder', 'errors', 'figures', 'files', 'metrics_file', 'option_file', 'share', 'threads'}
FLOOR_0 = BASE | {'adapters', 'optim', 'losses', 'images'}
FLOOR_1 = {'archs', 'checkpoints', 'data'}
FLOOR_2 = {'runtime', 'basicsr'}
FLOOR_3 = {'deploy', 'report', 'adapt'}
FLOOR_4 = {'benchmarks', 'cli', 'train', 'test'}
EVERYTHING = FLOOR_0 | FLOOR_1 | FLOOR_2 | FLOOR_3 | FLOOR_4

# A room may import itself and these. The root stands for lora_sr/__init__.py; every room may import it.
ALLOWED = {
    '__init__': {'hook', 'checkpoints', 'runtime'},  # the last two as types, and on demand
    'hook': {'errors', 'basicsr'},  # it plugs the plug in, once BasicSR is there
    'adapted_folder': set(),
    'errors': set(),
    'figures': {'errors'},
    'files': {'errors'},
    'metrics_file': {'errors', 'files'},
    'threads': set(),
    'option_file': {'errors', 'files'},
    'share': {'errors', 'files'},
    **dict.fromkeys(('adapters', 'optim', 'losses', 'images'), BASE),
    **dict.fromkeys(('archs', 'data'), FLOOR_0),
    'checkpoints': FLOOR_0 | FLOOR_1,
    'runtime': FLOOR_0 | FLOOR_1,
    'basicsr': FLOOR_0 | FLOOR_1 | {'runtime'},  # which computes a teacher's outputs, and knows nothing of BasicSR
    **dict.fromkeys(FLOOR_3, FLOOR_0 | FLOOR_1 | FLOOR_2),
    **dict.fromkeys(FLOOR_4, EVERYTHING),
    'benchmarks': EVERYTHING | {'hook'},  # which they take out, to measure BasicSR without us
}

# What the rooms that run without BasicSR may import of others: anywhere, and inside functions alone.
THIRD_PARTIES: dict[str, tuple[set[str], set[str]]] = {
    '__init__': (set(), set()),
    'hook': (set(), set()),
    'adapted_folder': (set(), set()),
    'errors': (set(), {'basicsr'}),
    'figures': ({'matplotlib'}, set()),  # at its top for types alone
    'files': (set(), {'torch'}),
    'metrics_file': (set(), set()),
    'threads': (set(), set()),
    'option_file': ({'yaml'}, set()),
    'share': (set(), set()),
    'adapters': ({'torch', 'safetensors'}, set()),
    'optim': ({'torch', 'adan_pytorch'}, set()),
    'losses': ({'torch'}, set()),
    'images': ({'numpy', 'cv2', 'PIL'}, set()),
    'archs': ({'torch'}, {'basicsr'}),
    'checkpoints': ({'torch', 'safetensors'}, {'basicsr', 'spandrel'}),
    'data': ({'numpy', 'cv2', 'lmdb', 'tqdm'}, set()),
    'runtime': ({'torch', 'numpy'}, set()),
}


@dataclass(frozen=True)
class Import:
    """One imported module: by whom, at which line, whether for types alone, and whether inside a function."""

    importer: str
    target: str
    line: int
    for_types: bool = False
    in_function: bool = False

    def __str__(self) -> str:
        return f'{self.importer}:{self.line} imports {self.target}'


def module_name(file: Path) -> str:
    """``lora_sr/archs/span.py`` -> ``lora_sr.archs.span``, ``lora_sr/archs/__init__.py`` -> ``lora_sr.archs``."""
    parts = file.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob('*.py'))}


def imports_of(module: str, tree: ast.Module, is_package: bool, modules: set[str]) -> list[Import]:
    """The imports in a module's code; ``from a import b`` is of ``a.b`` where that is a module, else of ``a``."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test)]
    for_types = {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    in_function = {inner for function in functions for inner in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ''
            if node.level:
                parts = module.split('.')
                parents = parts[: len(parts) - node.level + is_package]
                source = '.'.join([*parents, *filter(None, [node.module])])
            # The root offers names from above: each counts as a room, which no room may import.
            is_offer = [source == PACKAGE.name and not alias.name.startswith('__') for alias in node.names]
            names = [f'{source}.{alias.name}' for alias in node.names]
            targets = [name if name in modules or offer else source for name, offer in zip(names, is_offer)]
        else:
            continue
        for target in dict.fromkeys(targets):
            found.append(Import(module, target, node.lineno, node in for_types, node in in_function))
    return found


IMPORTS = [
    found
    for module, file in FILES.items()
    for found in imports_of(module, ast.parse(file.read_text('utf-8')), file.name == '__init__.py', set(FILES))
]


def room_of(module: str) -> str:
    """The folder or file right below ``lora_sr`` that a module of ours lives in."""
    return module.partition('.')[2].partition('.')[0] or '__init__'


def is_ours(module: str) -> bool:
    return module.partition('.')[0] == PACKAGE.name


def is_allowed(found: Import) -> bool:
    here, there = room_of(found.importer), room_of(found.target)
    inner = found.target.partition('.')[2]
    return there in ('__init__', here) or bool({there, inner} & ALLOWED.get(here, set()))


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], index[other])
        if lowest[node] == index[node]:
            position = stack.index(node)
            group = stack[position:]
            del stack[position:]
            if len(group) > 1 or node in edges[node]:
                groups.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return groups


def test_every_room_is_in_the_table():
    rooms = {room_of(module) for module in FILES}
    assert rooms <= ALLOWED.keys()
    assert len(FILES) > 80 and len(IMPORTS) > 500  # the search finds the code


def test_rooms_import_only_what_lies_below():
    assert [str(found) for found in IMPORTS if is_ours(found.target) and not is_allowed(found)] == []


@pytest.mark.skipif(
    sys.version_info < (3, 10), reason='the names of the standard library are known from Python 3.10 on'
)
def test_low_rooms_do_without_basicsr_and_what_it_brings():
    foreign = []
    for found in IMPORTS:
        room, root = room_of(found.importer), found.target.partition('.')[0]
        if room in THIRD_PARTIES and not is_ours(found.target) and root not in sys.stdlib_module_names:
            anywhere, in_functions = THIRD_PARTIES[room]
            if root not in anywhere and not (found.in_function and root in in_functions):
                foreign.append(str(found))
    assert foreign == []


def test_no_circles():
    """The root does not count: whoever imports any module of a package imports its root first."""
    edges: dict[str, set[str]] = {module: set() for module in FILES}
    for found in IMPORTS:
        if found.target in FILES and found.target != PACKAGE.name and not found.for_types:
            edges[found.importer].add(found.target)
    assert circles(edges) == []


class TestTheSearchItself:
    CODE = """
import os, lora_sr.files
from typing import TYPE_CHECKING
from lora_sr import errors, load_network, __version__
from . import layers
from .. import cli
from ..runtime.tiling import Tiler
if TYPE_CHECKING:
    from lora_sr.report import tables
def work():
    from lora_sr.deploy.merge import merge
"""
    MODULES = {'lora_sr.errors', 'lora_sr.cli', 'lora_sr.adapters.layers', 'lora_sr.report.tables'}

    def kinds(self, module: str, is_package: bool) -> dict[str, str]:
        found = imports_of(module, ast.parse(self.CODE), is_package, self.MODULES)
        return {each.target: 't' * each.for_types + 'f' * each.in_function for each in found if is_ours(each.target)}

    @pytest.mark.parametrize(('module', 'is_package'), [('lora_sr.adapters', True), ('lora_sr.adapters.config', False)])
    def test_finds_every_kind_of_import(self, module, is_package):
        plain = ('', '.files', '.errors', '.load_network', '.adapters.layers', '.cli', '.runtime.tiling')
        assert self.kinds(module, is_package) == {
            **{f'lora_sr{name}': '' for name in plain},
            'lora_sr.report.tables': 't',
            'lora_sr.deploy.merge': 'f',
        }

    @pytest.mark.parametrize(
        ('importer', 'target', 'allowed'),
        [
            ('adapters.verbs', 'errors', True),
            ('adapters.verbs', 'losses.psnr', False),
            ('archs.span', 'checkpoints.loading', False),
            ('archs.span', 'adapters', True),
            ('checkpoints.loading', 'archs.span', True),
            ('runtime.upscaler', 'basicsr.models', False),
            ('report.summary', 'deploy.merge', False),
            ('report.summary', 'runtime', True),
            ('cli.main', 'report.summary', True),
            ('data.prepare', 'data.sources', True),
            ('data.prepare', 'load_network', False),
        ],
    )
    def test_reads_the_table(self, importer, target, allowed):
        assert is_allowed(Import(f'lora_sr.{importer}', f'lora_sr.{target}', 1)) is allowed

    def test_the_root_may_import_nothing_of_the_plug_but_its_hook(self):
        assert is_allowed(Import('lora_sr', 'lora_sr.hook', 1))
        assert not is_allowed(Import('lora_sr', 'lora_sr.basicsr.models', 1))

    def test_finds_circles(self):
        edges = {'a': {'b'}, 'b': {'c'}, 'c': {'b', 'd'}, 'd': set(), 'e': {'e'}}
        assert circles(edges) == [['b', 'c'], ['e']]
