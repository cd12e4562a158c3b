"""A network of the user's own, or of BasicSR, as a source file that stands alone."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_sr.archs import NetworkInfo
from lora_sr.errors import InputError

REGISTRIES = ('basicsr.utils.registry', 'basicsr.utils', 'lora_sr')  # what a module needs to register itself, no more
STANDARD_LIBRARY = sysconfig.get_paths()['stdlib']

# The organizers' program gives images of any size.
_PADDED_FORWARD = '''
    def forward(self, x):
        """(N, C, H, W) -> (N, C, {scale} * H, {scale} * W): padded to a multiple of {multiple}, and cropped again."""
        height, width = x.shape[-2:]
        bottom, right = -height % {multiple}, -width % {multiple}
        mode = 'reflect' if bottom < height and right < width else 'replicate'
        x = torch.nn.functional.pad(x, (0, right, 0, bottom), mode)
        return super().forward(x)[..., : height * {scale}, : width * {scale}]
'''


def write_own_source(
    network: nn.Module, arguments: Mapping[str, Any], info: NetworkInfo, title: str, class_name: str
) -> str:
    """The source of the module of a network's class, without what registers it, and a class with its arguments.

    Args:
        network: In deploy form.
        arguments: With which its class is built.
        info: Its scale and size multiple.
        title: First words of the module's docstring.
        class_name: Name of the class to write.

    Raises:
        InputError: The module cannot be found, or imports anything but torch and Python's own modules.
    """
    kind = type(network)
    try:
        source = Path(inspect.getfile(kind)).read_text(encoding='utf-8')
    except (TypeError, OSError) as error:
        raise InputError(
            f'{kind.__name__} cannot be submitted: the file of its class cannot be read: {error}.'
        ) from None
    if kind.__qualname__ != kind.__name__ or class_name == kind.__name__:
        raise InputError(f'{kind.__name__} cannot be submitted: its class must stand at the top of its file.')
    lines = source.splitlines()
    tree = ast.parse(source)
    for first, last in _registration(tree):
        line = lines[first - 1]
        indent = line[: len(line) - len(line.lstrip())]
        # In a block something has to stand.
        replaced = f'{indent}pass' if indent and not line.lstrip().startswith('@') else ''
        lines[first - 1 : last] = [replaced] + [''] * (last - first)
    for module in _imports(ast.parse('\n'.join(lines))):
        if not _is_allowed(module.split('.')[0]):
            raise InputError(
                f'{kind.__name__} cannot be submitted: its module must import torch alone, got an import of {module}.'
            )
    given = ', '.join(f'{key}={_plain(value)!r}' for key, value in arguments.items())
    padded = '' if info.size_multiple == 1 else _PADDED_FORWARD.format(scale=info.scale, multiple=info.size_multiple)
    return '\n'.join(
        [
            f'# {title}: {info.scale}x super-resolution.',
            *lines,
            *([] if 'import torch' in lines else ['', 'import torch  # noqa: E402']),
            '',
            '',
            f'class {class_name}({kind.__name__}):',
            f'    """{title}: {kind.__name__} with its sizes."""',
            '',
            '    def __init__(self):',
            f'        super().__init__({given})',
            padded,
        ]
    )


def _is_allowed(name: str) -> bool:
    """Whether a module is torch, or of Python's own."""
    if name in ('torch', '__future__', *sys.builtin_module_names, *getattr(sys, 'stdlib_module_names', ())):
        return True
    spec = importlib.util.find_spec(name) if name else None  # Python 3.9 has no list of its modules
    origin = getattr(spec, 'origin', None) or ''
    return origin.startswith(STANDARD_LIBRARY) and 'site-packages' not in origin


def _plain(value: Any) -> Any:
    """A value of an option file as its ``repr`` is Python."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _registration(tree: ast.Module) -> list[tuple[int, int]]:
    """First and last lines of imports and decorators that register."""
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in REGISTRIES:
            spans.append((node.lineno, node.end_lineno or node.lineno))
        elif isinstance(node, ast.Import) and all(alias.name in REGISTRIES for alias in node.names):
            spans.append((node.lineno, node.end_lineno or node.lineno))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            spans += [
                (decorator.lineno, decorator.end_lineno or decorator.lineno)
                for decorator in node.decorator_list
                if 'REGISTRY' in ast.dump(decorator)
            ]
    return spans


def _imports(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append('.' * node.level + (node.module or '') if node.level else node.module or '')
    return found
