"""From a checkpoint alone to the network it belongs to."""

from __future__ import annotations

import os

from torch import Tensor, nn

from lora_sr.adapters import add_lora, infer_lora_config, is_lora_key, lora_layers
from lora_sr.archs.any_size import take_any_size
from lora_sr.archs.dsclora import build_dsclora, is_dsclora
from lora_sr.archs.lkdn import build_lkdn, is_lkdn
from lora_sr.archs.span import build_span, is_span
from lora_sr.checkpoints.content import load_weights, read_checkpoint, without_module_prefix
from lora_sr.checkpoints.stock import STOCK_NETWORKS
from lora_sr.errors import InputError

# Family -> how it recognises its state dict, and the network that it builds for it; the first match counts.
FAMILIES = {
    'DSCLoRA': (is_dsclora, build_dsclora),
    'SPAN': (is_span, build_span),
    'LKDN': (is_lkdn, build_lkdn),
    **{network.arch.__name__: (network.recognise, network.build) for network in STOCK_NETWORKS},
}

OURS = ('DSCLoRA', 'SPAN', 'LKDN')
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


def family_of(state: dict[str, Tensor]) -> str | None:
    """The name of the network that :func:`load_network` builds for a state dict, or ``None`` where it knows none."""
    return next((name for name, (recognise, _) in FAMILIES.items() if recognise(state)), None)


def load_network(path: str | os.PathLike, param_key: str | None = None) -> nn.Module:
    """Build the network that a checkpoint belongs to and load it; its hyperparameters come from names and shapes.

    Base, training-form, adapted and merged checkpoints are told apart by their keys. An adapted one gives a network
    whose LoRA layers have the ranks and alphas of the file. The network takes images of any size, see
    :func:`lora_sr.archs.take_any_size`, except for SwinIR with an absolute position embedding, which has one size.

    What no tensor shows is taken to be as in the published checkpoints:

    - LKDN: a file of the authors' code with ``BSConvU_idt`` has the names and shapes of one with ``BSConvU``, and is
      taken for that, whose output differs.
    - SwinIR: ``img_range`` is 255 for windows of 7 without an upsampler (JPEG artefacts), else 1; no ``qk_scale``.
    - EDSR: ``res_scale`` is 0.1 from 256 channels on (EDSR-L), else 1 (EDSR-M).
    - RCAN: ``res_scale`` is 1. EDSR and RCAN: ``img_range`` is 255, ``rgb_mean`` that of DIV2K.
    - SRVGGNetCompact and ECBSR: activations without weights are ``relu``. ECBSR: ``with_idt`` is off.
    - RIDNet, as published, takes and gives values from 0 to 255, and all others from 0 to 1.

    A file of a network that was built otherwise gives other images then, without an error. Build that network, and load
    the file into it.

    Args:
        path: Checkpoint file, see :func:`read_state_dict`.
        param_key: Where the state dict is in the file; by default ``params_ema``, else ``params``, else the top.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        InputError: The file cannot be read, or belongs to no known network, or does not fit it.
    """
    state = read_state_dict(path, param_key)
    if all(map(is_lora_key, state)):
        raise InputError(f'{path} is an adapter, not a network: put it onto its base with `lora-sr adapter merge`.')
    family = family_of(state)
    if family is None:
        raise InputError(
            f'{path} belongs to no network known here ({", ".join(FAMILIES)}): its first keys are '
            f'{", ".join(list(state)[:3])}.'
        )
    try:
        network = FAMILIES[family][1](state)
        if any(map(is_lora_key, state)) and not any(True for _ in lora_layers(network)):
            add_lora(network, infer_lora_config(state))
    except InputError as error:
        raise InputError(f'{path} cannot be used: {error}') from None
    except KeyError as error:
        raise InputError(f'{path} is incomplete: it lacks {error.args[0]}.') from None
    load_weights(network, state, path)
    return take_any_size(network.eval())
