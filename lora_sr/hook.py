"""The import hook: what plugs this package into BasicSR when BasicSR is imported, whoever imports it.

It stands beside ``lora_sr.basicsr``, not inside: that package needs BasicSR, and every ``import lora_sr`` needs this
module. Nothing but small modules of the standard library is imported here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = 'basicsr'


def install() -> None:
    """Plug into BasicSR, now if it has been imported, else when it has loaded. May be called again."""
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if not _is_regular_package(sys.modules.get(PACKAGE)):
        return
    loading = _loading_spec()
    if loading is None:
        _plug()
    else:  # a module of a clone imports us while BasicSR imports that module
        _call_when_loaded(loading, _plug)
        patch_torchvision_import()


class _Finder:  # no subclass of importlib.abc, which takes 15 ms to import
    """Finds BasicSR by the other finders, and puts the plug behind its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        for finder in list(sys.meta_path):
            find_spec = None if _is_ours(finder) else getattr(finder, 'find_spec', None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                break
        else:
            return None
        # A folder called `basicsr` without __init__.py has no origin: it is somebody's data, say, and stays what it is.
        if spec.origin is not None and hasattr(spec.loader, 'exec_module'):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Loads BasicSR as its own loader does, between the patch that its imports need and all the rest."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> object:  # get_data, get_filename, …, which tools ask a loader for
        if name == 'loader' or name.startswith('__'):  # while it is copied or unpickled there is no loader yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self.loader  # from here on BasicSR looks as it does without us
        patch_torchvision_import()
        self.loader.exec_module(module)
        _plug()


def _is_ours(finder: object) -> bool:
    """Whether a finder is a ``_Finder``, also one from before this module was reloaded."""
    return type(finder).__module__ == __name__


def _is_regular_package(module: ModuleType | None) -> bool:
    """Whether a module comes from a file, unlike a mere folder, a stub, or the None that forbids an import."""
    return getattr(module, '__file__', None) is not None


def _loading_spec() -> ModuleSpec | None:
    """The spec of the module of BasicSR that is loading, the outermost of them, which began first."""
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] == PACKAGE:
            spec = getattr(module, '__spec__', None)
            if getattr(spec, '_initializing', False):
                return spec
    return None


def _call_when_loaded(spec: Any, call: Callable[[], None]) -> None:
    """Call something as soon as a module that is loading has been loaded; not if its loading fails.

    The import system has no event for that, but marks a spec as ``_initializing`` and takes the mark away at the end,
    in the thread that loads the module.
    """
    original: Any = type(spec)

    class LoadingSpec(original):
        @property
        def _initializing(self) -> bool:
            return self.__dict__['_initializing']

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__dict__['_initializing'] = value
            if not value:
                self.__class__ = original
                if self.name in sys.modules:
                    call()

    spec.__class__ = LoadingSpec
    if not spec._initializing and type(spec) is LoadingSpec:  # another thread has loaded it in this instant
        spec._initializing = False


def patch_torchvision_import() -> None:
    """Patch what keeps BasicSR from being imported; all other patches wait until it has been.

    ``basicsr.data.degradations`` imports ``torchvision.transforms.functional_tensor``, gone since torchvision 0.17.
    torchvision has it still, under a name with an underscore. Should that go as well: what BasicSR and its clones want
    from there has a namesake in ``torchvision.transforms.functional``.
    """
    transforms, name = 'torchvision.transforms', 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    private = f'{transforms}._functional_tensor'
    stand_in = private if importlib.util.find_spec(private) is not None else f'{transforms}.functional'
    sys.modules[name] = importlib.import_module(stand_in)


def _plug() -> None:
    """Patch and extend BasicSR, which has loaded."""
    try:
        importlib.import_module(f'{PACKAGE}.utils.registry')
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] != PACKAGE:
            raise
        import logging

        logging.getLogger(PACKAGE).warning(
            'lora_sr plugs into BasicSR 1.4 and later; the one in %s has no registries and is left as it is.',
            sys.modules[PACKAGE].__file__,
        )
        return
    from lora_sr.basicsr import log, patches, registration

    patches.apply()
    registration.register_all()
    log.join_logs()
