"""The layers of a network as a table: their groups, their LoRA, and what share of the parameters trains."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_sr.adapters import (
    LeftAlone,
    LoRALayer,
    adapted_modules,
    base_weight,
    count_parameters,
    delta_kind,
    layer_groups,
    left_alone,
)
from lora_sr.adapters.allocation import full_rank, largest_useful_rank
from lora_sr.adapters.layers import DELTA_PREFIX
from lora_sr.report.text import align

OTHER = 'other'


@dataclass(frozen=True)
class Row:
    """A line of the table: a layer, or a parameter that carries a delta.

    Args:
        name: Name of the layer, or of the parameter with a delta.
        kind: Group of the layer, see :func:`lora_sr.adapters.layer_groups`; of a delta its word
            in ``also_train``, see :func:`lora_sr.adapters.delta_kind`.
        shape: Shape of the weight, or of the parameter with a delta.
        rank: Rank of its LoRA, or None.
        parameters: Parameters of the base network in it.
        trainable: Parameters in it that train.
        useful_rank: The largest rank at which an update has no more parameters than the weight, at least 1.
        full_rank: The least rank that reaches every update of the weight.
        layers: How many equal layers the line stands for; the parameters are their sum.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    parameters: int
    trainable: int
    useful_rank: int | None = None
    full_rank: int | None = None
    layers: int = 1


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_network` found.

    Args:
        rows: The lines. What several layers share is counted in the first of them.
        base: Parameters of the base network.
        trainable: Parameters that train.
        left_alone: Modules that can carry neither LoRA nor a delta.
    """

    rows: list[Row]
    base: int
    trainable: int
    left_alone: list[LeftAlone]


def inspect_network(network: nn.Module) -> Inspection:
    """The layers of a network that carry LoRA or can, and the parameters that carry a delta.

    Where nothing is adapted, what trains are the parameters that require a gradient, otherwise the updates alone.
    """
    is_adapted = any(True for _ in adapted_modules(network))
    groups = layer_groups(network)
    rows = []
    counted: set[int] = set()

    def count(values: list[nn.Parameter]) -> int:
        new = [value for value in values if id(value) not in counted]
        return sum(value.numel() for value in new)

    for name, module in network.named_modules():
        own = {key: value for key, value in module._parameters.items() if value is not None}
        with_delta = [key[len(DELTA_PREFIX) :] for key in own if key.startswith(DELTA_PREFIX)]
        if name in groups:
            updates = [value for key, value in own.items() if key in ('lora_A', 'lora_B')]
            base = [value for key, value in own.items() if not key.startswith('lora_') and key not in with_delta]
            trains = updates if is_adapted else [value for value in base if value.requires_grad]
            rows.append(
                Row(
                    name,
                    groups[name],
                    tuple(base_weight(module).shape),
                    module.rank if isinstance(module, LoRALayer) else None,
                    count(base),
                    count(trains),
                    largest_useful_rank(module),
                    full_rank(module),
                )
            )
        for key in with_delta:
            delta = [own[key]]
            kind = delta_kind(module, key) or OTHER
            rows.append(Row(f'{name}.{key}', kind, tuple(own[key].shape), None, count(delta), count(delta)))
        counted.update(map(id, own.values()))
    counts = count_parameters(network)
    trainable = counts.lora if is_adapted else counts.trainable
    return Inspection(rows, counts.total - counts.lora, trainable, left_alone(network))


def fold_rows(rows: list[Row]) -> list[Row]:
    """Put equal layers whose names differ in numbers only into one row each, ``body.{0-22}.conv1``.

    A row takes exactly the layers whose names it spells out. It stands where the first of them stood.
    """
    equal = defaultdict(list)
    for row in rows:
        equal[re.sub(r'\d+', '{}', row.name), replace(row, name='')].append(row)
    folded = []
    for (pattern, row), members in equal.items():
        boxes: list[tuple[tuple[int, ...], ...]] = [
            tuple((int(number),) for number in re.findall(r'\d+', member.name)) for member in members
        ]
        for axis in reversed(range(pattern.count('{}'))):
            merged: defaultdict[tuple[Any, Any], list[int]] = defaultdict(list)
            for box in boxes:
                merged[box[:axis], box[axis + 1 :]] += box[axis]
            boxes = [(*left, tuple(numbers), *right) for (left, right), numbers in merged.items()]
        for box in boxes:
            count = 1
            for numbers in box:
                count *= len(numbers)
            folded.append(
                replace(
                    row,
                    name=pattern.format(*map(_spell, box)),
                    layers=count,
                    parameters=count * row.parameters,
                    trainable=count * row.trainable,
                )
            )
    order = {row.name: index for index, row in enumerate(rows)}
    return sorted(folded, key=lambda row: order[_first_name(row.name)])


def format_inspection(inspection: Inspection, fold: bool = True) -> str:
    """The table as text: the layers, notes on ranks that are too large, and sums of the groups and of the network.

    Args:
        inspection: What :func:`inspect_network` found.
        fold: Show equal layers of repeated blocks in one line.
    """
    base = inspection.base
    rows = fold_rows(inspection.rows) if fold else inspection.rows
    table = [('layer', '', 'kind', 'weight', 'rank', 'parameters', 'trainable', 'of layer', 'of network')]
    notes = defaultdict(list)
    for row in rows:
        note = _note(row)
        table.append(
            (
                row.name,
                f'x{row.layers}' if row.layers > 1 else '',
                row.kind,
                'x'.join(map(str, row.shape)),
                '-' if row.rank is None else f'{row.rank}{"*" if note else ""}',
                f'{row.parameters:,}',
                f'{row.trainable:,}',
                f'{row.trainable / row.parameters:.1%}' if row.parameters else '-',
                f'{row.trainable / base:.2%}',
            )
        )
        if note:
            notes[note].append(row.name)
    sums: list[tuple[str, ...]] = [('group', 'layers', 'parameters', 'trainable', 'of network')]
    kinds = list(dict.fromkeys(row.kind for row in inspection.rows))
    for kind in kinds:
        members = [row for row in inspection.rows if row.kind == kind]
        sums.append(_sum_of(kind, members, base))
    rest = base - sum(row.parameters for row in inspection.rows)
    if rest:
        trained = inspection.trainable - sum(row.trainable for row in inspection.rows)
        sums.append((OTHER, '', f'{rest:,}', f'{trained:,}', f'{trained / base:.2%}'))
    share = f'{inspection.trainable:,} of {base:,} parameters train ({inspection.trainable / max(base, 1):.1%})'
    marked = '\n'.join(f'* {text}: {", ".join(names)}' for text, names in notes.items())
    untouched = ', '.join(f'{one.name} ({one.kind}, {one.parameters:,})' for one in inspection.left_alone)
    alone = f'left alone, as neither LoRA nor a delta can be there: {untouched}' if untouched else ''
    return '\n\n'.join(filter(None, (align(table, left=(0, 2, 3)), marked, align(sums), alone, share)))


def _note(row: Row) -> str:
    """What to say of a rank that is too large; empty for others."""
    if row.rank is None or row.useful_rank is None or row.full_rank is None or row.rank <= row.useful_rank:
        return ''
    if row.rank > row.full_rank:
        return f'rank {row.full_rank} reaches every update of the weight, and a higher one no more'
    return f'the update has more parameters than the weight; up to rank {row.useful_rank} it has not'


def _sum_of(kind: str, rows: list[Row], base: int) -> tuple[str, ...]:
    parameters, trainable = (sum(getattr(row, key) for row in rows) for key in ('parameters', 'trainable'))
    return kind, f'{len(rows)}', f'{parameters:,}', f'{trainable:,}', f'{trainable / base:.2%}'


def _spell(numbers: tuple[int, ...]) -> str:
    """One number as it is, several in braces, consecutive ones as a range: ``{0-5,8}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return '{' + ','.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges) + '}'


def _first_name(name: str) -> str:
    return re.sub(r'\{(\d+)[^}]*\}', r'\1', name)
