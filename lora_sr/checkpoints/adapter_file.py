"""Adapter files, and the bases that they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_sr.adapters import Adapter, describe_misfit, parse_adapter
from lora_sr.adapters.config import LARGEST_ALPHA
from lora_sr.checkpoints.checkpoint import ADAPTED, ADAPTER, Checkpoint
from lora_sr.checkpoints.origin import SHOWN, Origin, adapter_fingerprint, fingerprint
from lora_sr.checkpoints.unwrapping import bare_weights, is_state_dict
from lora_sr.errors import InputError, shown

SHOWN_MISFIT = 180  # letters of why an adapter does not fit


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file that has been read.

    Args:
        path: The file.
        adapter: What it holds.
        origin: Where it says that it comes from.
    """

    path: Path
    adapter: Adapter
    origin: Origin | None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> AdapterFile:
        """Read an adapter file.

        Raises:
            InputError: The file is missing, cannot be read, or holds no adapter.
        """
        if not os.path.isfile(path):
            raise InputError(f'There is no adapter file {path}.')
        return cls.of(Checkpoint.read(path))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> AdapterFile:
        """That of a file that has been read.

        Raises:
            InputError: It holds no adapter.
        """
        if checkpoint.form != ADAPTER:
            kind = 'an adapted checkpoint: take its adapter out with `lora-sr adapter extract`'
            kind = kind if checkpoint.form == ADAPTED else 'a base checkpoint'
            raise InputError(f'{checkpoint.path} is no adapter but {kind}.')
        content = checkpoint.content
        return cls(checkpoint.path, parse_adapter(checkpoint.state, content.metadata, checkpoint.path), content.origin)

    @property
    def fingerprint(self) -> str:
        """That of its tensors."""
        return adapter_fingerprint(self.adapter.tensors)

    def check_fit(self, base: Mapping[str, Tensor], name: object, has_branches: bool = False) -> None:
        """Check that the layers of a base have the shapes that the adapter is for, and that its values are finite.

        Args:
            base: The state dict of the base.
            name: What the base is called in the message.
            has_branches: Whether the base is in training form, which may be why an adapter does not fit.

        Raises:
            InputError: They have not.
        """
        misfit = describe_misfit(self.adapter, base)
        if misfit:
            hint = ' (the base has branches, which `lora-sr merge` folds)' if has_branches else ''
            raise InputError(
                f'The adapter {self.path} does not fit the base {name}: {shown(misfit, SHOWN_MISFIT)}{hint}.'
            )
        for key, value in self.adapter.tensors.items():
            if not value.isfinite().all():
                raise InputError(f'The adapter {self.path} has values that are not finite, in {shown(key)}.')
            if key.endswith('lora_alpha') and not 0 < value.float().abs().max() <= LARGEST_ALPHA:
                raise InputError(
                    f'The adapter {self.path} is damaged: {shown(key)} must be a number of at most {LARGEST_ALPHA:g} '
                    f'other than 0, got {value.flatten()[0].item():g}.'
                )

    def check_base(
        self,
        base: Mapping[str, Tensor],
        origin: Origin | None,
        name: object,
        force: bool,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that a base is the one that the adapter was trained on, and does not carry it already.

        Args:
            base: The state dict of the base.
            origin: Where the base comes from.
            name: What the base is called in the message.
            force: Check nothing.
            content: What else is in the file of the base, where another state dict may be the right one.

        Raises:
            InputError: It is another one, or it carries the adapter.
        """
        if force:
            return
        if origin is not None and self.fingerprint in origin.adapters:
            raise InputError(f'The base {name} carries the adapter {self.path} already: put it on twice with --force.')
        trained_on = None if self.origin is None else self.origin.base
        if trained_on is None:
            return
        found = fingerprint(base)
        if found != trained_on:
            for key, value in (content or {}).items():
                if is_state_dict(value) and fingerprint(bare_weights(value)) == trained_on:
                    raise InputError(
                        f'The adapter {self.path} was trained on the state dict {key} of {name}, which is not the one '
                        f'that is read: name it with --param-key {key}.'
                    )
            raise InputError(
                f'The adapter {self.path} was trained on another base than {name}: its fingerprint is '
                f'{trained_on[:SHOWN]}, got {found[:SHOWN]}; put it on this one with --force.'
            )


def check_once(files: Sequence[AdapterFile], force: bool) -> None:
    """Check that no adapter stands twice among those that go onto one base.

    Raises:
        InputError: One does; ``force`` allows it.
    """
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(file.fingerprint, file.path)
        if file is not files[0] and other is not file.path and not force:
            raise InputError(f'{other} and {file.path} are one adapter: put it on twice with --force.')
