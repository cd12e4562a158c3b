"""Adapters in files: written, read, and loaded into a live network."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_sr.adapters.adapter import Adapter, adapter_for, check_values, describe_misfit, extract_adapter
from lora_sr.adapters.checkpoint import (
    LONGEST_NAME,
    exact_config,
    is_delta_key,
    is_lora_key,
    lora_state_dict,
    without_lora,
)
from lora_sr.adapters.config import LoRAConfig
from lora_sr.adapters.foreign import ForeignAdapter
from lora_sr.adapters.foreign_files import is_foreign, read_foreign, weights_file
from lora_sr.adapters.misfit import Misfit
from lora_sr.adapters.verbs import attach_updates, remove_lora
from lora_sr.errors import InputError, in_a_line, shown
from lora_sr.files import check_output, write_whole

CONFIG_KEY = 'lora_config'
SUFFIX = '.safetensors'
SHOWN_REASON = 200  # letters of why a file cannot be read


def save_adapter(
    adapter: Adapter | nn.Module,
    path: str | os.PathLike[str],
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter, or that of an adapted network, to a ``.safetensors`` file with its configuration inside.

    ``metadata`` is what else the file says of itself.

    Raises:
        InputError: The network carries no LoRA; ``path`` has another suffix, is there and ``overwrite`` is not given,
            or cannot be written. No half-written file is left behind.
    """
    check_output(path, (SUFFIX,), overwrite)
    if isinstance(adapter, nn.Module):
        adapter = extract_adapter(adapter)
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.tensors.items()}
    write_whole(path, save(tensors, metadata={CONFIG_KEY: adapter.config.to_json(), **(metadata or {})}))


def read_adapter(path: str | os.PathLike[str], base: Mapping[str, Tensor] | None = None) -> Adapter:
    """Read an adapter file: our own, or one of PEFT, of kohya's scripts or of LyCORIS.

    :class:`lora_sr.checkpoints.AdapterFile` also reads what PEFT has saved by ``torch.save``.

    Args:
        path: A safetensors file, or the folder that PEFT writes.
        base: The state dict of the base; the adapters of other programs need it.

    Raises:
        InputError: The file is missing, cannot be read, holds no adapter, has values that are not finite or an alpha
            that cannot be used, or does not fit ``base``.
    """
    adapter = _read(path)
    if base is not None:
        return _fitting(adapter, base, path, 'the base')
    if isinstance(adapter, ForeignAdapter):
        raise InputError(f'{path} is an adapter of {adapter.kind}, which is read together with its base.')
    try:
        check_values(adapter)
    except InputError as error:
        raise InputError(f'The adapter {path} cannot be used: {error}.') from None
    return adapter


def _read(path: str | os.PathLike[str]) -> Adapter | ForeignAdapter:
    path = weights_file(path)
    if not os.path.isfile(path):
        raise InputError(f'There is no adapter file {path}.')
    try:
        with safe_open(os.fspath(path), framework='pt') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        hint = '; lora_sr.checkpoints.AdapterFile reads those of torch' if path.suffix == '.bin' else ''
        reason = in_a_line(error, SHOWN_REASON).rstrip('.')  # which may quote the file
        raise InputError(f'{path} cannot be read as a safetensors file: {reason}{hint}.') from None
    for key in tensors:
        if len(key) > LONGEST_NAME or not key.isprintable():
            raise InputError(
                f'{path} is damaged: a name must be of at most {LONGEST_NAME} printable letters, got '
                f'{shown(repr(key))}.'
            )
    return parse_adapter(tensors, metadata, path)


def _fitting(
    adapter: Adapter | ForeignAdapter, base: Mapping[str, Tensor], path: str | os.PathLike[str], name: str
) -> Adapter:
    try:
        return adapter_for(adapter, base)
    except Misfit as error:
        raise InputError(f'The adapter {path} does not fit {name}: {error}.') from None
    except InputError as error:
        raise InputError(f'The adapter {path} cannot be used: {str(error).rstrip(".")}.') from None


def parse_adapter(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> Adapter | ForeignAdapter:
    """The adapter of a file that has been read: its tensors, its metadata, and PEFT's configuration beside it.

    Raises:
        InputError: It holds no adapter; ``path`` names it.
    """
    if is_foreign(tensors):
        return read_foreign(tensors, path)
    if not all(map(is_lora_key, tensors)):
        kind = 'an adapted checkpoint: extract its adapter' if any(map(is_lora_key, tensors)) else 'a base checkpoint'
        raise InputError(f'{path} is no adapter but {kind}.')
    if CONFIG_KEY not in metadata:
        raise InputError(f'{path} holds no adapter: its metadata lacks "{CONFIG_KEY}".')
    try:
        config = LoRAConfig.from_json(metadata[CONFIG_KEY])
        # The file has them in the order of the alphabet, the configuration in that of the network.
        order = {pattern: index for index, pattern in enumerate(config.target_modules)}
        keys = sorted(tensors, key=lambda key: order.get(re.escape(key.rpartition('.')[0]), len(order)))
        return Adapter(config, {key: tensors[key] for key in keys})
    except (InputError, ValueError, TypeError) as error:
        raise InputError(f'{path} cannot be used: {error}') from None


def load_adapter(model: nn.Module, adapter: Adapter | str | os.PathLike[str]) -> None:
    """Put an adapter into a live network, in the place of whatever LoRA that has. The base stays as it is.

    The new tensors are on the device and of the type of the base's, and the scale of the updates is 1. An optimizer
    that holds the former tensors has to be made anew.

    Args:
        model: A network, with LoRA on any layers and of any rank, or without.
        adapter: An adapter, or the path of an adapter file, which is read as :func:`read_adapter` does.

    Raises:
        InputError: The file is missing, is no adapter or cannot be used, or it does not fit: the layers that differ are
            named. Then ``model`` is unchanged.
    """
    what = 'The adapter' if isinstance(adapter, Adapter) else f'The adapter {adapter}'
    name, base = type(model).__name__, without_lora(model.state_dict())
    if isinstance(adapter, Adapter):
        misfit = describe_misfit(adapter, base)
        if misfit:
            raise InputError(f'{what} does not fit {name}: {misfit}.')
    else:
        adapter = _fitting(_read(adapter), base, adapter, name)
    try:
        _replace_lora(_without_values(model), adapter)
    except InputError as error:
        raise InputError(f'{what} does not fit {name}: {error}') from None
    _replace_lora(model, adapter)


@torch.no_grad()
def _replace_lora(model: nn.Module, adapter: Adapter) -> None:
    remove_lora(model)
    if not adapter.tensors:
        return
    # A module that stands under several names has tensors under each, but is adapted once.
    names = {name for name, _ in model.named_modules()}
    layers = {name: (adapter.rank_of(name), adapter.alpha_of(name)) for name in adapter.layers if name in names}
    deltas = {key: value for key, value in adapter.tensors.items() if is_delta_key(key)}
    attach_updates(model, exact_config(layers, deltas))
    own = lora_state_dict(model)
    for key, value in adapter.tensors.items():
        own[key].copy_(value)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of a network on the ``meta`` device, to try on what is to be done to the network."""
    memo = {}
    for value in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(value, device='meta')
        memo[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
