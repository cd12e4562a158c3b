"""Writing state dicts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lora_sr.checkpoints.origin import KEY, Origin
from lora_sr.errors import InputError
from lora_sr.files import replacing, write_errors

SUFFIXES = ('.pth', '.safetensors')


def check_not_input(output: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Check that what is written does not replace what it is made of, which could not be made again from it.

    Raises:
        InputError: The output is an input, under this name or another.
    """
    for path in inputs:
        if output.exists() and os.path.exists(path) and output.samefile(path):
            raise InputError(f'The output {output} is the input {path}, which would be lost: choose another output.')


@contextlib.contextmanager
def writing(state: Mapping[str, Tensor], output: Path, origin: Origin) -> Iterator[Path]:
    """Write a state dict, let the caller prove the file that is given to it, and only then give it its name."""
    with replacing(output) as partial:
        with write_errors(output):
            _write(state, partial, origin)
        yield partial


def write_state(state: Mapping[str, Tensor], output: Path, origin: Origin) -> None:
    """Write a state dict whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    with writing(state, output, origin):
        pass


def _write(state: Mapping[str, Tensor], path: Path, origin: Origin) -> None:
    # Copies, since safetensors takes no tensors that share their memory.
    state = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    with open(path, 'wb') as file:
        if path.suffix == '.safetensors':
            file.write(save(state, metadata={KEY: origin.to_json()}))
        else:
            torch.save({'params': state, KEY: origin.to_dict()}, file)
