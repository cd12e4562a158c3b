"""A metric over the iterations of training runs, as a picture.

It is read from ``metrics.jsonl`` in a run's folder, or of a run of BasicSR's own, which has none, from its logs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_sr.errors import InputError
from lora_sr.figures import SUFFIXES, encode_figure, figure_class, label
from lora_sr.files import check_output, check_regular, write_whole
from lora_sr.metrics_file import NAME, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ITERATION = re.compile(r'\biter:\s*([0-9][0-9,]{,19})')
TOTAL = re.compile(r'\s*total_iter: ([0-9]{1,15}(?:\.[0-9]*)?(?:e\+?[0-9]{1,2})?)\s*$')
VALIDATION = re.compile(r' INFO: Validation (.+)')
VALUE = re.compile(r'\s*# (.+?): (-?(?:\d+\.?\d*|inf|nan))')


def read_curves(run: str | os.PathLike, metric: str = 'psnr') -> dict[str, dict[int, float]]:
    """The validation results of a training run.

    Of a run of BasicSR's own the log is read, which does not say to which iteration a validation belongs. It is
    the one logged last, which is right where ``logger.print_freq`` divides ``val.val_freq``, and after the end of the
    training the last of all.

    Args:
        run: Folder of the run, e.g. ``experiments/NAME``. Several logs, of a run that was resumed, are read in the
            order of their dates; what an earlier one has beyond the iteration of the resumption does not count.
        metric: Name of the metric in ``val.metrics``.

    Returns:
        Name of the validation set -> iteration -> value.

    Raises:
        InputError: No metrics or training log in the folder, no such metric, or in a log validations between logged
            iterations.
    """
    if not Path(run).is_dir():
        raise InputError(f'The folder {run} does not exist.')
    file = Path(run) / NAME
    curves, others = _from_metrics(file, metric) if os.path.lexists(file) else _from_logs(Path(run), metric)
    if not curves:
        known = f'it has {", ".join(sorted(others))}' if others else 'nothing was validated'
        raise InputError(f'{run} has no "{metric}": {known}.')
    return curves


def _from_metrics(file: Path, metric: str) -> tuple[dict[str, dict[int, float]], set[str]]:
    """The curves of :func:`read_curves`, and the names of all metrics."""
    curves: dict[str, dict[int, float]] = {}
    others: set[str] = set()
    for line in read_metrics(file):
        if isinstance(line.get('validation'), str) and isinstance(line.get('metrics'), dict):
            others.update(line['metrics'])
            if metric in line['metrics']:
                curves.setdefault(line['validation'], {})[line['iter']] = float(line['metrics'][metric])
    return curves, others


def _from_logs(run: Path, metric: str) -> tuple[dict[str, dict[int, float]], set[str]]:
    """As :func:`_from_metrics`."""
    # BasicSR puts the time behind the name of the run, which a copied run has changed.
    logs = sorted(run.glob('train_*.log'), key=lambda log: (log.stem[-len('20260101_000000') :], log.stem))
    if not logs:
        raise InputError(f'{run} has no training log: it should be a folder of experiments/, with a train_*.log in it.')
    curves: dict[str, dict[int, float]] = {}
    others: set[str] = set()
    for log in logs:
        iteration, total, dataset = 0, None, None
        seen: set[tuple[str, int]] = set()
        for line in _lines(log):
            found = VALUE.match(line)
            if found and dataset is not None:
                if found[1] == metric:
                    if iteration == 0 or (dataset, iteration) in seen:
                        raise InputError(
                            f'{log} does not tell the iterations of its validations: val.val_freq should be a multiple '
                            'of logger.print_freq.'
                        )
                    seen.add((dataset, iteration))
                    curves.setdefault(dataset, {})[iteration] = float(found[2])
                others.add(found[1])
                continue
            found = VALIDATION.search(line)
            dataset = found[1] if found else None
            found = TOTAL.match(line)
            if found:
                total = int(float(found[1]))
            found = ITERATION.search(line)
            if found:
                iteration = int(found[1].replace(',', ''))
                if 'Resuming training' in line:
                    for points in curves.values():
                        for late in [late for late in points if late > iteration]:
                            del points[late]
            elif 'End of training' in line:
                # BasicSR validates once more, also where it has just done so.
                iteration = total or iteration
                seen.clear()
    return curves, others


def _lines(log: Path) -> list[str]:
    check_regular(log, 'the log')
    try:
        return log.read_text(errors='replace').splitlines()
    except OSError as error:
        raise InputError(f'The log {log} cannot be read: {error.strerror}.') from None


def plot_curves(
    runs: Mapping[str, str | os.PathLike[str]], datasets: list[str] | None = None, metric: str = 'psnr'
) -> Figure:
    """A metric over the iterations of runs: a panel for each validation set, a line for each run.

    Args:
        runs: Name in the legend -> folder of the run, see :func:`read_curves`.
        datasets: Names of validation sets; by default all.
        metric: Name of the metric in ``val.metrics``.

    Returns:
        A figure of matplotlib.

    Raises:
        InputError: As :func:`read_curves`; a set that no run has validated on; or matplotlib is not installed.
    """
    figure_type = figure_class()
    curves = {name: read_curves(run, metric) for name, run in runs.items()}
    known = list(dict.fromkeys(dataset for sets in curves.values() for dataset in sets))
    for dataset in datasets or ():
        if dataset not in known:
            raise InputError(f'No run was validated on "{dataset}": the sets are {", ".join(known)}.')
    shown = datasets or known
    figure = figure_type(figsize=(4.5 * len(shown), 3.5), layout='constrained')
    for axes, dataset in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for name, sets in curves.items():
            points = sorted(sets.get(dataset, {}).items())
            if points:
                axes.plot(*zip(*points), label=label(name), marker='.')
        axes.set(
            title=label(dataset), xlabel='iteration', ylabel=f'{metric.upper()}, dB' if metric == 'psnr' else metric
        )
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_curves(
    runs: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    datasets: list[str] | None = None,
    metric: str = 'psnr',
    overwrite: bool = False,
) -> None:
    """Write the figure of :func:`plot_curves`.

    Args:
        runs: As for :func:`plot_curves`.
        output: Picture to write; its suffix says how (``.png``, ``.svg``, ``.pdf``).
        datasets: As for :func:`plot_curves`.
        metric: As for :func:`plot_curves`.
        overwrite: Replace the picture where it exists.

    Raises:
        InputError: As :func:`plot_curves`; or a picture that exists, has another suffix, or cannot be written.
    """
    check_output(output, SUFFIXES, overwrite)
    write_whole(output, encode_figure(plot_curves(runs, datasets, metric), Path(output).suffix))
