"""Ranks for the layers of an AdaptSR network, measured through an option file, and written into a new one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

import torch
import yaml
from torch import Tensor, nn

from lora_sr.adapters import LoRAConfig, count_parameters, layer_groups
from lora_sr.adapters.allocation import allocate_ranks, base_weight, layer_importance
from lora_sr.archs.adaptsr import AdaptSR
from lora_sr.basicsr.built import build_of_options
from lora_sr.basicsr.options import check_options
from lora_sr.basicsr.options.schema import TEACHER
from lora_sr.basicsr.step.settings import STEP_KEYS
from lora_sr.checkpoints.imports import import_modules
from lora_sr.checkpoints.networks import OPTION_SUFFIXES
from lora_sr.errors import InputError
from lora_sr.figures import SUFFIXES, encode_figure, figure_class
from lora_sr.files import check_not_input, check_output, replacing_together, was_interrupted, write_errors
from lora_sr.option_file import load_options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {'conv': 'tab:blue', 'attention': 'tab:orange', 'mlp': 'tab:green', 'upsampler': 'tab:red'}
BAR = 40  # characters
MOST_BATCHES = 10_000


@dataclass(frozen=True)
class Allocation:
    """What :func:`allocate` chose.

    ``ranks`` and ``groups`` have an entry for each layer, in the order of the network; ``budget``, ``used`` and
    ``base`` are numbers of parameters: allowed, those of LoRA at these ranks, those of the base network.
    """

    ranks: dict[str, int]
    groups: dict[str, str]
    budget: int
    used: int
    base: int


def allocate(
    option_file: str | os.PathLike,
    budget: str,
    output: str | os.PathLike,
    batches: int = 16,
    max_rank: int = 32,
    chart: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Allocation:
    """Choose the rank of each layer that an option file adapts, and write the file anew with these ranks.

    The gradients are those of the run's first batches, through its own dataset, model and losses; see
    :func:`lora_sr.adapters.layer_importance` and :func:`lora_sr.adapters.allocate_ranks`. Nothing is trained, and
    nothing but the new file is written: the old one's text, with ``rank_pattern`` of ``network_g.lora`` put in (what
    stood there is replaced) and ``_allocated`` behind ``name``.

    Args:
        option_file: Option file for training, with ``network_g: {type: AdaptSR, …}``.
        budget: Largest number of LoRA parameters: a number, or a share of the base network's parameters, ``5%``.
        output: Option file to write.
        batches: How many batches the gradient is the mean of, at least 1.
        max_rank: Largest rank of a layer.
        chart: A picture of the ranks to draw, see :func:`plot_ranks`.
        overwrite: Replace ``output`` and ``chart`` where they exist.

    Raises:
        InputError: The option file is wrong, as before a run, or its network is no AdaptSR; the budget is no number,
            0 or less, more than the network, or less than one rank; no batch, or more than 10,000, or a limit below
            1; or ``output`` or ``chart`` cannot be written, or is the option file. Neither is written then.
    """
    outputs = [Path(path) for path in (output, chart) if path is not None]
    may_exist = overwrite or was_interrupted(outputs)
    for path, suffixes in zip(outputs, (OPTION_SUFFIXES, SUFFIXES)):
        check_output(path, suffixes, may_exist)
        check_not_input(path, [option_file])
    for name, value in (('number of batches', batches), ('largest rank', max_rank)):
        if value < 1:
            raise InputError(f'The {name} is {value}: it must be an integer of at least 1.')
    if batches > MOST_BATCHES:
        raise InputError(f'The number of batches must be at most {MOST_BATCHES:,}, got {batches:,}.')
    if chart is not None:
        figure_class()
    options = load_options(option_file)
    import_modules(options.get('imports') or (), option_file)
    network = options.get('network_g')
    if not isinstance(network, dict) or network.get('type') != 'AdaptSR':
        kind = network.get('type') if isinstance(network, dict) else network
        raise InputError(f'network_g of {option_file} is {kind}: ranks are allocated to a network of type AdaptSR.')
    problems = check_options(_without_validation(options), is_train=True)
    if problems:
        raise InputError('\n'.join(problems))
    model, data = build_of_options(option_file, _without_training)
    net = model.get_bare_model(model.net_g)
    counts = count_parameters(net)
    base = counts.total - counts.lora
    ranked = sum(value.numel() for name, value in net.named_parameters() if name.endswith(('.lora_A', '.lora_B')))
    allowed = parse_budget(budget, base) - (counts.lora - ranked)  # deltas train whatever the ranks

    config = LoRAConfig.from_dict(network['lora'])
    left_out = {layer: 0 for layer, rank in config.rank_pattern.items() if rank == 0}
    config = replace(config, rank_pattern=left_out)
    groups = {name: group for name, group in layer_groups(net).items() if config.is_target(name, group)}
    layers = {name: net.get_submodule(name) for name in groups}
    gradients = measure_gradients(model, layers, islice(data, batches))
    importance = {name: layer_importance(layers[name], gradients[name]) for name in layers}
    ranks = allocate_ranks(importance, allowed, max_rank)
    used = sum(rank * importance[name].cost for name, rank in ranks.items())
    pattern = {**left_out, **{re.escape(name): rank for name, rank in ranks.items()}}
    AdaptSR(network['base'], {**network['lora'], 'rank_pattern': pattern})  # e.g. alpha_pattern may not fit any more
    allocation = Allocation(ranks, groups, allowed, used, base)
    with replacing_together(outputs, overwrite) as partials:
        with write_errors(outputs[0]):
            write_ranks(option_file, pattern, f'lora-sr allocate --budget {budget}: {used:,} parameters', partials[0])
        if chart is not None:
            with write_errors(chart):
                partials[1].write_bytes(encode_figure(plot_ranks(allocation), partials[1].suffix))
    return allocation


def _without_training(opt: dict[str, Any]) -> None:
    """Leave out of a run's options what only an update of the weights needs: gradients are of whole batches, in
    float32, and not scaled."""
    opt['train'] = {key: value for key, value in opt['train'].items() if key not in STEP_KEYS}
    if not opt['train'].get('ldl_opt'):  # which compares with the average
        opt['train']['ema_decay'] = 0
    if opt.get('network_t'):  # for a few batches, the teacher itself will do
        for key in TEACHER:
            opt['network_t'].pop(key, None)


def _without_validation(options: dict) -> dict:
    """The options without what only validation reads."""
    datasets = options.get('datasets')
    if isinstance(datasets, dict):
        datasets = {name: section for name, section in datasets.items() if not str(name).startswith('val')}
    return {**options, 'datasets': datasets, 'val': None}


def parse_budget(budget: str, base: int) -> int:
    """A number of parameters from ``5%`` (of ``base``) or ``590000``.

    Raises:
        InputError: It is neither, 0 or less, or more than ``base``.
    """
    text = budget.strip()
    try:
        value = base * float(text[:-1]) / 100 if text.endswith('%') else float(text)
    except ValueError:
        value = float('nan')
    if not 0 < value <= base:
        raise InputError(
            f'The budget is {budget}: it must be a share such as 5%, or a number of parameters, above 0 and at most '
            f'the {base:,} of the base network.'
        )
    return int(value)


def measure_gradients(model: Any, layers: dict[str, nn.Module], batches: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
    """The mean gradient of a model's losses with respect to weights, over batches. Nothing is trained.

    Args:
        model: A model of BasicSR, set up for training. Its optimizers do not step afterwards.
        layers: Name -> layer of ``model.net_g``, with LoRA or without.
        batches: What the model's ``feed_data`` takes.

    Returns:
        Name -> gradient, in the shape of the weight; zeros for a layer that takes no part.

    Raises:
        InputError: There is no batch.
    """
    weights = {name: base_weight(layer) for name, layer in layers.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for parameter in model.net_g.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for optimizer in model.optimizers:
        optimizer.step = lambda *args, **kwargs: None
    # An iteration at which a GAN model trains its generator.
    iteration = getattr(model, 'net_d_iters', 1) * (getattr(model, 'net_d_init_iters', 0) + 1)
    number = 0
    for batch in batches:
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        number += 1
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] += weight.grad
                weight.grad = None
    if not number:
        raise InputError('datasets.train gives no whole batch: give it more images, or a smaller batch_size_per_gpu.')
    return {name: total / number for name, total in sums.items()}


def write_ranks(
    option_file: str | os.PathLike, pattern: dict[str, int], comment: str, output: str | os.PathLike
) -> None:
    """Write an option file anew, with ``network_g.lora.rank_pattern`` put in and ``_allocated`` behind its name.

    All else stays as it is, comments included.

    Args:
        option_file: The option file.
        pattern: The ``rank_pattern``.
        comment: What stands behind ``rank_pattern:`` as a comment.
        output: The file to write; it is replaced where it exists.

    Raises:
        InputError: ``option_file`` is written in a way that cannot be changed in place, e.g. with anchors.
        OSError: ``output`` cannot be written.
    """
    refusal = InputError(
        f'The ranks cannot be put into the text of {option_file}: write its name and network_g out there, without '
        'anchors, merge keys and tags.'
    )
    options = load_options(option_file)
    network = options['network_g']
    # Copied along the path, since what anchors name may stand elsewhere too, and has to stay there as it is.
    lora = {**network['lora'], 'rank_pattern': pattern}
    wanted = {**options, 'name': f'{options["name"]}_allocated', 'network_g': {**network, 'lora': lora}}

    text = Path(option_file).read_text(encoding='utf-8')
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    name_entry, network_entry = _entry(root, 'name'), _entry(root, 'network_g')
    lora_entry = network_entry and _entry(network_entry[1], 'lora')
    if name_entry is None or lora_entry is None:
        raise refusal
    name, node = name_entry[1], lora_entry[1]
    end_of_name = name.end_mark.index - (name.style in ('"', "'"))
    first, last = node.value[0][0], node.value[-1][1]
    line = text[text.rfind('\n', 0, first.start_mark.index) + 1 :]
    column = len(line) - len(line.lstrip(' ')) + 2 if node.flow_style else first.start_mark.column
    entry = _pattern_text(pattern, comment, column, node.flow_style)
    old = _entry(node, 'rank_pattern')
    if old is not None:
        edit = (old[0].start_mark.index, _end(old[1]), entry)
    elif node.flow_style:
        edit = (_end(last), _end(last), f', {entry}')
    else:  # behind the comment, if any, at the end of the last line
        end = text.find('\n', _end(last))
        end = len(text) if end < 0 else end
        edit = (end, end, f'\n{" " * column}{entry}')
    for start, end, new in sorted([edit, (end_of_name, end_of_name, '_allocated')], reverse=True):
        text = text[:start] + new + text[end:]

    Path(output).write_text(text, encoding='utf-8')
    try:
        written = load_options(output)
    except InputError:
        written = None
    if written != wanted:
        raise refusal


def _entry(mapping: Any, key: str) -> tuple[Any, Any] | None:
    """The nodes of a key and its value."""
    return next((entry for entry in mapping.value if entry[0].value == key), None)


def _end(node: yaml.Node) -> int:
    """Where a value ends. PyYAML lets a block end where the next key begins, behind the comments between."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, yaml.MappingNode) else last)
    return node.end_mark.index


def _pattern_text(pattern: dict[str, int], comment: str, column: int, is_flow: bool) -> str:
    """The entry ``rank_pattern``, a line for each layer, for a mapping whose keys stand in that column."""
    indent = f'\n{" " * (column + 2)}'
    lines = [f"'{key}': {rank}" for key, rank in pattern.items()]
    if is_flow:
        return f'rank_pattern: {{  # {comment}{indent}' + f',{indent}'.join(lines) + '}'
    return f'rank_pattern:  # {comment}{indent}' + indent.join(lines)


def format_ranks(allocation: Allocation) -> str:
    """The ranks as a bar chart of text, a line for each layer, and what was used of the budget."""
    ranks, base = allocation.ranks, allocation.base
    names, kinds = (max(map(len, words)) for words in (ranks, allocation.groups.values()))
    top = max(ranks.values())
    lines = [
        f'{name:{names}}  {allocation.groups[name]:{kinds}}  {rank:>4}  {"#" * round(rank / top * BAR)}'.rstrip()
        for name, rank in ranks.items()
    ]
    adapted = sum(rank > 0 for rank in ranks.values())
    return '\n'.join(
        [
            *lines,
            '',
            f'layers with LoRA   {adapted} of {len(ranks)}, rank {min(filter(None, ranks.values()))} to {top}',
            f'parameters         {allocation.used:,} ({allocation.used / base:.1%} of {base:,})',
            f'budget             {allocation.budget:,} ({allocation.budget / base:.1%})',
        ]
    )


def plot_ranks(allocation: Allocation) -> Figure:
    """The ranks over depth as bars, colored by group.

    Returns:
        A figure of matplotlib.

    Raises:
        InputError: matplotlib is not installed.
    """
    names = list(allocation.ranks)
    figure = figure_class()(figsize=(max(6, 2 + 0.08 * len(names)), 4), layout='constrained')
    axes = figure.subplots()
    for group, color in COLORS.items():
        bars = [index for index, name in enumerate(names) if allocation.groups[name] == group]
        if bars:
            axes.bar(bars, [allocation.ranks[names[index]] for index in bars], 1, color=color, label=group)
    shown = range(0, len(names), -(-len(names) // 24))
    axes.set_xticks(shown, [names[index] for index in shown], rotation=90, fontsize=7)
    axes.set(ylabel='rank', xlim=(-0.7, len(names) - 0.3))
    axes.legend()
    return figure
