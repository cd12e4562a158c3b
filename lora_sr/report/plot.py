"""PSNR over multiply-adds, a circle for each network, as in the first figures of papers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_sr.figures import encode_figure, figure_class, label
from lora_sr.report.tables import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST, SMALLEST = 1500, 25  # areas of circles, in square points


def plot_comparison(comparison: Comparison) -> Figure:
    """A panel for each set: PSNR on Y over multiply-adds for 1280x720, the area of a circle as the parameters.

    Networks without weights are not in it, nor is a PSNR that is infinite.

    Args:
        comparison: What :func:`lora_sr.report.comparison.compare` gave, with a set and a network with weights.

    Returns:
        A figure of matplotlib.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure_type = figure_class()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter

    rows = [(row, row.cost) for row in comparison.rows if row.cost is not None and row.quality]
    most = max(cost.parameters for _, cost in rows)
    colors = [f'C{index % 10}' for index in range(len(rows))]
    names = [f'{label(row.name)}, {cost.parameters / 1e3:,.0f} K' for row, cost in rows]
    sets = comparison.sets
    figure = figure_type(figsize=(5 * len(sets), 4), layout='constrained')
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, name in zip(panels, sets):
        for (row, cost), color in zip(rows, colors):
            if math.isfinite(row.quality[name].psnr):
                area = max(SMALLEST, LARGEST * cost.parameters / most)
                axes.scatter(cost.multi_adds / 1e9, row.quality[name].psnr, s=area, color=color, alpha=0.6)
        axes.set(title=f'{label(name)}, x{comparison.scale}', xscale='log', ylabel='PSNR (Y), dB')
        axes.set_xlabel('multi-adds for 1280x720, G')
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
        axes.margins(0.25)
        axes.grid(alpha=0.3, which='both')
    marks = [Line2D([], [], color=color, alpha=0.6, marker='o', linestyle='') for color in colors]
    panels[0].legend(marks, names, fontsize=8)
    return figure


def encode_plot(comparison: Comparison, suffix: str) -> bytes:
    """The bytes of the figure of :func:`plot_comparison`; the suffix, ``.png``, ``.svg`` or ``.pdf``, says how.

    Raises:
        InputError: As :func:`plot_comparison`.
    """
    return encode_figure(plot_comparison(comparison), suffix, dpi=150)
