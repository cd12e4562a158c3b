"""Which checkpoints of a run stay: the last ones, and of each validation set the best one."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lora_sr.basicsr.samples import stream_of


@contextlib.contextmanager
def timed(model: Any, iteration: int) -> Iterator[None]:
    """Take the time of saving out of that of the iterations."""
    stream = stream_of(model.opt)
    with contextlib.nullcontext() if stream is None else stream.pace.apart('saving', iteration):
        yield


def remove_older(model: Any, iteration: int) -> None:
    """Remove the checkpoints before the last ``logger.keep_last``, now that an iteration is on the disk whole.

    What stays: whatever is of later iterations, as where a run went on from an earlier one; those iterations that are
    the best of a metric; and all files that are no checkpoint with a training state, which are not of this run.
    Networks go before their state, which tells that they are the run's: what a kill leaves, the next call removes.
    """
    count = (model.opt.get('logger') or {}).get('keep_last')
    if count is None:
        return
    models, states = (Path(model.opt['path'][key]) for key in ('models', 'training_states'))
    labels = [name for name, value in vars(model).items() if isinstance(value, nn.Module) and name.startswith('net_')]

    def files(of: int) -> list[Path]:
        networks = (models / f'{label}_{of}.pth' for label in labels)
        return [*filter(Path.is_file, networks), states / f'{of}.state']

    saved = sorted(_iterations(states))
    last = [one for one in saved if one <= iteration][-int(count) :]
    removed = [one for one in saved if one < last[0] and one not in _best_iterations(model)]
    if removed:
        for file in files(iteration):
            with open(file, 'r+b') as written:
                os.fsync(written.fileno())  # a loss of power would take what nothing stands in for any more
    for file in (file for one in removed for file in files(one)):
        file.unlink(missing_ok=True)


def _iterations(states: Path) -> set[int]:
    found = (re.fullmatch(r'([0-9]+)\.state', name) for name in os.listdir(states))
    return {int(match[1]) for match in found if match}


def _best_iterations(model: Any) -> set[int]:
    known = {**getattr(model, 'resumed_best', {}), **getattr(model, 'best_metric_results', {})}
    return {best['iter'] for metrics in known.values() for best in metrics.values()}


def ending_of(model: Any) -> str:
    """How the name of a network ends that is saved as the best of a set; empty where a checkpoint is saved."""
    ending: str = getattr(model, 'saved_as_best', '')
    return ending


def keep_best(model: Any, dataset: str, iteration: int) -> None:
    """Save ``net_g`` as ``net_g_best_DATASET.pth`` if ``logger.keep_best`` is better there than ever in this run."""
    metric = (model.opt.get('logger') or {}).get('keep_best')
    best = getattr(model, 'best_metric_results', {}).get(dataset, {}).get(metric)
    if best is None or best['iter'] != iteration or model.opt['rank'] != 0:
        return
    model.saved_as_best = f'best_{dataset.replace(os.sep, "_")}'
    try:
        model.save(getattr(model, 'epoch', 0), iteration)
    finally:
        model.saved_as_best = ''
