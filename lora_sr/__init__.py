"""Parameter-efficient fine-tuning, distillation and deployment of super-resolution networks, a plug-in for BasicSR.

Importing this package is the whole of the plug, and costs milliseconds: when BasicSR is imported, afterwards or
already, its defects are patched, and every network, loss, dataset, metric, model and optimizer is registered there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lora_sr import hook

if TYPE_CHECKING:
    from lora_sr.checkpoints import load_network
    from lora_sr.runtime import optimize

__all__ = ['load_network', 'optimize']
__version__ = '0.2.0'

_LAZY = {'load_network': 'lora_sr.checkpoints', 'optimize': 'lora_sr.runtime'}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


hook.install()
