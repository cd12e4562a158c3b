"""``adapt.json``: what is adapted to what, which steps are done, and what they gave."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sr.adapt.images import DEGRADED, TAUGHT
from lora_sr.adapted_folder import RECORD
from lora_sr.errors import InputError, shown
from lora_sr.files import write_whole


class Record:
    """The record of an adaptation at work; each step is on the disk once it is done.

    Args:
        path: The file.
        content: What is in it.
    """

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content
        self.began = time.monotonic()
        self.before = float(content['seconds'])

    @classmethod
    def of(cls, folder: Path, wanted: Mapping[str, Any]) -> Record:
        """The record of a folder, or a new one.

        Args:
            folder: Where the adaptation is written.
            wanted: What is adapted to what, for JSON.

        Raises:
            InputError: The folder has something else, another adaptation, or a record that cannot be read.
        """
        path, request = folder / RECORD, json.loads(json.dumps(wanted))
        if not path.exists():
            others = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
            if others:
                raise InputError(f'The output {folder} must be an empty folder or none, got {shown(others[0])} in it.')
            return cls._begun(path, request)
        try:
            content = json.loads(path.read_text('utf-8'))
            known, steps, _ = content['request'], content['steps'], content['seconds']
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f'{path} cannot be read: choose another output folder.') from None
        if not steps and known != request:  # nothing was done: what was asked for may have been a mistake
            for name in (DEGRADED, TAUGHT):
                shutil.rmtree(folder / name, ignore_errors=True)
            return cls._begun(path, request)
        for key, value in request.items():
            if known.get(key) != value:
                raise InputError(
                    f'The output {folder} has an adaptation with another {key}, {known.get(key)}, got {value}: choose '
                    'another folder.'
                )
        return cls(path, content)

    @classmethod
    def _begun(cls, path: Path, request: dict[str, Any]) -> Record:
        record = cls(path, {'request': request, 'seconds': 0.0, 'steps': {}})
        record.write()  # so that a later call takes what it finds for its own
        return record

    @property
    def steps(self) -> dict[str, Any]:
        """What the steps that are done gave."""
        found: dict[str, Any] = self.content['steps']
        return found

    @property
    def seconds(self) -> float:
        """How long all of it has taken so far."""
        return self.before + time.monotonic() - self.began

    def put(self, step: str, result: Any) -> None:
        """Note that a step is done."""
        self.steps[step] = result
        self.content['seconds'] = round(self.seconds, 2)
        self.write()

    def withdraw(self) -> None:
        """Leave no trace of an adaptation that was refused before anything was made."""
        if not self.steps and os.listdir(self.path.parent) == [self.path.name]:
            self.path.unlink()
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def write(self) -> None:
        """Write the file."""
        write_whole(self.path, json.dumps(self.content, indent=1).encode())
