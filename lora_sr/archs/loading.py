"""From a checkpoint alone to the network it belongs to."""

from __future__ import annotations

import os

from torch import Tensor, nn

from lora_sr.adapters import LoRAConfig, add_lora, is_lora_key
from lora_sr.archs.dsclora_arch import DSCLoRA
from lora_sr.archs.span_arch import SPAN, is_span, span_hyperparameters
from lora_sr.checkpoint_file import load_weights, read_checkpoint, without_module_prefix
from lora_sr.errors import InputError

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

    Args:
        path: Checkpoint file, see :func:`read_state_dict`.
        param_key: Where the state dict is in the file; by default ``params_ema``, else ``params``, else the top.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        InputError: The file cannot be read, or belongs to no known network, or does not fit it.
    """
    state = read_state_dict(path, param_key)
    if not is_span(state):
        raise InputError(
            f'{path} belongs to no network known here (SPAN, DSCLoRA): its first keys are {", ".join(list(state)[:3])}.'
        )
    network = SPAN(**span_hyperparameters(state))
    if any(map(is_lora_key, state)):
        network = _adapt(network, state, path)
    load_weights(network, state, path)
    return network.eval()


def _adapt(network: SPAN, state: dict[str, Tensor], path) -> SPAN:
    """``network`` with LoRA on the layers that carry it in ``state``, as DSCLoRA where they are DSCLoRA's layers."""
    ranks, alphas = {}, {}
    for key in state:
        layer, _, tensor = key.rpartition('.')
        if tensor != 'lora_A':
            continue
        if f'{layer}.lora_alpha' not in state:
            raise InputError(f'{path} has {key} but no {layer}.lora_alpha, so the scale of the update is unknown.')
        name = layer.replace('.', r'\.')
        ranks[name] = state[key].shape[0] // state[f'{layer}.weight'].shape[2]
        alphas[name] = state[f'{layer}.lora_alpha'].item()
    if not ranks:
        raise InputError(f'{path} has LoRA tensors but no lora_A: it is incomplete.')
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = LoRAConfig(list(ranks), rank=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas)
    dsclora = DSCLoRA(feature_channels=network.feature_channels, upscale=network.upscale)
    same_layers = {k for k in dsclora.state_dict() if is_lora_key(k)} == {k for k in state if is_lora_key(k)}
    if same_layers:
        return DSCLoRA(
            feature_channels=network.feature_channels,
            upscale=network.upscale,
            rank=rank,
            alpha=alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
    return add_lora(network, config)
