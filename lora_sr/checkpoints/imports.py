"""Modules of the user's own, whose networks, losses and metrics register themselves when they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lora_sr.errors import InputError, shown

IMPORTED: list[ModuleType] = []  # in their order


def import_modules(names: Sequence[str], beside: str | os.PathLike[str] | None = None) -> None:
    """Import modules, each once.

    Args:
        names: Names as in an import statement, or paths of ``.py`` files. The folder of a file joins ``sys.path``, so
            that it may import its neighbors, and that worker processes find it.
        beside: The option file that names them, if one does: a file that is not here is looked for beside it.

    Raises:
        InputError: A module is not there, or fails to import.
    """
    if isinstance(names, str) or not all(isinstance(name, (str, os.PathLike)) for name in names):
        raise InputError(f'imports must be a list of modules and .py files, got {names!r}.')
    for name in names:
        text = os.fspath(name)
        if not text.endswith('.py') and not all(text.split('.')):
            raise InputError(
                'What is imported must be a .py file or a module, by its name in an import statement, got '
                f'"{shown(text)}".'
            )
        try:
            if Path(name).exists() and Path(name).suffix != '.py' and Path(name).suffix:
                raise InputError(f'{name} must be a module or a .py file to be imported.')
            if os.fspath(name).endswith('.py'):
                _import_file(find_file(name, beside))
            else:
                _note(importlib.import_module(name))
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # whatever a module of somebody's raises
            reason = f'{shown(type(error).__name__)}{reason_of(error)}{_place(error)}'
            raise InputError(f'The module {shown(os.fspath(name))} cannot be imported: {reason}.') from error


def find_file(name: str | os.PathLike[str], beside: str | os.PathLike[str] | None) -> Path:
    """The whole path of a ``.py`` file to import, which is here or beside the option file that names it.

    Raises:
        InputError: It is in neither place.
    """
    file = Path(name).expanduser()
    there = file if beside is None else Path(beside).parent / file
    if not file.is_file() and not there.is_file():
        places = f'{file.resolve()}' + ('' if there == file else f' or {there.resolve()}')
        raise InputError(f'There is no file {places} to import.')
    return (file if file.is_file() else there).resolve()


def reason_of(error: BaseException) -> str:
    """What somebody's code says of an error, as the end of a sentence: its first line, or nothing."""
    try:
        text = str(error).strip()
    except Exception:  # whatever a class of somebody's raises
        return ''
    return f': {shown(text.splitlines()[0])}' if text else ''


def _note(module: ModuleType) -> None:
    if module not in IMPORTED:
        IMPORTED.append(module)


def _place(error: BaseException) -> str:
    """Where in a file of the user's an error was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith('<')]
    return f' ({shown(frames[-1].filename)}, line {frames[-1].lineno})' if len(frames) > 1 else ''


def _import_file(file: Path) -> None:
    known = sys.modules.get(file.stem)
    if known is not None:
        origin = getattr(known, '__file__', None)
        if origin is not None and Path(origin).resolve() == file:
            return
        raise InputError(f'The module {file} must have a name of its own, got that of {origin or "a built-in module"}.')
    found = importlib.util.find_spec(file.stem)
    if found is not None and found.origin is not None and Path(found.origin).resolve() != file:
        raise InputError(
            f'The module {file} must have a name of its own: as {file.stem} Python would import {found.origin}.'
        )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
        _note(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
