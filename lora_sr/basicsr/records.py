"""The numbers of a run in its ``metrics.jsonl``, see :mod:`lora_sr.metrics_file`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sr.basicsr.samples import stream_of
from lora_sr.metrics_file import NAME, Metrics


def begin(opt: Mapping[str, Any]) -> None:
    """Begin the records of a run, or go on with them, in the process that logs."""
    stream = stream_of(opt)
    if stream is None or opt['rank'] != 0:
        return
    done = stream.start.iteration
    frequency = (opt.get('val') or {}).get('val_freq')
    # A run that goes on validates where it was saved, and one that is over at its end.
    validates = frequency is not None and (done % frequency == 0 or done >= int(opt['train']['total_iter']))
    stream.metrics = Metrics(Path(opt['path']['experiments_root']) / NAME, done, validates)


def record(opt: Mapping[str, Any], **values: Any) -> None:
    """Add a line to the records of the run with these options, if it has some here."""
    stream = stream_of(opt)
    if stream is not None and stream.metrics is not None:
        stream.metrics.add(values)
