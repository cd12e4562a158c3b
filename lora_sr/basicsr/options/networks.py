"""The check of the sections `network_*`, by building what they describe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import Check
from lora_sr.checkpoints.building import construct
from lora_sr.errors import InputError


def check_networks(check: Check) -> None:
    """Check every section `network_*`, and put the networks that the run will build in `check.networks`."""
    for key in [key for key in check.opt if key.startswith('network_')]:
        has_scale = key in ('network_g', 'network_t')
        is_built = has_scale and (check.is_train or key == 'network_g')
        network = _check_network(check, key, check.opt[key], has_scale, is_built)
        if network is not None:
            check.networks[key] = network


def _check_network(check: Check, where: str, section: Any, has_scale: bool, is_built: bool) -> nn.Module | None:
    """Check the section of one network. Returns the network, or None where it is wrong, or not to be built."""
    if not check.is_section(where, section):
        return None
    arch = check.registered(f'{where}.type', section.get('type'), ARCH_REGISTRY, 'network')
    ours = schema.TEACHER if where == 'network_t' and check.ours else {}
    if arch is None or not check.arguments(where, arch, section, tuple(ours)):
        return None
    if not all([check.value(f'{where}.{key}', section[key], ours[key].kind) for key in ours.keys() & section.keys()]):
        return None
    section = {key: value for key, value in section.items() if key not in ours}
    if arch is AdaptSR and _check_network(check, f'{where}.base', section['base'], has_scale, is_built) is None:
        return None
    is_adapted = arch is AdaptSR  # and its base has been through this check
    if not is_adapted and check.opt.get('model_type') == 'SwinIRModel' and where.startswith('network_g'):
        if 'window_size' not in section:
            key = f'{where}.window_size'
            check.add_missing(f'{key} is missing; SwinIRModel reads it (SRModel does without, on an AdaptSR)', key)
            return None
    if has_scale and not _has_the_scale(check, where, section, arch):
        return None
    if not is_built:
        return None
    try:
        return construct(arch, section, where)
    except InputError as error:
        check.add(str(error))
        return None


def _has_the_scale(check: Check, where: str, section: dict, arch: Callable) -> bool:
    scale = check.opt.get('scale')
    for name in ('upscale', 'scale', 'upscale_factor'):
        parameter = inspect.signature(arch).parameters.get(name)
        if parameter is None or scale is None:
            continue
        value = section.get(name, parameter.default)
        if isinstance(value, int) and value != scale:
            default = '' if name in section else f' by default in {section["type"]}'
            check.add(f'{where}.{name} is {value}{default}, but scale is {scale}; they have to be equal')
            return False
    return True
