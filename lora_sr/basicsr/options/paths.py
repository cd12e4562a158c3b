"""The check of the section `path`, of the checkpoints that it names, and of the folder that a run writes to."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from basicsr.archs.swinir_arch import SwinIR
from torch import nn

from lora_sr.archs import AdaptSR, fold
from lora_sr.archs.span import NO_NORM, SPAN, is_span
from lora_sr.basicsr.options import schema
from lora_sr.basicsr.options.check import Check
from lora_sr.checkpoints.checkpoint import ADAPTER, form_of
from lora_sr.checkpoints.content import load_weights, read_checkpoint, weights_for
from lora_sr.checkpoints.families import FAMILIES, family_of
from lora_sr.checkpoints.sections import names_file
from lora_sr.errors import InputError


def check_path(check: Check) -> None:
    """Check the section `path`, and that the checkpoints can be read and fit their networks.

    A teacher in `check.networks` has its weights afterwards, and is folded.
    """
    path: Any = check.opt.get('path')
    if 'path' not in check.opt or not check.is_section('path', path):
        return
    others = {match[1] for match in (re.fullmatch('pretrain_network_(.)', str(key)) for key in path) if match}
    check.section('path', path, also={k: v for letter in others for k, v in schema.of_network(letter, 'it').items()})
    resume = path.get('resume_state')
    files = [key for key in path if key.startswith('pretrain_network') and schema.PATH.holds(path[key])]
    for key in files:
        if f'path.{key}.' not in check.misspelled and (not check.ours or check.is_train or key != 'pretrain_network_t'):
            network = key[len('pretrain_') :]
            if network not in check.opt:
                check.add_missing(f'path.{key} is given, but there is no {network}', network)
            else:
                _check_checkpoint(check, path, key, network)
    if check.is_train and path.get('pretrain_network_g') is None and not _resumes(check):
        section = check.opt.get('network_g')
        if isinstance(section, dict) and section.get('type') == AdaptSR.__name__ and not names_file(section):
            key = 'path.pretrain_network_g'
            check.add_missing(f'{key}, the weights of the network that AdaptSR adapts, is missing', key)
    if check.is_train and schema.PATH.holds(resume):
        try:
            read_checkpoint(os.path.expanduser(str(resume)))
        except InputError as error:
            check.add(f'path.resume_state: {error}')


def _check_checkpoint(check: Check, path: dict, key: str, network: str) -> None:
    if network != 'network_t' and check.is_train and _resumes(check):
        return  # its weights will come from the run that goes on
    file = os.path.expanduser(str(path[key]))
    letter = network[len('network_') :]
    is_teacher = network == 'network_t' and check.ours
    net = check.networks.get(network)
    param_key = path.get(f'param_key_{letter}', None if is_teacher else 'params')
    if not schema.PARAM_KEY.holds(param_key):
        return
    try:
        content = read_checkpoint(file)
        if net is None:
            return
        weights = weights_for(net, content, file, param_key).state
        if form_of(weights) == ADAPTER:
            raise InputError(f'{file} is an adapter; `lora-sr adapter apply` puts it onto its base')
        other_norm = _other_norm(net, weights, file, network)
        if other_norm:  # which loads where it is not strict
            raise InputError(other_norm)
        _check_alphas(check, f'path.{key}', network, weights, file)
        try:
            load_weights(net, content, file, param_key, path.get(f'strict_load_{letter}', True))
        except InputError as error:
            reason = (
                _other_image_size(net, weights, file)
                or _other_scale(check, network, weights, file)
                or _other_network(net, weights, file)
            )
            raise InputError(reason or error) from error
        if is_teacher:
            fold(net)
    except InputError as error:
        check.add(f'path.{key}: {error}')


def _check_alphas(check: Check, where: str, network: str, weights: dict, file: str) -> None:
    """A checkpoint's alphas go before those of the option file, whose author should know."""
    own = {key: value for key, value in check.networks[network].state_dict().items() if key.endswith('.lora_alpha')}
    for key in own:
        if key in weights and weights[key] != own[key]:
            layer = key.rpartition('.')[0]
            check.add(
                f'{where}: {file} has alpha {weights[key]:g} in {layer}, but {network} {own[key]:g}; give its alpha'
            )
            return


def _other_norm(net: Any, weights: dict, file: str, network: str) -> str:
    """The sentence for a SPAN that normalizes images where the other does not; empty if that is not so."""
    if not isinstance(net, SPAN) or not is_span(weights) or net.norm != (NO_NORM in weights):
        return ''
    kind, wanted = ('with', 'true') if NO_NORM not in weights else ('without', 'false')
    return f'{file} is of a SPAN {kind} normalization: norm of {network} must be {wanted}, got {str(net.norm).lower()}'


def _other_network(net: nn.Module, weights: dict, file: str) -> str:
    """The sentence for weights of another network; empty if that is not so."""
    if isinstance(net, SPAN) and is_span(weights):  # a SPAN is the base of a DSCLoRA
        return ''
    family, own = family_of(weights), type(net).__name__
    is_other = family is not None and own in FAMILIES and family != own and family_of(net.state_dict()) != family
    return f'{file} is a checkpoint of {family}, not of {own}' if is_other else ''


def _other_image_size(net: Any, weights: dict, file: str) -> str:
    """The sentence for a SwinIR whose masks are for another size of image; empty if that is not so."""
    if not isinstance(net, SwinIR) or family_of(weights) != SwinIR.__name__:
        return ''
    others = [key for key, value in net.state_dict().items() if key in weights and weights[key].shape != value.shape]
    if not all(key.endswith('attn_mask') for key in others):
        return ''
    try:
        size = _image_size(FAMILIES[SwinIR.__name__].build(weights))
    except (KeyError, InputError):  # an incomplete file
        return ''
    own = _image_size(net)
    return f'{file} is of a SwinIR with img_size {_size(size)}, not {_size(own)}' if size != own else ''


def _image_size(net: Any) -> Sequence[int]:
    size: Sequence[int] = net.patch_embed.img_size
    return size


def _size(sides: Sequence[int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else str(list(sides))


def _other_scale(check: Check, network: str, weights: dict, file: str) -> str:
    """The sentence for weights that do not fit only because they are for another scale; empty if that is not so."""
    net, scale, own = check.networks[network], check.opt.get('scale'), check.networks[network].state_dict()
    others = {key: value for key, value in own.items() if key in weights and weights[key].shape != value.shape}
    if not isinstance(scale, int) or any(
        weights[key].ndim != value.ndim or weights[key].shape[1:] != value.shape[1:] for key, value in others.items()
    ):
        return ''
    # Before a pixel shuffle there are as many channels for each channel of the image as the square of the scale.
    scales = {scale * math.sqrt(len(weights[key]) / len(value)) for key, value in others.items()}
    if len(scales) != 1 or not min(scales).is_integer():
        return ''
    try:
        net.load_state_dict({**weights, **others})
    except (InputError, RuntimeError):  # something else does not fit either
        return ''
    layers = ', '.join(dict.fromkeys(key.rpartition('.')[0] for key in others))
    sentence = f'{file} is of scale {min(scales):.0f} and {network} of scale {scale}: all but {layers} fits'
    if check.is_train and network == 'network_g':
        return f'{sentence}; to start from it, set path.strict_load_g: false'
    return f'{sentence}; give a checkpoint of scale {scale}'


def _resumes(check: Check) -> bool:
    path = check.subsection('path')
    states = check.output_folder() / str(check.opt.get('name')) / 'training_states'
    return path.get('resume_state') is not None or (bool(check.opt.get('auto_resume')) and any(states.glob('*.state')))


def check_output(check: Check) -> None:
    """Check that the folder can be written that will hold what the run makes."""
    folder = check.output_folder()
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(0, 'it is not a folder')
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        check.add(f'the output folder {folder} cannot be written: {there}: {error.strerror}')
