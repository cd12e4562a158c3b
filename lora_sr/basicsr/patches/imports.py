"""What BasicSR imports from a module that torchvision no longer has."""

from __future__ import annotations

import importlib
import importlib.util
import sys


def patch_torchvision_import() -> None:
    """`basicsr.data.degradations` imports `torchvision.transforms.functional_tensor`, gone since torchvision 0.17.

    torchvision has it still, under a name with an underscore. Should that go as well: of what BasicSR and its clones
    want from there, `torchvision.transforms.functional` has a namesake.
    """
    transforms, name = 'torchvision.transforms', 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    private = f'{transforms}._functional_tensor'
    stand_in = private if importlib.util.find_spec(private) is not None else f'{transforms}.functional'
    sys.modules[name] = importlib.import_module(stand_in)
