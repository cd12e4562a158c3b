"""What the patches share: telling a defect, and replacing a function in every module that holds it."""

from __future__ import annotations

import contextlib
import inspect
import sys


def patch(function):
    """Mark a function as one of ours, which is not to be mended again."""
    function.is_patch = True
    return function


def is_defective(function, name: str, without: str = '') -> bool:
    """Whether the code of `function` uses `name`, but not `without`, as a later BasicSR might."""
    if getattr(function, 'is_patch', False):
        return False
    code = inspect.unwrap(function).__code__
    # Names of keyword arguments stand among the constants, in a tuple.
    keywords = [name for constant in code.co_consts if isinstance(constant, tuple) for name in constant]
    names = [*code.co_names, *code.co_varnames, *keywords]
    return name in names and without not in names


def replace_everywhere(original, replacement) -> None:
    """Put `replacement` wherever a loaded module holds `original`, under whatever name."""
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        for name in [name for name, value in list(names.items()) if value is original]:
            names[name] = replacement


@contextlib.contextmanager
def swapped(namespace: dict, **values):
    """Hold other values in a namespace for a while."""
    before = {name: namespace[name] for name in values}
    namespace.update(values)
    try:
        yield
    finally:
        namespace.update(before)
