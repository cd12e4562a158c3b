"""Writing state dicts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lora_sr.files import replacing, write_errors

SUFFIXES = ('.pth', '.safetensors')


@contextlib.contextmanager
def writing(state: dict[str, Tensor], output: Path) -> Iterator[Path]:
    """Write a state dict, let the caller prove the file that is given to it, and only then give it its name."""
    with replacing(output) as partial:
        with write_errors(output):
            _write(state, partial)
        yield partial


def _write(state: dict[str, Tensor], path: Path) -> None:
    # Copies, since safetensors takes no tensors that share their memory.
    state = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    with open(path, 'wb') as file:
        if path.suffix == '.safetensors':
            file.write(save(state))
        else:
            torch.save({'params': state}, file)
