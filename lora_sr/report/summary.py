"""What a checkpoint file is, in a few lines: which network in which form, how far trained, and what comes next."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from basicsr.archs.ridnet_arch import RIDNet
from torch import Tensor, nn

from lora_sr.adapters import Adapter, adapted_modules, count_parameters, extract_adapter, is_lora_key, read_adapter
from lora_sr.archs import is_training_form
from lora_sr.archs.any_size import AcceptedInput, accepted_input
from lora_sr.archs.dsclora import DSCLoRA
from lora_sr.archs.lkdn import LKDN
from lora_sr.archs.reparam import Foldable
from lora_sr.archs.span import SPAN
from lora_sr.checkpoints import load_network, read_state_dict
from lora_sr.checkpoints.content import read_checkpoint, without_module_prefix
from lora_sr.checkpoints.loading import FAMILIES, OURS, PARAM_KEYS, family_of
from lora_sr.deploy.exports.chainner import is_for_chainner
from lora_sr.deploy.submitted_networks import name_of
from lora_sr.errors import InputError
from lora_sr.report.inspection import format_inspection, inspect_network, read_network

# Discriminators of BasicSR -> keys by which they are told.
DISCRIMINATORS = {
    'UNetDiscriminatorSN': {'conv0.weight', 'conv1.weight_orig', 'conv8.weight_orig', 'conv9.weight'},
    'VGGStyleDiscriminator': {'conv0_0.weight', 'bn0_1.weight', 'linear1.weight', 'linear2.weight'},
    'StyleGAN2Discriminator': {'conv_body.0.0.weight', 'final_conv.0.weight', 'final_linear.1.weight'},
}
SHOWN_TENSORS = 8  # of a network that is not known
SMALLEST_SIDE = 16  # pixels of the image that tells the scale


@dataclass(frozen=True)
class CheckpointSummary:
    """What :func:`summarise_checkpoint` found.

    Args:
        rows: Label -> value, in the order in which they are shown; a value may have several lines.
        commands: What can be done next, as commands that name the file.
        network: The network, loaded; ``None`` where the file holds none that is known here.
    """

    rows: dict[str, str]
    commands: list[str]
    network: nn.Module | None = None

    def __str__(self) -> str:
        rows = {**self.rows, 'next': '\n'.join(self.commands)} if self.commands else self.rows
        width = max(map(len, rows)) + 2
        return '\n'.join(
            f'{"" if index else label:{width}}{line}'
            for label, value in rows.items()
            for index, line in enumerate(value.split('\n'))
        )


def inspect_file(file: str | os.PathLike, fold: bool = True) -> str:
    """What `lora-sr inspect` shows: of a checkpoint its summary, and of a network the table of its layers.

    Args:
        file: An option file (``.yml``), of whose ``network_g`` the table is, or a checkpoint.
        fold: Show equal layers of repeated blocks in one line.

    Raises:
        InputError: The file cannot be read, or the network of an option file cannot be built.
    """
    if Path(file).suffix in ('.yml', '.yaml'):
        return format_inspection(inspect_network(read_network(file)), fold)
    summary = summarise_checkpoint(file)
    if summary.network is None:
        return str(summary)
    return f'{summary}\n\n{format_inspection(inspect_network(summary.network), fold)}'


def summarise_checkpoint(path: str | os.PathLike) -> CheckpointSummary:
    """Tell what a file of weights is: a network in any form, an adapter, a discriminator, or the state of a training.

    Of several state dicts the one is looked at that the other commands read: ``params_ema``, else ``params``, else the
    file itself; where there are others alone, the first of them.

    Args:
        path: A ``.pth``, ``.safetensors`` or ``.state`` file.

    Raises:
        InputError: The file cannot be read, or holds no tensors by name.
    """
    path = Path(path)
    content = read_checkpoint(path)
    rows = {'file': f'{path}, {path.stat().st_size:,} bytes'}
    if isinstance(content.get('optimizers'), list) or {'state', 'param_groups'} <= content.keys():
        return _summarise_training_state(path, content, rows)
    param_key, state, found = _choose_state_dict(path, content)
    rows['state dicts'] = found
    if all(map(is_lora_key, state)):
        return _summarise_adapter(path, state, rows)
    family = family_of(state)
    network, obstacle = None, ''
    if family is not None:
        try:
            network = load_network(path, param_key)
        except InputError as error:  # a network of one's own may look like one that is known
            obstacle = f'looks like {family}, but {error}'
    rows['iteration'] = _iteration(path, content)
    if network is None:
        return _summarise_unknown(path, state, rows, param_key, obstacle)
    return _summarise_network(path, network, state, rows, param_key)


def _choose_state_dict(path: Path, content: dict) -> tuple[str | None, dict[str, Tensor], str]:
    """The key of the state dict that is read (``None`` for the file itself), the state dict, and all that there are."""
    nested = {key: value for key, value in content.items() if _is_state_dict(value)}
    if not nested:
        state = read_state_dict(path)
        return None, state, f'the file itself ({len(state)} tensors)'
    param_key = next((key for key in (*PARAM_KEYS, *nested) if key in nested))
    others = ', '.join(str(key) for key in content if key not in nested)
    found = (
        f'{key} ({len(value)} tensors{"; this one is read" if key == param_key and len(nested) > 1 else ""})'
        for key, value in nested.items()
    )
    beside = f'; beside {others}' if others else ''
    return param_key, without_module_prefix(nested[param_key]), ', '.join(found) + beside


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _summarise_network(
    path: Path, network: nn.Module, state: dict[str, Tensor], rows: dict[str, str], param_key: str | None
) -> CheckpointSummary:
    is_adapted, has_branches = any(True for _ in adapted_modules(network)), is_training_form(network)
    family = _family(network, is_adapted)
    accepted = accepted_input(network)
    inputs, outputs, scale = _images(network, accepted)
    counts = count_parameters(network)
    parameters = f'{counts.total:,}'
    if is_adapted:
        parameters += f', of which {counts.lora:,} are updates ({counts.lora / (counts.total - counts.lora):.1%} of'
        parameters += ' the base)'
    described = {
        'family': family,
        'form': _form(network, is_adapted, has_branches),
        'scale': f'x{scale}',
        'channels': f'{inputs} in, {outputs} out, {_width(network, inputs)} wide',
        'blocks': _blocks(network),
        'LoRA': _lora(extract_adapter(state)) if is_adapted else '',
        'parameters': parameters,
    }
    rows = {'file': rows.pop('file'), **{key: value for key, value in described.items() if value}, **rows}
    commands = []
    if is_adapted or has_branches:
        commands.append(_command('lora-sr merge', path, '-o', f'{path.stem}_merged.pth', param_key=param_key))
        if is_adapted:
            commands.append(_extract(path, param_key))
        return CheckpointSummary(rows, commands, network)
    takes_any_size = accepted is not None
    if takes_any_size and (param_key is None or param_key in PARAM_KEYS):  # else the two would not find it
        if inputs == outputs and inputs in (1, 3):
            commands.append(_command('lora-sr upscale', 'INPUT', '-m', path, '-o', 'OUTPUT'))
        if inputs == outputs == 3 and not isinstance(network, RIDNet):  # its values are those of 0 to 255
            commands.append(_command('lora-sr compare', f'{path.stem.replace("=", "_")}={path}'))
    if type(network).__name__ in OURS:
        target = ('--team', 'N', '--name', 'NAME', '-o', 'FOLDER')
        commands.append(_command('lora-sr submission', '-m', path, *target, param_key=param_key))
    exports = {'onnx': f'{path.stem}.onnx'} if takes_any_size else {}
    if takes_any_size and is_for_chainner(network):
        exports['chainner'] = f'{path.stem}_chainner.pth'
    commands += [
        _command(f'lora-sr export {kind}', path, '-o', file, param_key=param_key) for kind, file in exports.items()
    ]
    return CheckpointSummary(rows, commands, network)


def _summarise_unknown(
    path: Path, state: dict[str, Tensor], rows: dict[str, str], param_key: str | None, obstacle: str
) -> CheckpointSummary:
    rows = {'file': rows.pop('file'), **rows}
    values = sum(value.numel() for value in state.values())
    discriminator = next((name for name, keys in DISCRIMINATORS.items() if keys <= state.keys()), None)
    if discriminator or path.name.startswith('net_d_'):
        described = {
            'family': f'{discriminator or "unknown, by its name"}, a discriminator',
            'form': 'trains a generator, and upscales nothing itself',
            'values': f'{values:,}',
        }
        generator = path.with_name(path.name.replace('net_d_', 'net_g_', 1))
        commands = [_command('lora-sr inspect', generator)] if generator != path and generator.is_file() else []
        return CheckpointSummary({'file': rows.pop('file'), **described, **rows}, commands)
    has_lora = any(map(is_lora_key, state))
    described = {'family': obstacle or f'none of those known here ({", ".join(FAMILIES)})', 'form': 'no LoRA'}
    commands = []
    if has_lora:
        described['form'] = 'with LoRA beside some layers'
        try:
            described['LoRA'] = _lora(extract_adapter(state))
            merged = f'{path.stem}_merged.pth'
            commands = [
                _command('lora-sr merge', path, '-o', merged, param_key=param_key),
                _extract(path, param_key),
            ]
        except InputError as error:
            described['LoRA'] = f'incomplete: {error}'
    described['values'] = f'{values:,}'
    shown = [f'{key}  {_shape(value)}' for key, value in list(state.items())[:SHOWN_TENSORS]]
    if len(state) > SHOWN_TENSORS:
        shown.append(f'… and {len(state) - SHOWN_TENSORS} more')
    return CheckpointSummary({'file': rows.pop('file'), **described, **rows, 'tensors': '\n'.join(shown)}, commands)


def _summarise_adapter(path: Path, state: dict[str, Tensor], rows: dict[str, str]) -> CheckpointSummary:
    values = sum(value.numel() for key, value in state.items() if not key.endswith('lora_alpha'))
    try:
        adapter = read_adapter(path)
    except InputError as error:
        form = f'LoRA without a network, and no adapter file: {error}'
        return CheckpointSummary({**rows, 'form': form, 'parameters': f'{values:,}'}, [])
    described = {
        'form': 'adapter only: it goes onto a base of which the file says nothing but the names of layers',
        'LoRA': _lora(adapter),
        'layers': ', '.join([*adapter.layers[:3], *(['…'] if len(adapter.layers) > 3 else [])]),
        'parameters': f'{values:,}',
    }
    commands = [
        _command('lora-sr adapter merge', 'BASE.pth', path, '-o', f'{path.stem}_merged.pth'),
        _command('lora-sr adapter info', path),
    ]
    return CheckpointSummary({**rows, **described}, commands)


def _summarise_training_state(path: Path, content: dict, rows: dict[str, str]) -> CheckpointSummary:
    optimizers = content.get('optimizers', [content])
    values = sum(
        tensor.numel()
        for optimizer in optimizers
        for state in optimizer.get('state', {}).values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    )
    is_of_run = 'optimizers' in content
    rows['form'] = f'{"training state of a run" if is_of_run else "state of an optimizer"}, without networks'
    rows['optimizers'] = f'{len(optimizers)}, {values:,} values'
    commands = []
    if 'iter' in content:
        rows['iteration'] = f'{content["iter"]:,}, epoch {content.get("epoch", "unknown")}'
        network = path.parent.parent / 'models' / f'net_g_{content["iter"]}.pth'
        if network.is_file():
            commands.append(_command('lora-sr inspect', network))
    if is_of_run:
        commands.append('lora-sr train -opt OPTION_FILE --auto_resume')
    return CheckpointSummary(rows, commands)


def _family(network: nn.Module, is_adapted: bool) -> str:
    if isinstance(network, DSCLoRA):
        return 'DSCLoRA, i.e. ConvLoRA on SPAN'
    name = name_of(network) if isinstance(network, (SPAN, LKDN)) else type(network).__name__
    return f'AdaptSR on {name}' if is_adapted else name


def _form(network: nn.Module, is_adapted: bool, has_branches: bool) -> str:
    forms = []
    if is_adapted:
        forms.append('adapted: a base with LoRA beside it')
    if has_branches:
        branched = sum(isinstance(module, Foldable) and module.is_training_form for module in network.modules())
        forms.append(f'training form: {branched} modules have branches, which fold')
    return '; '.join(forms) or 'plain: a base, or merged, which cannot be told apart'


@torch.no_grad()
def _images(network: nn.Module, accepted: AcceptedInput | None) -> tuple[int, int, int]:
    """Channels of the input and of the output, and scale."""
    if accepted is None:  # SwinIR with an absolute position embedding: for images of one size
        channels, (height, width) = network.conv_first.in_channels, network.patches_resolution
    else:
        channels = accepted.channels
        height = width = accepted.multiple * math.ceil(SMALLEST_SIDE / accepted.multiple)
    output = network(torch.zeros(1, channels, height, width))
    return channels, output.shape[1], output.shape[-1] // width


def _width(network: nn.Module, channels: int) -> int:
    """Channels of the first convolution that widens the image; those that only shift its mean do not."""
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((conv.out_channels for conv in convolutions if conv.out_channels > channels), channels)


def _blocks(network: nn.Module) -> str:
    """How many blocks of which class a network has: the most frequent ones of its outermost level that repeats."""
    level = [network]
    while level:
        kinds = Counter(
            type(child).__name__
            for module in level
            for child in module.children()
            if any(True for _ in child.children()) and not isinstance(child, (nn.Sequential, nn.ModuleList))
        )
        for kind, count in kinds.most_common(1):
            if count > 1:
                return f'{count} {kind}'
        level = [child for module in level for child in module.children()]
    return ''


def _lora(adapter: Adapter) -> str:
    """Layers, ranks, alphas and shifts in words."""
    layers = adapter.layers
    ranks = _spread('rank', (adapter.rank_of(layer) for layer in layers))
    alphas = _spread('alpha', (adapter.alpha_of(layer) for layer in layers))
    shifts = f'; shifts of {len(adapter.shifts)} parameters' if adapter.shifts else ''
    return f'{len(layers)} layers' + (f', {ranks}, {alphas}' if layers else '') + shifts


def _spread(what: str, values: Iterable[float]) -> str:
    """``rank 8``, or ``ranks 4 (2 layers), 8 (18 layers)``."""
    counts = sorted(Counter(values).items())
    if len(counts) == 1:
        return f'{what} {counts[0][0]:g}'
    return f'{what}s ' + ', '.join(f'{value:g} ({count} layer{"s" * (count > 1)})' for value, count in counts)


def _iteration(path: Path, content: dict) -> str:
    if isinstance(content.get('iter'), int):
        return f'{content["iter"]:,}, as the file says'
    name = re.fullmatch(r'net_\w+?_(\d+|latest)', path.stem)
    if name is None:
        return 'unknown: neither the file nor its name says'
    states = path.parent.parent / 'training_states'
    if name[1] != 'latest':
        iteration = int(name[1])
        resumes = (states / f'{iteration}.state').is_file()
        return f'{iteration:,}, by its name' + ('; its training state is there, to go on from' if resumes else '')
    known = [int(state.stem) for state in states.glob('*.state') if state.stem.isdigit()]
    return 'the last of its run' + (f', whose last training state is of {max(known):,}' if known else '')


def _extract(path: Path, param_key: str | None) -> str:
    return _command('lora-sr adapter extract', path, '-o', f'{path.stem}.safetensors', param_key=param_key)


def _command(name: str, *arguments: str | os.PathLike, param_key: str | None = None) -> str:
    """A command line, quoted for a shell; a state dict that is not found by itself is named."""
    if param_key is not None and param_key not in PARAM_KEYS:
        arguments = (*arguments, '--param-key', param_key)
    return ' '.join([name, *(shlex.quote(os.fspath(argument)) for argument in arguments)])


def _shape(value: Tensor) -> str:
    return 'x'.join(map(str, value.shape)) or 'a number'
