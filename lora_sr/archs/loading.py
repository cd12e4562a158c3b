"""From a checkpoint alone to the network it belongs to."""

from __future__ import annotations

import os

from torch import Tensor, nn

from lora_sr.adapters import add_lora, infer_lora_config, is_lora_key, lora_layers
from lora_sr.archs.dsclora_arch import build_dsclora, is_dsclora
from lora_sr.archs.lkdn_arch import build_lkdn, is_lkdn
from lora_sr.archs.span_arch import build_span, is_span
from lora_sr.checkpoint_file import load_weights, read_checkpoint, without_module_prefix
from lora_sr.errors import InputError

# How a family recognises its state dict, and the network that it builds for it; the first match counts.
FAMILIES = ((is_dsclora, build_dsclora), (is_span, build_span), (is_lkdn, build_lkdn))

PARAM_KEYS = ('params_ema', 'params')


def read_state_dict(path: str | os.PathLike, param_key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU.

    Args:
        path: A ``.pth`` file, with the state dict at its top or under ``params_ema`` / ``params`` as BasicSR writes
            it, or a ``.safetensors`` file. A leading ``module.`` of the names (DataParallel) is removed.
        param_key: Where the state dict is in the file. By default ``params_ema``, else ``params``, else the top.

    Raises:
        InputError: The file is missing, is no checkpoint, or does not have ``param_key``.
    """
    content = read_checkpoint(path)
    if param_key is None:
        param_key = next((key for key in PARAM_KEYS if key in content), None)
    elif param_key not in content:
        raise InputError(f'{path} has no "{param_key}": it has {", ".join(list(content)[:4])}.')
    state = content if param_key is None else content[param_key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f'{path} holds no state dict, i.e. no mapping of names to tensors.')
    return without_module_prefix(state)


def load_network(path: str | os.PathLike, param_key: str | None = None) -> nn.Module:
    """Build the network that a checkpoint belongs to and load it; its hyperparameters come from names and shapes.

    Base, training-form, adapted and merged checkpoints are told apart by their keys. An adapted one gives a network
    whose LoRA layers have the ranks and alphas of the file.

    One form cannot be told: an LKDN file of the authors' code with ``BSConvU_idt`` has the names and shapes of one with
    ``BSConvU``, and is taken for that, whose output differs. Build that network and load the file into it.

    Args:
        path: Checkpoint file, see :func:`read_state_dict`.
        param_key: Where the state dict is in the file; by default ``params_ema``, else ``params``, else the top.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        InputError: The file cannot be read, or belongs to no known network, or does not fit it.
    """
    state = read_state_dict(path, param_key)
    build = next((build for recognise, build in FAMILIES if recognise(state)), None)
    if build is None:
        raise InputError(
            f'{path} belongs to no network known here (SPAN, DSCLoRA, LKDN): its first keys are '
            f'{", ".join(list(state)[:3])}.'
        )
    try:
        network = build(state)
        if any(map(is_lora_key, state)) and not any(True for _ in lora_layers(network)):
            add_lora(network, infer_lora_config(state))
    except InputError as error:
        raise InputError(f'{path} cannot be used: {error}') from None
    load_weights(network, state, path)
    return network.eval()
