"""What the patches share: telling a defect, and replacing a function in every module that holds it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any, Callable, TypeVar

Function = TypeVar('Function', bound=Callable[..., Any])


def patch(function: Function) -> Function:
    """Mark a function as one of ours, which is not to be patched again."""
    vars(function)['is_patch'] = True
    return function


def is_patch(function: Callable[..., Any]) -> bool:
    """Whether a function is one of ours."""
    return getattr(function, 'is_patch', False)


def is_defective(function: Callable[..., Any], name: str, without: str | None = None) -> bool:
    """Whether the code of ``function`` uses ``name``, but not ``without``, as a later BasicSR might."""
    if is_patch(function):
        return False
    code = inspect.unwrap(function).__code__
    # Keys stand among the constants; names of keyword arguments do so, too, in a tuple.
    tuples = [constant if isinstance(constant, tuple) else (constant,) for constant in code.co_consts]
    names = [*code.co_names, *code.co_varnames, *(name for names in tuples for name in names)]
    return name in names and (without is None or without not in names)


def replace_everywhere(original: object, replacement: object) -> None:
    """Put ``replacement`` wherever a loaded module holds ``original``, under whatever name."""
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        for name in [name for name, value in list(names.items()) if value is original]:
            names[name] = replacement


@contextlib.contextmanager
def swapped(namespace: dict[str, Any], **values: object) -> Iterator[None]:
    """Hold other values in a namespace for a while."""
    before = {name: namespace[name] for name in values}
    namespace.update(values)
    try:
        yield
    finally:
        namespace.update(before)
