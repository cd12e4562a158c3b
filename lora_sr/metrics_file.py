"""``metrics.jsonl`` in the folder of a run: its losses, validations and speed, a JSON object a line.

- of training: ``iter``, ``epoch``, ``lr`` (a list, one for each group of parameters), ``losses`` by name,
  ``seconds`` and ``data_seconds`` of an iteration, ``samples_per_second`` of all processes, and ``memory``, the bytes
  that the first process had at its peak, of the GPU where it has one;
- of a validation: ``iter``, ``validation``, the name of the set, and ``metrics`` by name;
- of a run that was stopped: ``iter`` and ``stopped``, by what; of one at its end: ``iter`` and ``finished``.

Numbers that are not finite, of which JSON has none, are the texts ``inf``, ``-inf`` and ``nan``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sr.errors import InputError
from lora_sr.files import check_regular, write_errors, write_whole

NAME = 'metrics.jsonl'
ENDS = ('stopped', 'finished')


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file, in order. What is no JSON object with an ``iter`` does not count, as a line cut by a kill.

    Raises:
        InputError: The file cannot be read.
    """
    check_regular(path, 'the metrics')
    try:
        text = Path(path).read_text(encoding='utf-8', errors='replace')
    except OSError as error:
        raise InputError(f'The metrics {path} cannot be read: {error.strerror}.') from None
    lines = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get('iter'), int):
            lines.append(found)
    return lines


class Metrics:
    """The file of a run at work.

    The first line that is added drops what the run is about to do again: whoever goes on from iteration 2,000 of a run
    that had come to 2,700 leaves no line twice.

    Args:
        path: The file, which need not be there.
        done: The iteration that the run goes on from.
        validates: Whether it validates there once more.
    """

    def __init__(self, path: str | os.PathLike[str], done: int = 0, validates: bool = False):
        self.path, self.done, self.validates = Path(path), done, validates
        self.is_begun = False

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            InputError: It cannot be written.
        """
        if not self.is_begun:
            self._drop_what_comes_again()
            self.is_begun = True
        with write_errors(self.path), open(self.path, 'ab', buffering=0) as file:
            file.write(_line(values))

    def _drop_what_comes_again(self) -> None:
        if not self.path.exists():
            return
        lines = filter(self._stays, read_metrics(self.path))
        write_whole(self.path, b''.join(map(_line, lines)))

    def _stays(self, line: Mapping[str, Any]) -> bool:
        again = self.validates and line['iter'] == self.done and 'validation' in line
        return line['iter'] <= self.done and not again and not any(key in line for key in ENDS)


def _line(values: Mapping[str, Any]) -> bytes:
    return f'{json.dumps(_finite(values), allow_nan=False)}\n'.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
