"""Writing state dicts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lora_sr.checkpoints.origin import KEY, Origin
from lora_sr.files import replacing, write_errors

SUFFIXES = ('.pth', '.safetensors')


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
