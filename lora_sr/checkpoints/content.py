"""Checkpoint files: read without running code, and written whole or not at all."""

import logging
import os
from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch

from lora_sr.adapters import is_lora_key
from lora_sr.errors import InputError

LOG = logging.getLogger('basicsr')


def read_checkpoint(path) -> dict:
    """Read a checkpoint or a training state onto the CPU, from torch's format (`weights_only=True`) or safetensors.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors and plain values.
    """
    try:
        if os.fspath(path).endswith('.safetensors'):
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        raise InputError(f'the checkpoint {path} cannot be read: {error.strerror or error}') from error
    except Exception as error:  # torch raises half a dozen types for a file that is none of its own
        if Path(path).suffix in ('.yml', '.yaml'):
            raise InputError(f'{path} is an option file, where a checkpoint is right') from error
        raise InputError(f'the checkpoint {path} is damaged, or holds more than tensors and plain values') from error
    if not isinstance(content, dict):
        raise InputError(f'the checkpoint {path} holds a {type(content).__name__}, not a dictionary of tensors')
    return content


def load_weights(net, content: dict, path, param_key=None, strict=True, tell_differences=None) -> None:
    """Load weights into a network as BasicSR does: from under `param_key`, else `params`; all of it if it is None.

    Args:
        content: what `read_checkpoint` gave.
        path: the file that it came from, for messages.
        tell_differences: a function of the network, the weights and `strict` that logs where they differ.

    Raises:
        InputError: there are no such weights in `content`, or they do not fit.
    """
    if param_key is not None:
        if param_key not in content and 'params' in content:
            param_key = 'params'
        if param_key not in content:
            raise InputError(
                f"{path} has no '{param_key}'; its keys begin with {', '.join(list(map(str, content))[:3])} "
                '(for a file of plain weights, set the param_key in the section path to ~)'
            )
        content = content[param_key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        there = [key for key in ('params', 'params_ema') if isinstance(content, dict) and key in content]
        hint = (
            f'; they are under {" and ".join(there)}, which the param_key in the section path has to name'
            if there
            else ''
        )
        raise InputError(f'{path} holds no weights {"at its top" if param_key is None else f"under {param_key}"}{hint}')
    weights = without_module_prefix(content)
    if tell_differences is not None:
        LOG.info(f'Loading {type(net).__name__} model from {path}, with param key: [{param_key}].')
        tell_differences(net, weights, strict)
    elif not strict:
        weights = {
            k: v for k, v in weights.items() if k not in net.state_dict() or net.state_dict()[k].shape == v.shape
        }
    try:
        net.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        raise InputError(f'{path} does not fit {type(net).__name__}: {_misfit(net, weights) or error}') from error


def without_module_prefix(weights: dict) -> OrderedDict:
    """Weights on the CPU, without the `module.` that DataParallel puts before their names."""
    renamed = OrderedDict()
    for key, value in weights.items():
        renamed[key[len('module.') :] if key.startswith('module.') else key] = value.cpu()
    if hasattr(weights, '_metadata'):  # the versions of the modules, which some of them look at when they load
        renamed._metadata = weights._metadata
    return renamed


def _misfit(net: torch.nn.Module, weights: dict) -> str:
    own = net.state_dict()
    has_lora = any(map(is_lora_key, weights))
    parts = []
    for what, keys in (
        # A base checkpoint may lack every LoRA tensor of an adapted network.
        ('missing', [key for key in own if key not in weights and (has_lora or not is_lora_key(key))]),
        ('not known to it', [key for key in weights if key not in own]),
    ):
        if keys:
            parts.append(f'{len(keys)} keys are {what} (the first is {keys[0]})')
    for key in own:
        if key in weights and own[key].shape != weights[key].shape:
            parts.append(f'{key} has shape {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}')
            break
    return ', '.join(parts)
