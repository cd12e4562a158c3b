"""An adaptation as a part of a page: what it came to, on which pairs, by which steps, and how to go on from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from torch import nn

from lora_sr.adapted_folder import BASE, BEST, DATA, HELD, HR, MERGED
from lora_sr.adapters import extract_adapter, merge_adapter, mix_adapters
from lora_sr.checkpoints import Checkpoint, NetworkSource, open_network
from lora_sr.errors import InputError
from lora_sr.report.chart import Line, draw_chart
from lora_sr.report.commands import next_commands
from lora_sr.report.crops import AT_EACH_END, choose, look_at_each, sliders
from lora_sr.report.looks import show_looks
from lora_sr.report.markup import facts, folded, heading, items, paragraph, table
from lora_sr.report.record import PairsFound, Psnr, Rates, Record, Request

ENDS = {
    'finished': 'All iterations were done.',
    'no_rise': 'PSNR had stopped rising.',
    'time': 'The time was up.',
    'interrupted': 'It was interrupted.',
    'failed': 'The training failed, and what was best until then counts.',
}
CAMERA, CLEAN = 'Your camera', 'Bicubic images'
PSNR = 'PSNR (Y), dB'


class AdaptationPart:
    """What a page says of an adaptation.

    Args:
        folder: What ``lora-sr adapt`` has written.
        imports: Modules that register its network, if that is one of the user's own. Those that the record names are
            not imported: a report may be made of a folder that somebody else has sent.

    Raises:
        InputError: The folder has no record that can be read.
    """

    def __init__(self, folder: Path, imports: Sequence[str] = ()):
        self.folder, self.imports = folder, imports
        self.record = Record.read(folder)

    @property
    def place(self) -> Path:
        """Where it is."""
        return self.folder

    @property
    def title(self) -> str:
        """What it is, in a line."""
        return f'{Path(self.record.request.network).name}, adapted'

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """{set: {iteration: PSNR}}, the network as it was included."""
        record = self.record
        begin = {} if record.start is None else {0: record.start.camera}
        return {HELD: {**begin, **record.training.psnr}} if record.training is not None else {}

    def html(self, level: int) -> str:
        """All of it, below a heading of the level above."""
        record = self.record
        parts = [self._headline(), self._glance()]
        if record.result is not None:
            parts.append(self._before_after(level))
        parts.append(self._what(level))
        if record.pairs is not None:
            parts.append(_pairs(record.pairs, record.request, level))
        if record.rates is not None:
            parts.append(_rates(record.rates, record.start, level))
        parts += [self._curve(level), self._strengths(level), next_commands(self.folder, record, level)]
        return '\n'.join(filter(None, parts))

    def _headline(self) -> str:
        result = self.record.result
        if result is None:
            return paragraph('The adaptation is not finished: the same command goes on with it.', 'headline')
        return paragraph(result.sentence.replace('->', '→'), 'headline')

    def _glance(self) -> str:
        """The table of what there was and what there is."""
        record = self.record
        if record.start is None or record.bicubic is None:
            return ''
        rows: list[tuple[str, Psnr, Psnr | None]]
        rows = [('Bicubic interpolation', record.bicubic, None), ('The network before', record.start, None)]
        strength = record.result.strength if record.result is not None else None
        after = record.strengths.get(strength) if strength is not None else None
        if after is not None:
            rows.append((f'The network after, at strength {strength:g}', after, record.start))
        cells = []
        for name, psnr, before in rows:
            gain = Psnr(psnr.camera - before.camera, psnr.clean - before.clean) if before is not None else None
            cells.append([
                name,
                f'{psnr.camera:.2f}' + (f' ({gain.camera:+.2f})' if gain else ''),
                f'{psnr.clean:.2f}' + (f' ({gain.clean:+.2f})' if gain else ''),
            ])  # fmt: skip
        chosen = len(rows) - 1 if after is not None else None
        caption = f'{PSNR}, mean over the pairs held back'
        text = (
            'Learning rate, iteration and strength were chosen on these pairs, so other images of the camera may gain '
            'less. Bicubic images are their HR images, made smaller by bicubic: they tell what the network forgets.'
        )
        return table(caption, ['', CAMERA, CLEAN], cells, chosen) + paragraph(text, 'note')

    def _before_after(self, level: int) -> str:
        parts = [heading('Before and after', level)]
        held = self.folder / DATA / HELD
        try:
            if not (held / HR).is_dir():
                raise InputError(f'The pairs held back should be in {held}, where they are not.')
            before, after = self._networks()
            pairs = look_at_each(held, before, after)
        except InputError as error:
            return ''.join([*parts, paragraph(f'There are no images to show. {error}')])
        most, least = choose(pairs)
        count = f'the {AT_EACH_END} pairs held back with the highest gain of PSNR and the {AT_EACH_END} with the lowest'
        if len(pairs) <= 2 * AT_EACH_END:
            count = 'all pairs held back'
        parts.append(
            paragraph(
                f'Shown by rule: {count}. Of each, the crop in which before and after differ most, enlarged without '
                'smoothing. Move the divider, by the arrow keys as well.'
            )
        )
        parts += [heading('Most improved', level + 1), sliders(most, level + 2)]
        if least:
            parts += [heading('Least improved', level + 1), sliders(least, level + 2)]
        ranked = sorted(pairs, key=lambda pair: (-pair.gain, pair.name))
        rows = [[pair.name, f'{pair.before:.2f}', f'{pair.after:.2f}', f'{pair.gain:+.2f}'] for pair in ranked]
        parts.append(table(f'{PSNR}, of each pair held back', ['Pair', 'Before', 'After', 'Gain'], rows))
        ends = {'most improved': most[0], **({'least improved': least[-1]} if least else {})}
        parts.append(show_looks(held, ends, before, after, level + 1))
        return '\n'.join(parts)

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        """The network before and the one after.

        Raises:
            InputError: They are not there any more, or cannot be used.
        """
        before = self._open(BASE)
        assert self.record.result is not None
        if self.record.result.has_gained:
            return before, self._open(MERGED)
        if not (self.folder / BEST).exists():
            raise InputError(f'The best network should be {self.folder / BEST}, which is not there.')
        update = extract_adapter(Checkpoint.read(self.folder / BEST).state)
        adapter = mix_adapters([(update, self.record.result.strength)])
        after = deepcopy(before)
        after.load_state_dict(merge_adapter(before.state_dict(), adapter))
        return before, after

    def _open(self, name: str) -> nn.Module:
        return open_network(NetworkSource(self.folder / name, imports=self.imports)).network

    def _what(self, level: int) -> str:
        record, request = self.record, self.record.request
        values = {'Network': request.network}
        for name, value in (
            ('Option file', request.options),
            ('Imported', ', '.join(request.imports)),
            ('Adapter to go on from', request.adapter),
        ):
            if value:
                values[name] = value
        values['HR images'] = request.hr or f'made by the teacher {request.teacher}'
        values['LR images'] = request.lr or 'made of the HR images, as a camera might have taken them'
        values['Time'] = f'{_minutes(record.seconds / 60)}, of {_minutes(request.minutes)} asked for'
        found = record.pairs
        if found is not None:
            share = found.trained_parameters / found.parameters if found.parameters else 0.0
            also = f', and a trained delta of {", ".join(found.also_train)}' if found.also_train else ''
            values['Trained'] = (
                f'LoRA of rank {found.rank}{also}: {found.trained_parameters:,} of {found.parameters:,} parameters '
                f'({share:.1%})'
            )
            values['A step'] = f'{_count(found.batch, "patch", "patches")} of {found.side} x {found.side} LR pixels'
        if record.training is not None:
            ended = ENDS.get(record.training.ended, f'It ended: {record.training.ended}.')
            values['Training'] = f'{_count(record.training.iterations, "iteration")}. {ended}'
        return heading('What was adapted, to what', level) + facts(values)

    def _curve(self, level: int) -> str:
        record = self.record
        if record.training is None:
            return ''
        levels = {}
        if record.start is not None and record.bicubic is not None:
            levels = {'The network before': record.start.camera, 'Bicubic interpolation': record.bicubic.camera}
        chart = draw_chart(
            'PSNR over the iterations, on the pairs held back',
            'Iteration',
            PSNR,
            [Line('The network, as it trains', {float(x): y for x, y in self.curves[HELD].items()})],
            levels,
        )
        return heading('The training', level) + chart

    def _strengths(self, level: int) -> str:
        record = self.record
        if not record.strengths:
            return ''
        begin = {} if record.start is None else {0.0: record.start}
        chosen = record.result.strength if record.result is not None else None
        found = {**begin, **record.strengths}
        charts = []
        for name, values in (
            (CAMERA, {strength: psnr.camera for strength, psnr in found.items()}),
            (CLEAN, {strength: psnr.clean for strength, psnr in found.items()}),
        ):
            ring = (chosen, values[chosen]) if chosen is not None and chosen in values else None
            title = f'{name}: PSNR over the strength of the update'
            charts.append(draw_chart(title, 'Strength', PSNR, [Line(name, values)], chosen=ring))
        note = 'Strength 0 is the network before, strength 1 the update as it was trained.'
        if chosen is not None:
            note += f' The ring is at the strength that was chosen, {chosen:g}: it is best on the images of the camera.'
        return heading('The strength', level) + paragraph(note) + f'<div class="plots">{"".join(charts)}</div>'


def _pairs(found: PairsFound, request: Request, level: int) -> str:
    values = {
        'Used': f'{_count(found.used, "pair")}: {found.training} to train on, {len(found.held)} held back',
        'Held back': ', '.join(found.held),
        'Left out': str(len(found.left_out)) if found.left_out else 'none',
    }
    parts = [heading('The pairs', level)]
    is_captured = request.hr is not None and request.lr is not None
    if is_captured:
        x, y = found.shift
        values['Shift of LR on HR'] = f'{x:+.2f} across, {y:+.2f} down: LR pixels, median over the pairs'
        values['Difference of colors'] = f'{found.color:.1f} of 255, median over the pairs'
        if request.align:
            values['Alignment'] = 'Shifts and colors were put right before the training.'
    parts.append(facts(values))
    if found.notes:
        parts.append(items(found.notes))
    if found.left_out:
        parts += [paragraph('Left out, and why:'), items(found.left_out)]
    if is_captured:
        rows = [
            [name, f'{pair.shift[0]:+.2f}', f'{pair.shift[1]:+.2f}', f'{pair.color:.1f}', f'{pair.correlation:.3f}']
            for name, pair in sorted(found.pairs.items())
        ]
        head = ['Pair', 'Shift across', 'Shift down', 'Color, of 255', 'Correlation']
        parts.append(folded('Each pair', table('How LR lies on HR, in LR pixels', head, rows)))
    return '\n'.join(parts)


def _rates(rates: Rates, start: Psnr | None, level: int) -> str:
    tried = sorted(rates.psnr)
    rows = []
    for rate in tried:
        psnr = rates.psnr[rate]
        gain = '' if psnr is None or start is None else f'{psnr - start.camera:+.2f}'
        rows.append([f'{rate:g}', 'diverged' if psnr is None else f'{psnr:.2f}', gain])
    chosen = tried.index(rates.best) if rates.best in tried else None
    text = (
        f'Each rate trained for {_count(rates.steps, "step")}, from the same start and on the same patches. '
        f'{rates.best:g} was best.'
    )
    if rates.rate is not None:
        text += f' The training, which is longer and so wants less, had {rates.rate:.2g}.'
    if len(tried) > 1 and rates.best == tried[-1]:
        text += ' It is the highest that was tried: a higher one may be better still.'
    caption = f'{PSNR}, on the pairs held back'
    shown = table(caption, ['Rate', 'PSNR', 'Gain'], rows, chosen)
    return heading('The learning rate', level) + paragraph(text) + shown


def _count(number: int, noun: str, plural: str = '') -> str:
    return f'{number:,} {noun if number == 1 else plural or f"{noun}s"}'


def _minutes(minutes: float) -> str:
    if not math.isfinite(minutes):
        return f'{minutes} minutes'
    shown = f'{minutes:,.1f}'.removesuffix('.0')
    return f'{shown} minute{"s" * (shown != "1")}'
