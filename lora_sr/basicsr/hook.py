"""The import hook: what plugs this package into BasicSR when BasicSR is imported, whoever imports it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_sr.errors import InputError

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = 'basicsr'


def install() -> None:
    """Plug into BasicSR now if it has been imported, else when it is."""
    if PACKAGE in sys.modules:
        _plug()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def require_basicsr(what: str) -> None:
    """Import BasicSR, and so plug into it.

    Args:
        what: What needs it, for the message.

    Raises:
        InputError: It is not installed.
    """
    try:
        __import__(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise
        reason = 'pip install basicsr'
        if sys.version_info >= (3, 13):
            version = '.'.join(map(str, sys.version_info[:2]))
            reason = f'it does not install on Python 3.13 and later, and this is {version}; use Python 3.9 to 3.12'
        raise InputError(f'{what} needs BasicSR, which is not installed: {reason}.') from None


class _Finder:  # no subclass of importlib.abc, which takes 15 ms to import
    """Finds BasicSR by the other finders, and puts the plug behind its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        sys.meta_path.remove(self)  # the others are asked, and the next import of BasicSR finds it loaded
        try:
            spec = importlib.util.find_spec(fullname)
        except ValueError:  # a module of that name without a spec
            spec = None
        # A folder called `basicsr` without __init__.py is none: it would hide nothing, and has no loader to wrap.
        if spec is None or spec.loader is None or not hasattr(spec.loader, 'exec_module') or spec.origin is None:
            sys.meta_path.insert(0, self)
            return None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Loads BasicSR as its own loader does, between the patch that its imports need and all the rest."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> object:  # get_data, get_filename, …, which tools ask a loader for
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from lora_sr.basicsr.patches.imports import patch_torchvision_import

        module.__spec__.loader = module.__loader__ = self.loader
        patch_torchvision_import()
        try:
            self.loader.exec_module(module)
        except BaseException:
            sys.meta_path.insert(0, _Finder())  # for the next try
            raise
        _plug()


def _plug() -> None:
    from lora_sr.basicsr import patches, registration

    patches.apply()
    registration.register_all()
