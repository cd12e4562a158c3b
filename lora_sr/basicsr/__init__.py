"""The plug into BasicSR: patches, registration, models, datasets, metrics, options and pipelines.

Importing this package, or any module of it, imports BasicSR first and so plugs into it (``lora_sr.hook``). Were it left
to those modules, the plug would find the one that imports BasicSR half-loaded.
"""

from __future__ import annotations

from lora_sr.errors import import_basicsr

import_basicsr('lora_sr.basicsr')


def __getattr__(name: str) -> object:
    """``OPTIMIZER_REGISTRY``, which the plug puts beside BasicSR's registries."""
    if name == 'OPTIMIZER_REGISTRY':
        from lora_sr.basicsr.patches.optimizers import optimizer_registry

        return optimizer_registry()
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
