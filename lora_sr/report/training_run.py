"""A training run of BasicSR as a part of a page."""

from __future__ import annotations

import os
from pathlib import Path

from lora_sr.metrics_file import ENDS, NAME, read_metrics
from lora_sr.report.chart import Line, draw_chart
from lora_sr.report.curves import read_curves
from lora_sr.report.markup import facts, heading, paragraph, table

METRIC_NAMES = {'psnr': 'PSNR, dB', 'ssim': 'SSIM', 'lpips': 'LPIPS', 'dists': 'DISTS', 'niqe': 'NIQE'}


class RunPart:
    """What a page says of a training run: what its validations gave.

    Args:
        folder: Of the run, e.g. ``experiments/NAME``.
        metric: Name of the metric in ``val.metrics``.

    Raises:
        InputError: As :func:`lora_sr.report.curves.read_curves`.
    """

    def __init__(self, folder: Path, metric: str = 'psnr'):
        self.folder, self.metric = folder, metric
        self.curves = read_curves(folder, metric)
        file = folder / NAME
        self.lines = read_metrics(file) if os.path.lexists(file) else []

    @property
    def place(self) -> Path:
        """Where it is."""
        return self.folder

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return f'Training run {self.folder.resolve().name}'

    def html(self, level: int) -> str:
        """All of it, below a heading of the level above."""
        values = {'Folder': str(self.folder)}
        if self.lines:
            last = self.lines[-1]
            values['Iterations'] = f'{last["iter"]:,}'
            end = next((key for key in ENDS if key in last), None)
            if end is not None:
                values['End'] = 'all iterations done' if end == 'finished' else f'stopped by {last["stopped"]}'
        rows = []
        for name, points in self.curves.items():
            order = sorted(points)
            high, low = (pick(order, key=points.__getitem__) for pick in (max, min))
            rows.append([name, *(f'{points[one]:.4f} at {one:,}' for one in (order[0], order[-1], high, low))])
        shown = metric_name(self.metric)
        head = ['Set', 'First', 'Last', 'Highest', 'Lowest']
        return '\n'.join(
            [
                paragraph(_headline(self.curves, shown), 'headline'),
                facts(values),
                table(f'{shown}, and its iteration', head, rows),
                heading('The training', level),
                draw_curves_together({self.title: self.curves}, self.metric),
            ]
        )


def metric_name(metric: str) -> str:
    """A metric as a page calls it."""
    return METRIC_NAMES.get(metric, metric)


def draw_curves_together(runs: dict[str, dict[str, dict[int, float]]], metric: str) -> str:
    """A chart for each validation set, with a line for each run.

    Args:
        runs: {name of the run: {set: {iteration: value}}}.
        metric: Name of the metric.
    """
    sets = dict.fromkeys(name for curves in runs.values() for name in curves)
    charts = []
    for one in sets:
        lines = [
            Line(name, {float(x): y for x, y in curves[one].items()}) for name, curves in runs.items() if one in curves
        ]
        charts.append(draw_chart(f'{one}, over the iterations', 'Iteration', metric_name(metric), lines))
    return f'<div class="plots">{"".join(charts)}</div>'


def _headline(curves: dict[str, dict[int, float]], shown: str) -> str:
    parts = [f'{points[max(points)]:.2f} on {name} after {max(points):,} iterations' for name, points in curves.items()]
    return f'{shown}: {"; ".join(parts)}.'
