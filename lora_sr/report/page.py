"""A report: one page, which needs nothing else and fetches nothing, on adaptations, training runs and comparisons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

from lora_sr.adapted_folder import RECORD
from lora_sr.errors import InputError
from lora_sr.files import check_not_input, check_output, write_whole
from lora_sr.metrics_file import NAME as METRICS
from lora_sr.report.adaptation import AdaptationPart
from lora_sr.report.compared import ComparedPart
from lora_sr.report.markup import heading, page, paragraph
from lora_sr.report.tables import TABLE_SUFFIXES
from lora_sr.report.training_run import RunPart, draw_curves_together, metric_name

Part = Union[AdaptationPart, RunPart, ComparedPart]
SUFFIXES = ('.html',)


def write_report(folder: str | os.PathLike[str], output: str | os.PathLike[str], imports: Sequence[str] = ()) -> None:
    """Write the report of an adaptation, in place of one that is there.

    The same folder gives the same page, to the byte, on the same machine.

    Args:
        folder: What ``lora-sr adapt`` has written.
        output: The page, ``.html``.
        imports: Modules that register its network, if that is one of the user's own.

    Raises:
        InputError: The folder has no record that can be read, or the page cannot be written.
    """
    write_reports([folder], output, imports=imports, overwrite=True)


def write_reports(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    metric: str = 'psnr',
    imports: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write one page on all that is given: the curves together, and a section for each.

    Args:
        runs: Folders that ``lora-sr adapt`` or BasicSR has written, and tables of ``lora-sr compare``.
        output: The page, ``.html``.
        metric: Name of the metric in ``val.metrics`` of the runs.
        imports: As for :func:`write_report`.
        overwrite: Replace the page where it exists.

    Raises:
        InputError: Something given cannot be used, or the page exists or cannot be written.
    """
    check_output(output, SUFFIXES, overwrite)
    check_not_input(output, runs)
    parts = [_part(Path(run), metric, imports) for run in runs]
    write_whole(output, _page(parts, metric))


def _part(run: Path, metric: str, imports: Sequence[str]) -> Part:
    if os.path.lexists(run / RECORD):
        return AdaptationPart(run, imports)
    if run.is_dir():
        if not os.path.lexists(run / METRICS) and not any(run.glob('train_*.log')):
            raise InputError(
                f'{run} must be a folder of `lora-sr adapt`, with {RECORD}, or of a training run, with {METRICS} or '
                'train_*.log, got one without.'
            )
        return RunPart(run, metric)
    if not os.path.lexists(run):
        raise InputError(f'{run} must be a folder or a table of `lora-sr compare`, got nothing of that name.')
    if run.suffix not in TABLE_SUFFIXES:
        kinds = ', '.join(TABLE_SUFFIXES)
        raise InputError(f'{run} must be a folder or a table of `lora-sr compare` ({kinds}), got another file.')
    return ComparedPart(run)


def _page(parts: Sequence[Part], metric: str) -> bytes:
    if len(parts) == 1:
        (part,) = parts
        return page(part.title, f'{heading(part.title, 1)}\n{part.html(2)}')
    titles = _distinct(parts)
    title = f'{len(parts)} runs'
    if any(isinstance(part, ComparedPart) for part in parts):
        title += ' and comparisons'
    body = [heading(title, 1)]
    curves = {
        name: part.curves
        for name, part in zip(titles, parts)
        if part.curves and (metric == 'psnr' or not isinstance(part, AdaptationPart))
    }
    if len(curves) > 1:
        body += [heading('All curves', 2), paragraph(f'{metric_name(metric)}, of each validation set.')]
        body.append(draw_curves_together(curves, metric))
    for name, part in zip(titles, parts):
        body += [heading(name, 2), part.html(3)]
    return page(title, '\n'.join(body))


def _distinct(parts: Sequence[Part]) -> list[str]:
    """Titles of which none is there twice: with their places where they would be, and numbered where those are."""
    titles = [part.title for part in parts]
    titles = [title if titles.count(title) == 1 else f'{title} ({part.place})' for title, part in zip(titles, parts)]
    return [
        title if titles.count(title) == 1 else f'{title}, {titles[: number + 1].count(title)}'
        for number, title in enumerate(titles)
    ]
