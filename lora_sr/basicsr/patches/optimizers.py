"""Any optimizer of torch, of a package, and those that are registered, under ``train.optim_*.type``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_sr.basicsr.patches.tools import is_defective, patch
from lora_sr.checkpoints.imports import reason_of
from lora_sr.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from basicsr.utils.registry import Registry


def optimizer_registry() -> Registry:
    """The registry that ``train.optim_*.type`` is looked up in before ``torch.optim``.

    It is a BasicSR registry and stands beside BasicSR's others.
    """
    from basicsr.utils import registry

    if not hasattr(registry, 'OPTIMIZER_REGISTRY'):
        registry.OPTIMIZER_REGISTRY = registry.Registry('optimizer')
    return registry.OPTIMIZER_REGISTRY


def patch_get_optimizer() -> None:
    """``BaseModel.get_optimizer`` knows only Adam (a model that overrides it keeps its own)."""
    from basicsr.models.base_model import BaseModel

    if not is_defective(BaseModel.get_optimizer, 'NotImplementedError'):
        return

    @patch
    def get_optimizer(
        self: Any, optim_type: str, params: Iterable[Any], lr: float, **kwargs: Any
    ) -> torch.optim.Optimizer:
        optimizer: Any = find_optimizer(optim_type)
        known = inspect.signature(optimizer).parameters
        params = list(params)
        kwargs = {**_fast_on_gpu(known, params, kwargs, self.opt.get('train') or {}), **kwargs}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        unknown = [] if takes_any else [key for key in kwargs if key not in known]
        if unknown:
            raise InputError(
                f'{optim_type} takes no {", ".join(unknown)}; its options are {", ".join(list(known)[1:])}.'
            )
        try:
            return optimizer(params, lr=lr, **kwargs)
        except Exception as error:  # a package may have classes of its own
            raise InputError(f'{optim_type} cannot be set up with lr={lr}, {kwargs}: {error}') from error

    BaseModel.get_optimizer = get_optimizer


def _fast_on_gpu(
    known: Mapping[str, Any], params: list[Any], given: Mapping[str, Any], train: Mapping[str, Any]
) -> dict[str, bool]:
    """The options with which an optimizer takes few kernels a step, or leaves a CUDA graph nothing to wait for."""
    weights = [weight for one in params for weight in (one['params'] if isinstance(one, dict) else [one])]
    if not weights or not all(weight.is_cuda and weight.is_floating_point() for weight in weights):
        return {}
    fast = {'fused': True} if not given.keys() & {'fused', 'foreach'} else {}
    if train.get('graph'):
        fast['capturable'] = True
    return {key: value for key, value in fast.items() if key in known}


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class of that name, from ``optimizer_registry()`` or else from ``torch.optim``.

    Args:
        name: The name, or for a class of any other package ``package.Class``.

    Raises:
        InputError: There is none; the nearest names are told. Or the package cannot be imported.
    """
    module, _, last = str(name).rpartition('.')
    if module:
        try:
            found = importlib.import_module(module)
            optimizer = getattr(found, last, None)  # some packages import a class only when it is asked for
        except (Exception, SystemExit) as error:  # whatever a package of somebody's raises
            hint = '; it has to be installed' if isinstance(error, ModuleNotFoundError) else ''
            raise InputError(f"the package of '{name}' cannot be imported{reason_of(error)}{hint}") from error
        if not _is_optimizer(optimizer):
            near = [key for key, value in vars(found).items() if _is_optimizer(value)]
            hint = f'; {did_you_mean(last, near)}' if near else ''
            raise InputError(f"there is no optimizer '{last}' in {module}{hint}")
        return cast('type[torch.optim.Optimizer]', optimizer)
    known = {key: value for key, value in vars(torch.optim).items() if _is_optimizer(value)}
    known.update(iter(optimizer_registry()))
    if name not in known:
        raise InputError(f"there is no optimizer '{name}'; {did_you_mean(str(name), known)}")
    return known[name]


def _is_optimizer(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
