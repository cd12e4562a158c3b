"""What BasicSR imports from a module that torchvision no longer has."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types


def patch_torchvision_import() -> None:
    """`basicsr.data.degradations` imports `torchvision.transforms.functional_tensor`, gone since torchvision 0.17.

    Only `rgb_to_grayscale` is wanted from there, and `torchvision.transforms.functional` has it.
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    from torchvision.transforms.functional import rgb_to_grayscale

    module = types.ModuleType(name, 'What BasicSR imports from a module that torchvision no longer has.')
    module.rgb_to_grayscale = rgb_to_grayscale
    sys.modules[name] = module
