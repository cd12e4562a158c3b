"""The noun for a file of weights: read once, and handed on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_sr.adapters import is_lora_key
from lora_sr.adapters.foreign_files import is_foreign
from lora_sr.checkpoints.content import PARAM_KEYS, Content, read_checkpoint, without_module_prefix
from lora_sr.checkpoints.families import family_of
from lora_sr.checkpoints.origin import Origin, fingerprint
from lora_sr.errors import InputError, shown

BASE, ADAPTED, ADAPTER = 'base', 'adapted', 'adapter'
SHOWN = 3  # of the state dicts in a file


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights that has been read.

    Args:
        path: The file.
        content: What it holds.
        param_key: Where in it the state dict is; ``None`` for the file itself.
        state: The state dict, on the CPU, without a leading ``module.`` (DataParallel) in its names.
    """

    path: Path
    content: Content
    param_key: str | None
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str], param_key: str | None = None) -> Checkpoint:
        """Read a file.

        Args:
            path: A ``.pth`` file, with the state dict at its top or under ``params_ema`` / ``params`` as BasicSR
                writes it, or a ``.safetensors`` file.
            param_key: Where the state dict is in the file. By default ``params_ema``, else ``params``, else the top.

        Raises:
            InputError: The file is missing, is no checkpoint, or does not have ``param_key``.
        """
        return cls.of(path, read_checkpoint(path), param_key)

    @classmethod
    def of(cls, path: str | os.PathLike[str], content: Content, param_key: str | None = None) -> Checkpoint:
        """The same of a file that has been read already."""
        if param_key is None:
            param_key = next((key for key in PARAM_KEYS if key in content), None)
        elif param_key not in content:
            raise InputError(f'{path} has no "{shown(param_key)}": it has {", ".join(map(shown, list(content)[:4]))}.')
        state = content if param_key is None else content[param_key]
        if not is_state_dict(state):
            raise InputError(f'{path} holds no state dict, i.e. no mapping of names to tensors{_nested(content)}.')
        return cls(Path(path), content, param_key, without_module_prefix(state, path))

    @property
    def form(self) -> str:
        """``base``; ``adapted``, i.e. a base with LoRA beside; or ``adapter``, LoRA alone. The keys tell.

        What PEFT, kohya's scripts and LyCORIS write is an ``adapter``.
        """
        if is_foreign(self.state):
            return ADAPTER
        is_lora = [is_lora_key(key) for key in self.state]
        return ADAPTER if all(is_lora) else ADAPTED if any(is_lora) else BASE

    @cached_property
    def family(self) -> str | None:
        """The name of the network that it belongs to, or ``None`` where that is not known here."""
        return family_of(self.state)

    @property
    def origin(self) -> Origin | None:
        """Where it says that it comes from."""
        return self.content.origin

    @cached_property
    def fingerprint(self) -> str:
        """That of its base, see :func:`lora_sr.checkpoints.origin.fingerprint`."""
        return fingerprint(self.state)


def is_state_dict(value: Any) -> bool:
    """Whether a value is a mapping of names to tensors, with at least one."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _nested(content: Content) -> str:
    keys = [shown(key) for key, value in content.items() if is_state_dict(value)][:SHOWN]
    return f': there is one under {" and one under ".join(keys)}, which --param-key has to name' if keys else ''
