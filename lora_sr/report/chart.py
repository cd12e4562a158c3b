"""Lines over numbers, as SVG in a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_sr.report.markup import folded, table, text

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 42  # of the frame, what is written beside it
TICKS = 5
BEYOND = 1e12
LOOKS = 6  # of lines in page.css; then they come again
MARKS = (  # around (0, 0)
    '<circle r="3.6"/>',
    '<path d="M-3.4-3.4H3.4V3.4H-3.4Z"/>',
    '<path d="M0-4.4 4.2 3.2H-4.2Z"/>',
    '<path d="M0-4.6 4.6 0 0 4.6-4.6 0Z"/>',
    '<path d="M0 4.4 4.2-3.2H-4.2Z"/>',
    '<path d="M-4-1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4Z"/>',
)


@dataclass(frozen=True)
class Line:
    """What is drawn.

    Attributes:
        name: What it is called below the chart.
        points: {x: y}; what is not finite, or beyond all that is measured, is left out.
    """

    name: str
    points: Mapping[float, float]

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn, from left to right."""
        return sorted((x, y) for x, y in self.points.items() if abs(x) < BEYOND and abs(y) < BEYOND)


def draw_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    levels: Mapping[str, float] | None = None,
    chosen: tuple[float, float] | None = None,
) -> str:
    """A figure with a chart, what its lines are, and its numbers; a sentence where there is no point to draw.

    Args:
        title: What it shows.
        x_label: What goes to the right.
        y_label: What goes up.
        lines: The lines.
        levels: Name -> y of a dashed line across.
        chosen: A point that is ringed.
    """
    levels = {name: y for name, y in (levels or {}).items() if abs(y) < BEYOND}
    points = [point for line in lines for point in line.finite]
    if not points:
        return f'<p>{text(title)}: there is nothing to draw.</p>'
    x_axis = _Axis.of([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = _Axis.of([*(y for _, y in points), *levels.values()], HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    for number, y in enumerate(levels.values()):
        parts.append(f'<path class="level level{number % 2}" d="M{LEFT} {_px(y_axis(y))}H{WIDTH - RIGHT}"/>')
    for number, line in enumerate(lines):
        places = [(_px(x_axis(x)), _px(y_axis(y))) for x, y in line.finite]
        marks = ''.join(f'<g transform="translate({x} {y})">{MARKS[number % LOOKS]}</g>' for x, y in places)
        path = 'M' + 'L'.join(f'{x} {y}' for x, y in places) if places else ''
        parts.append(f'<g class="line line{number % LOOKS}"><path class="stroke" d="{path}"/>{marks}</g>')
    if chosen in points:
        parts.append(f'<circle class="ring" cx="{_px(x_axis(chosen[0]))}" cy="{_px(y_axis(chosen[1]))}" r="8"/>')
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(_in_words(title, lines))}">'
        f'{"".join(parts)}</svg>'
    )
    content = [f'<figcaption>{text(title)}</figcaption>', svg, _legend(lines, levels), _numbers(title, x_label, lines)]
    return '<figure class="plot">{}</figure>'.format('\n'.join(content))


@dataclass(frozen=True)
class _Axis:
    """Where numbers are between two pixels, and which of them are written."""

    low: float
    high: float
    start: float
    end: float
    step: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(1.0, abs(high)):
            margin = max(1.0, abs(high)) / 2
            low, high = low - margin, high + margin
        rough = (high - low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough * 0.999)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, end, step)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Those that are written, and how."""
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        numbers = [self.low + number * self.step for number in range(round((self.high - self.low) / self.step) + 1)]
        return [(number, f'{round(number, digits) + 0.0:,.{digits}f}') for number in numbers]


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value, shown in y_axis.ticks:
        y = _px(y_axis(value))
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="0.35em" text-anchor="end">{shown}</text>')
    for value, shown in x_axis.ticks:
        x = _px(x_axis(value))
        anchor = 'end' if value == x_axis.ticks[-1][0] and len(shown) > 4 else 'middle'
        parts.append(f'<path class="grid" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{shown}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{_px(middle)}" y="{HEIGHT - 6}" text-anchor="middle">{text(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(12 {_px(middle)}) rotate(-90)" text-anchor="middle">{text(y_label)}</text>'
    )
    return ''.join(parts)


def _legend(lines: Sequence[Line], levels: Mapping[str, float]) -> str:
    """What the lines are, where there are several."""
    if len(lines) + len(levels) < 2:
        return ''
    entries = [
        (f'<g class="line line{number % LOOKS}"><path class="stroke" d="M0 6H28"/>'
         f'<g transform="translate(14 6)">{MARKS[number % LOOKS]}</g></g>', line.name)
        for number, line in enumerate(lines)
    ]  # fmt: skip
    entries += [(f'<path class="level level{number % 2}" d="M0 6H28"/>', name) for number, name in enumerate(levels)]
    shown = (
        f'<li><svg viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{sign}</svg>{text(name)}</li>'
        for sign, name in entries
    )
    return f'<ul class="legend">{"".join(shown)}</ul>'


def _numbers(title: str, x_label: str, lines: Sequence[Line]) -> str:
    places = sorted({x for line in lines for x in line.points})
    rows = [[f'{x:,g}' if x % 1 else f'{x:,.0f}', *(_value(line.points.get(x)) for line in lines)] for x in places]
    return folded('Numbers', table(title, [x_label, *(line.name for line in lines)], rows))


def _value(value: float | None) -> str:
    return '' if value is None else f'{value:.4f}'


def _in_words(title: str, lines: Sequence[Line]) -> str:
    words = [title]
    for line in lines:
        if line.finite:
            (first, begins), (last, ends) = line.finite[0], line.finite[-1]
            words.append(f'{line.name}: {begins:.2f} at {first:g}, {ends:.2f} at {last:g}')
    return f'{". ".join(words)}.'


def _px(value: float) -> str:
    return f'{value:.1f}'.removesuffix('.0')
