"""Networks by name: those of this package, and those of BasicSR's registry."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

from lora_sr.archs.disp import DISP
from lora_sr.archs.dscf_fused import DSCFFused
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN, LKDN_S
from lora_sr.archs.span import SPAN
from lora_sr.archs.spanf import SPANF
from lora_sr.archs.spanv2 import SPANV2
from lora_sr.errors import import_basicsr

Arch = Callable[..., nn.Module]
OWN: dict[str, Arch] = {
    network.__name__: network for network in (DISP, DSCFFused, DSCLoRA, LKDN, LKDN_S, SPAN, SPANF, SPANV2)
}
SUFFIX = '_basicsr'  # behind what Real-ESRGAN registers too


def is_ours(network: nn.Module) -> bool:
    """Whether a network is of a class of this package."""
    return type(network) in OWN.values()


def known_archs() -> dict[str, Arch]:
    """Every network that has a name: those of BasicSR's registry, among them those of this package.

    Raises:
        InputError: BasicSR is not installed.
    """
    import_basicsr('the registry of networks')
    from basicsr.utils.registry import ARCH_REGISTRY

    archs: dict[str, Arch] = dict(iter(ARCH_REGISTRY))
    return {**{name[: -len(SUFFIX)]: arch for name, arch in archs.items() if name.endswith(SUFFIX)}, **archs}


def find_arch(name: str) -> Arch | None:
    """The network of that name, or None.

    Where BasicSR has not been imported, this package's own networks are found without it.

    Raises:
        InputError: The name is not of this package, and BasicSR is not installed.
    """
    if name in OWN and 'basicsr' not in sys.modules:
        return OWN[name]
    return known_archs().get(name)
