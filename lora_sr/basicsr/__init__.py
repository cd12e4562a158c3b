"""The plug into BasicSR: the import hook, patches, registration, models, datasets, metrics, options and pipelines."""

from __future__ import annotations


def __getattr__(name: str) -> object:
    """``OPTIMIZER_REGISTRY``, which stands beside BasicSR's registries and needs BasicSR to be imported."""
    if name == 'OPTIMIZER_REGISTRY':
        from lora_sr.basicsr.patches.optimizers import optimizer_registry

        return optimizer_registry()
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
