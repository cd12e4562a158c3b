"""The commands that go on from an adaptation, as a part of its page."""

from __future__ import annotations

import os
from pathlib import Path

from lora_sr.adapted_folder import ADAPTER, BASE, BEST, DATA, HELD, HR, LR, MERGED, OPTIONS
from lora_sr.report.markup import command, heading, paragraph
from lora_sr.report.record import Record, Request

OTHER_STRENGTHS = 0.5, 1.0


def next_commands(folder: Path, record: Record, level: int) -> str:
    """The commands that repeat an adaptation, merge with another strength, upscale and compare.

    Args:
        folder: Of the adaptation.
        record: Of it.
        level: Of the heading.
    """
    root, request, result = os.path.abspath(folder), record.request, record.result
    base, adapter, merged, best = (os.path.join(root, name) for name in (BASE, ADAPTER, MERGED, BEST))
    options = [word for module in request.imports for word in ('--import', module)]
    parts = [
        heading('Commands', level),
        paragraph('Repeat the adaptation, in another folder:'),
        command(['lora-sr', 'adapt', *_arguments(request), '-o', f'{root}_again']),
        paragraph(f'{os.path.join(root, OPTIONS)} is the option file of the training alone, for BasicSR.'),
    ]
    if result is None or not (record.strengths and result.strength > 0):
        return '\n'.join(parts)
    other = next(one for one in OTHER_STRENGTHS if one != result.strength)
    output = f'{root}_strength_{other:g}.pth'
    network = merged if result.has_gained else output
    if result.has_gained and request.adapter is None:
        weight = other / result.strength
        told = (
            f'Merge it with another strength. The adapter has the update at strength {result.strength:g}, so a weight '
            f'of {weight:.4g} makes strength {other:g}:'
        )
    else:  # the adapter that was written has what was gone on from in it, too, or there is none
        adapter, weight = f'{root}_update.safetensors', other
        reason = '' if result.has_gained else 'No merged network was written. '
        parts += [
            paragraph(f'{reason}Take the update alone out of the best network of the training:'),
            command(['lora-sr', 'adapter', 'extract', best, '-o', adapter]),
        ]
        told = f'Merge it, here with strength {other:g}:'
    merge = ['lora-sr', 'adapter', 'merge', base, f'{adapter}={weight:.4g}', '-o', output, *options]
    pairs = ','.join(os.path.join(root, DATA, HELD, kind) for kind in (HR, LR))
    compare = ['lora-sr', 'compare', f'before={base}', f'after={network}', '--set', f'camera={pairs}']
    return '\n'.join(
        [
            *parts,
            paragraph(told),
            command(merge),
            paragraph('Upscale images:'),
            command(['lora-sr', 'upscale', 'photos', '-m', network, '-o', 'photos_upscaled', *options]),
            paragraph('Compare before and after on the pairs held back:'),
            command([*compare, '--picture', f'{root}_compared.png', *options]),
        ]
    )


def _arguments(request: Request) -> list[str]:
    """Those of ``lora-sr adapt`` that ask for the same."""
    words = [request.network]
    if request.hr is not None and request.lr is not None:
        words += ['--pairs', request.hr, request.lr]
    elif request.hr is not None:
        words += ['--photos', request.hr]
    else:
        words += ['--lr', request.lr or '', '--teacher', request.teacher or '']
    words += ['--minutes', f'{request.minutes:g}']
    words += ['--share', f'{request.share:g}'] if request.share is not None else []
    words += ['--align'] if request.align else []
    words += ['--from', request.adapter] if request.adapter is not None else []
    words += ['-opt', request.options] if request.options is not None else []
    words += [word for module in request.imports for word in ('--import', module)]
    return words + (['--param-key', request.param_key] if request.param_key is not None else [])
