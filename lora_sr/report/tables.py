"""What a comparison of networks found, as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from dataclasses import dataclass, field

from lora_sr.report.fidelity import Fidelity
from lora_sr.report.text import align

TABLE_SUFFIXES = ('.md', '.csv', '.json')


@dataclass(frozen=True)
class Cost:
    """What a network costs in deploy form.

    Args:
        parameters: Their number.
        multi_adds: Multiply-adds for an output of 1280x720, as papers count them; see
            :func:`lora_sr.archs.complexity.count_multi_adds`.
        flops: Multiply-adds for an input of 256x256, as the NTIRE challenge counts its FLOPs.
        activations: Values that convolutions give, for an input of 256x256.
        convolutions: Convolutions that are run.
        runtime: Median seconds of a forward pass, as the network's code runs it.
        optimized: The same of the network that :func:`lora_sr.runtime.deployed.optimize` makes of it.
        memory: Bytes at the peak of a forward pass.
        score: Of the NTIRE challenge, see :func:`lora_sr.report.cost.ntire_score`.
    """

    parameters: int
    multi_adds: int
    flops: int
    activations: int
    convolutions: int
    runtime: float | None = None
    optimized: float | None = None
    memory: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class Row:
    """One method's line of the table: its cost (bicubic has none) and, for each set of images, its quality.

    ``quality`` is empty for a network without weights.
    """

    name: str
    cost: Cost | None
    quality: dict[str, Fidelity] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The table: its rows, the scale of the networks, and what runtime and memory were measured under.

    ``baseline`` is the name of the network that scores are relative to, ``conditions`` says size, type and device, and
    ``note`` which images were left out, if any.
    """

    rows: list[Row]
    scale: int
    baseline: str | None = None
    conditions: str | None = None
    note: str | None = None

    @property
    def sets(self) -> list[str]:
        """Names of the sets of images."""
        return list(dict.fromkeys(name for row in self.rows for name in row.quality))


@dataclass(frozen=True)
class _Column:
    """A cost: its heading and how it is shown, and its key and factor as a number in CSV and JSON."""

    heading: str
    form: str
    unit: float
    key: str
    factor: float = 1

    def show(self, value: float | None) -> str:
        return '-' if value is None else self.form.format(value if self.unit == 1 else value / self.unit)


COLUMNS = {  # by the attribute of Cost
    'parameters': _Column('parameters', '{:,}', 1, 'parameters'),
    'multi_adds': _Column('multi-adds, 720p', '{:.2f} G', 1e9, 'multi_adds_720p'),
    'flops': _Column('multi-adds, 256x256', '{:.2f} G', 1e9, 'multi_adds_256x256'),
    'activations': _Column('activations', '{:.2f} M', 1e6, 'activations_256x256'),
    'convolutions': _Column('convs', '{}', 1, 'convolutions'),
    'runtime': _Column('runtime', '{:.2f} ms', 1e-3, 'runtime_ms', 1e3),
    'optimized': _Column('optimized', '{:.2f} ms', 1e-3, 'optimized_ms', 1e3),
    'memory': _Column('peak memory', '{:.1f} MB', 1e6, 'peak_memory_bytes'),
    'score': _Column('NTIRE score', '{:.5g}', 1, 'ntire_score'),
}


def format_table(comparison: Comparison) -> str:
    """The table as text of fixed width, and under it what its numbers mean."""
    return '\n'.join([align(_cells(comparison)), *_notes(comparison)])


def format_markdown(comparison: Comparison) -> str:
    """The table in Markdown, and under it what its numbers mean."""
    head, *body = ([html.escape(cell, quote=False).replace('|', '\\|') for cell in line] for line in _cells(comparison))
    rule = ['---', *['---:'] * (len(head) - 1)]
    lines = [f'| {" | ".join(line)} |' for line in (head, rule, *body)]
    notes = '  \n'.join(_notes(comparison))  # two spaces: a line of its own
    return '\n'.join([*lines, *(['', notes] if notes else [])]) + '\n'


def format_csv(comparison: Comparison) -> str:
    """A line for each method, with numbers as they are; an empty field where there is none."""
    records = [_record(row) for row in comparison.rows]
    names = list(dict.fromkeys(name for record in records for name in record))  # bicubic, the first, has every set
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator='\n')
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def format_json(comparison: Comparison) -> str:
    """Scale, conditions and, for each method, its numbers as in CSV; an infinite PSNR is the text ``inf``."""
    records = [
        {key: 'inf' if value == math.inf else value for key, value in _record(row).items()} for row in comparison.rows
    ]
    content = {
        'scale': comparison.scale,
        'baseline': comparison.baseline,
        'conditions': comparison.conditions,
        'methods': records,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + '\n'


def encode_table(comparison: Comparison, suffix: str) -> bytes:
    """The bytes of a file with the table; its suffix, ``.md``, ``.csv`` or ``.json``, says how."""
    return dict(zip(TABLE_SUFFIXES, (format_markdown, format_csv, format_json)))[suffix](comparison).encode()


def _cells(comparison: Comparison) -> list[list[str]]:
    """The table as text: its head, and a line for each method."""
    fields = _fields(comparison)
    channels = ['Y', 'RGB'] if _has_rgb(comparison) else ['Y']
    head = ['']
    head += [f'{name} ({channel})' for name in comparison.sets for channel in channels]
    table = [head + [COLUMNS[key].heading for key in fields]]
    for row in comparison.rows:
        line = [row.name]
        for name in comparison.sets:
            found = row.quality.get(name)
            line += [_quality(found, channel) for channel in channels]
        table.append(line + [COLUMNS[key].show(getattr(row.cost, key, None)) for key in fields])
    return table


def _quality(found: Fidelity | None, channel: str) -> str:
    if found is None:
        return '-'
    psnr, ssim = (found.psnr, found.ssim) if channel == 'Y' else (found.psnr_rgb, found.ssim_rgb)
    return f'{psnr:.4f} / {ssim:.4f}'


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    if comparison.sets:
        notes.append(f'x{comparison.scale}: PSNR in dB / SSIM, {comparison.scale} pixels of border left out.')
    if comparison.conditions:
        notes.append(f'Runtime and memory: {comparison.conditions}.')
    if comparison.baseline:
        notes.append(f'NTIRE score: baseline {comparison.baseline}, lower is better.')
    return notes


def _fields(comparison: Comparison) -> list[str]:
    """The costs that any row has."""
    costs = [row.cost for row in comparison.rows if row.cost is not None]
    return [key for key in COLUMNS if any(getattr(cost, key) is not None for cost in costs)]


def _has_rgb(comparison: Comparison) -> bool:
    return any(found.psnr_rgb is not None for row in comparison.rows for found in row.quality.values())


def _record(row: Row) -> dict[str, str | float]:
    """A method's numbers by name, without those that it has not."""
    record: dict[str, str | float | None] = {'name': row.name}
    for name, found in row.quality.items():
        for measure in ('psnr', 'ssim'):
            record[f'{name}_{measure}_y'] = getattr(found, measure)
            record[f'{name}_{measure}_rgb'] = getattr(found, f'{measure}_rgb')
    for attribute, column in COLUMNS.items():
        value = getattr(row.cost, attribute, None)
        record[column.key] = value if value is None or column.factor == 1 else value * column.factor
    return {name: value for name, value in record.items() if value is not None}
