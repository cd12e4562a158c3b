"""What a checkpoint file is, in a few lines: which network in which form, how far trained, and what comes next."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_sr.adapters import (
    Adapter,
    ForeignAdapter,
    adapted_modules,
    count_parameters,
    extract_adapter,
    is_lora_key,
    lora_layers,
)
from lora_sr.adapters.foreign_files import weights_file
from lora_sr.adapters.layers import shape_text
from lora_sr.archs import LKDN, SPAN, DSCLoRA, NetworkInfo, is_training_form, network_info
from lora_sr.archs.registry import is_ours
from lora_sr.archs.reparam import Foldable
from lora_sr.checkpoints import AdapterFile, Checkpoint, NetworkLike, NetworkSource, OpenedNetwork, open_network
from lora_sr.checkpoints.checkpoint import ADAPTED, ADAPTER
from lora_sr.checkpoints.community import architecture_name
from lora_sr.checkpoints.content import PARAM_KEYS, Content, read_checkpoint
from lora_sr.checkpoints.families import FAMILIES, discriminator_of, family_name, is_for_chainner
from lora_sr.checkpoints.nearest import nearest_family
from lora_sr.checkpoints.networks import OPTION_SUFFIXES, UnknownNetwork, network_of_options
from lora_sr.checkpoints.origin import KEY
from lora_sr.checkpoints.unwrapping import is_average, state_dicts
from lora_sr.errors import InputError, printable, shown
from lora_sr.report.inspection import format_inspection, inspect_network

SHOWN_TENSORS = 8  # of a network that is not known
SHOWN_NAMES = 5  # of what else there is
LONGEST_LINE = 400  # of what a file says, and not of commands


@dataclass(frozen=True)
class CheckpointSummary:
    """What :func:`summarize_checkpoint` found.

    Args:
        rows: Label -> value, in the order in which they are shown; a value may have several lines.
        commands: What can be done next, as commands that name the file.
        network: The network, loaded; ``None`` where the file holds none that is known here.
    """

    rows: dict[str, str]
    commands: list[str]
    network: nn.Module | None = None

    def __str__(self) -> str:
        rows = {label: [shown(line, LONGEST_LINE) for line in value.split('\n')] for label, value in self.rows.items()}
        if self.commands:
            rows['next'] = list(map(printable, self.commands))
        width = max(map(len, rows)) + 2
        return '\n'.join(
            f'{"" if index else label:{width}}{line}'
            for label, lines in rows.items()
            for index, line in enumerate(lines)
        )


def inspect_file(source: NetworkLike, fold: bool = True) -> str:
    """What `lora-sr inspect` shows: of a checkpoint its summary, and of a network the table of its layers.

    Args:
        source: Whatever :func:`lora_sr.load_network` takes, an option file without weights as well; or a file that
            holds no network: an adapter, a discriminator, the state of a training.
        fold: Show equal layers of repeated blocks in one line.

    Raises:
        InputError: A file cannot be read, or the network of an option file cannot be built.
    """
    source = source if isinstance(source, NetworkSource) else NetworkSource(source)
    path = source.checkpoint
    if isinstance(path, nn.Module):
        return format_inspection(inspect_network(path), fold)
    options = source.options if path is None else path if isinstance(path, (str, os.PathLike)) else None
    if options is not None and Path(options).suffix in OPTION_SUFFIXES:
        if source.adapters:  # they go onto weights
            return format_inspection(inspect_network(open_network(source).network), fold)
        return format_inspection(inspect_network(network_of_options(options, source.imports)), fold)
    summary = summarize_checkpoint(source)
    if summary.network is None:
        return str(summary)
    return f'{summary}\n\n{format_inspection(inspect_network(summary.network), fold)}'


def summarize_checkpoint(source: str | os.PathLike[str] | Checkpoint | NetworkSource) -> CheckpointSummary:
    """Tell what a file of weights is: a network in any form, an adapter, a discriminator, or the state of a training.

    Of several state dicts the one is looked at that the other commands read, see
    :func:`lora_sr.checkpoints.unwrapping.find_weights`; where that is none of them, the first.

    Args:
        source: A ``.pth``, ``.safetensors`` or ``.state`` file, and what it takes to make a network of it.

    Raises:
        InputError: The file cannot be read, or holds no tensors by name.
    """
    source = source if isinstance(source, NetworkSource) else NetworkSource(source)
    named = source.checkpoint
    if named is None or isinstance(named, nn.Module):
        raise InputError('No file is named: give a checkpoint, or an option file.')
    path = named.path if isinstance(named, Checkpoint) else weights_file(named)
    content = named.content if isinstance(named, Checkpoint) else read_checkpoint(path)
    rows = {'file': f'{printable(str(path))}, {path.stat().st_size:,} bytes'}
    if isinstance(content.get('optimizers'), list) or {'state', 'param_groups'} <= content.keys():
        return _summarize_training_state(path, content, rows)
    checkpoint = _choose_state_dict(path, content, source.param_key)
    rows.update(_holding(checkpoint))
    if content.origin is not None:
        rows['from'] = str(content.origin)
    if checkpoint.form == ADAPTER:
        return _summarize_adapter(checkpoint, rows)
    opened, obstacle = None, ''
    try:
        opened = open_network(replace(source, checkpoint=checkpoint))
    except UnknownNetwork as error:  # a network of one's own may look like one that is known
        if checkpoint.is_known:
            obstacle = f'looks like {checkpoint.family or checkpoint.architecture}, but {error}'
        elif content.origin is not None and content.origin.network is not None:
            obstacle = str(error)
    rows['iteration'] = _iteration(path, content)
    if opened is None:
        return _summarize_unknown(checkpoint, rows, obstacle, source.param_key)
    return _summarize_network(checkpoint, opened, rows, source)


def _choose_state_dict(path: Path, content: Content, param_key: str | None) -> Checkpoint:
    try:
        return Checkpoint.of(path, content, param_key)
    except InputError:
        there = list(state_dicts(content))
        if param_key is not None or not there:
            raise
        return Checkpoint.of(path, content, there[0])


def _holding(checkpoint: Checkpoint) -> dict[str, str]:
    """What a file holds, in words: its state dicts, what else there is, and how the weights are stored."""
    content, param_key = checkpoint.content, checkpoint.param_key
    there = state_dicts(content)
    tops = {name.partition('.')[0] for name in there}
    optimizers = [key for key in content if 'optim' in key.lower() and isinstance(content[key], (Mapping, list, tuple))]
    empty = [key for key in content if (is_average(key) or key in PARAM_KEYS) and content[key] in (None, {})]
    others = _some([shown(key) for key in content if key not in (*tops, *optimizers, *empty, KEY)])
    if param_key is None:
        rows = {'state dicts': f'the file itself ({len(checkpoint.state)} tensors)'}
    else:
        found = [
            f'{shown(name)} ({count} tensors{"; this one is read" if name == param_key and len(there) > 1 else ""})'
            for name, count in there.items()
        ]
        rows = {'state dicts': _some(found) + (f'; beside {others}' if others else '')}
        if empty:
            rows['state dicts'] += f'; {" and ".join(empty)} {"is" if len(empty) == 1 else "are"} empty'
    if checkpoint.prefix:
        rows['names'] = f'with {shown(checkpoint.prefix)}, which is left out'
    if checkpoint.layout:
        new, old = next(iter(checkpoint.layout.items()))
        rows['names'] = f'in an older layout, in which {shown(new)} is {shown(old)}; what is merged has it again'
    types = Counter(str(value.dtype).replace('torch.', '') for value in checkpoint.state.values())
    counts = types.most_common()
    rows['precision'] = counts[0][0] if len(counts) == 1 else ', '.join(f'{name} ({count})' for name, count in counts)
    if any(map(is_average, f'{param_key or ""}.{checkpoint.prefix}'.split('.'))):
        rows['average'] = 'these are a moving average (EMA)'
    if optimizers:
        rows['optimizer'] = f'inside, under {_some([shown(key) for key in optimizers])}'
    return rows


def _some(names: Sequence[str]) -> str:
    """Names as a list, of which the first few are told."""
    more = len(names) - SHOWN_NAMES
    return ', '.join(names[:SHOWN_NAMES]) + (f' and {more:,} more' if more > 0 else '')


def _summarize_network(
    checkpoint: Checkpoint, opened: OpenedNetwork, rows: dict[str, str], source: NetworkSource
) -> CheckpointSummary:
    path, param_key, network = checkpoint.path, source.param_key, opened.network
    is_adapted, has_branches = any(True for _ in adapted_modules(network)), is_training_form(network)
    family = _family(network, is_adapted)
    info = network_info(network)
    counts = count_parameters(network)
    parameters = f'{counts.total:,}'
    if is_adapted:
        parameters += f', of which {counts.lora:,} are updates ({counts.lora / (counts.total - counts.lora):.1%} of'
        parameters += ' the base)'
    described = {
        'family': family,
        'form': _form(network, is_adapted, has_branches),
        'scale': '' if info is None else f'x{info.scale}',
        'channels': '' if info is None else _channels(network, info),
        'blocks': _blocks(network),
        'LoRA': _lora(extract_adapter(checkpoint.state)) if checkpoint.form == ADAPTED else '',
        'parameters': parameters,
    }
    rows = {'file': rows.pop('file'), **{key: value for key, value in described.items() if value}, **rows}
    commands, more = [], _teaching(source)
    if is_adapted or has_branches:
        commands.append(_command('lora-sr merge', path, *more, '-o', f'{path.stem}_merged.pth', param_key=param_key))
        if checkpoint.form == ADAPTED:
            commands.append(_extract(path, param_key))
        return CheckpointSummary(rows, commands, network)
    takes_any_size = info is not None and info.fixed_size is None
    channels = (info.in_channels, info.out_channels) if info is not None else None
    if takes_any_size and param_key is None:  # else the two would not find it
        if channels in ((1, 1), (3, 3)):
            commands.append(_command('lora-sr upscale', 'INPUT', '-m', path, '-o', 'OUTPUT', *more))
        if channels == (3, 3) and info is not None and info.value_range == 1:
            commands.append(_command('lora-sr compare', f'{path.stem.replace("=", "_")}={path}', *more))
    is_written_out = isinstance(network, (SPAN, LKDN))
    is_own = not is_ours(network) and opened.section is not None and takes_any_size and channels == (3, 3)
    if is_written_out or is_own:
        target = ('--team', 'N', '--name', 'NAME', '-o', 'FOLDER')
        commands.append(_command('lora-sr submission', '-m', path, *more, *target, param_key=param_key))
    exports = {'onnx': f'{path.stem}.onnx'} if takes_any_size else {}
    if takes_any_size and is_for_chainner(network):
        exports['chainner'] = f'{path.stem}_chainner.pth'
    commands += [
        _command(f'lora-sr export {kind}', path, *more, '-o', file, param_key=param_key)
        for kind, file in exports.items()
    ]
    return CheckpointSummary(rows, commands, network)


def _summarize_unknown(
    checkpoint: Checkpoint, rows: dict[str, str], obstacle: str, param_key: str | None
) -> CheckpointSummary:
    path, state = checkpoint.path, checkpoint.state
    rows = {'file': rows.pop('file'), **rows}
    values = sum(value.numel() for value in state.values())
    discriminator = discriminator_of(state)
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
    unknown = f'none of those known here ({", ".join(FAMILIES)}); -opt names the option file of its network'
    described = {'family': printable(obstacle) or unknown, 'form': 'no LoRA'}
    near = None if obstacle else nearest_family(state)
    if near is not None:
        described['nearest'] = str(near)
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
    tensors = [f'{shown(key)}  {shape_text(value.shape)}' for key, value in list(state.items())[:SHOWN_TENSORS]]
    if len(state) > SHOWN_TENSORS:
        tensors.append(f'… and {len(state) - SHOWN_TENSORS} more')
    return CheckpointSummary({'file': rows.pop('file'), **described, **rows, 'tensors': '\n'.join(tensors)}, commands)


def _summarize_adapter(checkpoint: Checkpoint, rows: dict[str, str]) -> CheckpointSummary:
    path = checkpoint.path
    values = sum(value.numel() for key, value in checkpoint.state.items() if not key.endswith(('lora_alpha', '.alpha')))
    try:
        adapter = AdapterFile.of(checkpoint).adapter
    except InputError as error:
        form = f'LoRA without a network, and no adapter file: {error}'
        return CheckpointSummary({**rows, 'form': form, 'parameters': f'{values:,}'}, [])
    described = {
        'form': 'adapter only: it goes onto its base' if isinstance(adapter, Adapter) else _foreign_form(adapter),
        'LoRA': _lora(adapter),
        'layers': ', '.join([*map(shown, adapter.layers[:3]), *(['…'] if len(adapter.layers) > 3 else [])]),
        'parameters': f'{values:,}',
    }
    commands = [
        _command('lora-sr adapter merge', 'BASE.pth', path, '-o', f'{path.stem}_merged.pth'),
        _command('lora-sr adapter info', path),
    ]
    return CheckpointSummary({**rows, **described}, commands)


def _foreign_form(adapter: ForeignAdapter) -> str:
    return f'adapter in the layout of {adapter.kind}: ' + (
        f'it goes onto no base, since {adapter.obstacle}' if adapter.obstacle else 'it goes onto its base'
    )


def _summarize_training_state(path: Path, content: dict, rows: dict[str, str]) -> CheckpointSummary:
    optimizers = content.get('optimizers', [content])
    if not isinstance(optimizers, (list, tuple)):
        raise InputError(f'{path} is damaged: its optimizers must be a list, got a {type(optimizers).__name__}.')
    values = sum(
        tensor.numel()
        for optimizer in optimizers
        for state in _values(optimizer.get('state') if isinstance(optimizer, Mapping) else None)
        for tensor in _values(state)
        if isinstance(tensor, Tensor)
    )
    is_of_run = 'optimizers' in content
    rows['form'] = f'{"training state of a run" if is_of_run else "state of an optimizer"}, without networks'
    rows['optimizers'] = f'{len(optimizers)}, {values:,} values'
    commands = []
    if isinstance(content.get('iter'), int):
        epoch = content.get('epoch')
        rows['iteration'] = f'{content["iter"]:,}, epoch {f"{epoch:,}" if isinstance(epoch, int) else "unknown"}'
        network = path.parent.parent / 'models' / f'net_g_{content["iter"]}.pth'
        if os.path.isfile(network):  # which takes a name of any length
            commands.append(_command('lora-sr inspect', network))
    if is_of_run:
        commands.append('lora-sr train -opt OPTION_FILE --auto_resume')
    return CheckpointSummary(rows, commands)


def _values(value: object) -> Iterable[Any]:
    """Those of a section; of anything else none, as a file may hold anything."""
    return value.values() if isinstance(value, Mapping) else ()


def _family(network: nn.Module, is_adapted: bool) -> str:
    if isinstance(network, DSCLoRA):
        return 'DSCLoRA, i.e. ConvLoRA on SPAN'
    name = family_name(network)
    name = f'{name}, by spandrel' if architecture_name(network) is not None else name
    return f'AdaptSR on {name}' if is_adapted else name


def _form(network: nn.Module, is_adapted: bool, has_branches: bool) -> str:
    forms = []
    if is_adapted:
        what = 'LoRA' if any(True for _ in lora_layers(network)) else 'deltas'
        forms.append(f'adapted: a base with {what} beside it')
    if has_branches:
        branched = sum(isinstance(module, Foldable) and module.is_training_form for module in network.modules())
        forms.append(f'training form: {branched} modules have branches, which fold')
    return '; '.join(forms) or 'plain: a base, or merged, which cannot be told apart'


def _teaching(source: NetworkSource) -> tuple[str | os.PathLike[str], ...]:
    """The arguments that made a network of the file, for the commands that come next."""
    arguments: list[str | os.PathLike[str]] = [] if source.options is None else ['-opt', source.options]
    for module in source.imports:
        arguments += ['--import', module]
    for adapter, weight in source.adapters:
        arguments += ['--adapter', f'{os.fspath(adapter)}={weight:g}']
    return tuple(arguments)


def _channels(network: nn.Module, info: NetworkInfo) -> str:
    return f'{info.in_channels} in, {info.out_channels} out, {_width(network, info.in_channels)} wide'


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


def _lora(adapter: Adapter | ForeignAdapter) -> str:
    """Layers, ranks, alphas and deltas in words."""
    layers = adapter.layers
    ranks = _spread('rank', (adapter.rank_of(layer) for layer in layers))
    alphas = [adapter.alpha_of(layer) for layer in layers]
    alpha = 'alpha unknown' if any(map(math.isnan, alphas)) else _spread('alpha', alphas)
    what = 'deltas of' if isinstance(adapter, Adapter) else 'whole values of'
    found = [f'{len(layers)} layers, {ranks}, {alpha}'] if layers else []
    return '; '.join([*found, *([f'{what} {len(adapter.deltas)} parameters'] if adapter.deltas else [])])


def _spread(what: str, values: Iterable[float]) -> str:
    """``rank 8``, or ``ranks 4 (2 layers), 8 (18 layers)``."""
    counts = sorted(Counter(values).items())
    if len(counts) == 1:
        return f'{what} {counts[0][0]:g}'
    return f'{what}s ' + _some([f'{value:g} ({count} layer{"s" * (count > 1)})' for value, count in counts])


def _iteration(path: Path, content: dict) -> str:
    for key in ('iter', 'global_step'):
        if isinstance(content.get(key), int):
            return f'{content[key]:,}, as the file says'
    name = re.fullmatch(r'net_\w+?_([0-9]{1,18}|latest)', path.stem)
    if name is None:
        return 'unknown: neither the file nor its name says'
    states = path.parent.parent / 'training_states'
    if name[1] != 'latest':
        iteration = int(name[1])
        resumes = (states / f'{iteration}.state').is_file()
        return f'{iteration:,}, by its name' + ('; its training state is there, to go on from' if resumes else '')
    known = [int(state.stem) for state in states.glob('*.state') if re.fullmatch('[0-9]{1,18}', state.stem)]
    return 'the last of its run' + (f', whose last training state is of {max(known):,}' if known else '')


def _extract(path: Path, param_key: str | None) -> str:
    return _command('lora-sr adapter extract', path, '-o', f'{path.stem}.safetensors', param_key=param_key)


def _command(name: str, *arguments: str | os.PathLike, param_key: str | None = None) -> str:
    """A command line, quoted for a shell; a state dict that was named is named again."""
    if param_key is not None:
        arguments = (*arguments, '--param-key', param_key)
    return ' '.join([name, *(shlex.quote(os.fspath(argument)) for argument in arguments)])
