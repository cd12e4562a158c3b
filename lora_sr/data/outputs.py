"""The folder that images or databases are written to."""

from __future__ import annotations

import os
from pathlib import Path

from lora_sr.errors import InputError


def check_output_folder(output: Path) -> None:
    """Check that the output is a folder, or that nothing is in the way of one.

    Raises:
        InputError: There is a file, a pipe, a device or a link that leads nowhere, at its place or above it.
    """
    for path in (output, *output.parents):
        if os.path.isdir(path):
            return
        if os.path.lexists(path):
            kind = 'a file' if os.path.isfile(path) else 'a pipe or a device'
            if not os.path.exists(path):
                kind = 'a link that leads nowhere'
            place = '' if path == output else f' at {path}'
            raise InputError(f'The output {output} must be a folder, got {kind}{place}.')
