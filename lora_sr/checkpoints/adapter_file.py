"""Adapter files, and the bases that they belong to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_sr.adapters import Adapter, ForeignAdapter, adapter_for, parse_adapter
from lora_sr.adapters.adapter import renamed
from lora_sr.adapters.foreign_files import PEFT_WEIGHTS, weights_file
from lora_sr.adapters.misfit import Misfit
from lora_sr.checkpoints.checkpoint import ADAPTED, ADAPTER, Checkpoint
from lora_sr.checkpoints.content import Content
from lora_sr.checkpoints.layouts import in_layout
from lora_sr.checkpoints.origin import SHOWN, Origin, adapter_fingerprint, fingerprint
from lora_sr.checkpoints.unwrapping import state_dicts
from lora_sr.errors import InputError, shown

SHOWN_MISFIT = 180  # letters of why an adapter does not fit
SHOWN_KEY = 200  # letters of a key that is to be typed
MOST_STATE_DICTS = 16  # of a file, that are compared with what an adapter was trained on


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file that has been read.

    Args:
        path: The file, or the folder that PEFT writes.
        adapter: What it holds: an adapter of ours, or of another program.
        fingerprint: That of its tensors.
        origin: Where it says that it comes from.
    """

    path: Path
    adapter: Adapter | ForeignAdapter
    fingerprint: str
    origin: Origin | None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> AdapterFile:
        """Read an adapter file: our own, or one of PEFT (also its folder), of kohya's scripts or of LyCORIS.

        Raises:
            InputError: The file is missing, cannot be read, or holds no adapter.
        """
        path = weights_file(path)
        if not path.is_file():
            hint = f': in a folder it must be called {" or ".join(PEFT_WEIGHTS)}' if path.is_dir() else ''
            raise InputError(f'There is no adapter file {path}{hint}.')
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
        path, state, content = checkpoint.path, checkpoint.state, checkpoint.content
        adapter = parse_adapter(state, content.metadata, path)
        digest = adapter_fingerprint(state) if isinstance(adapter, Adapter) else fingerprint(state)
        return cls(path, adapter, digest, content.origin)

    def adapter_for(
        self,
        base: Mapping[str, Tensor],
        name: object,
        has_branches: bool = False,
        layout: Mapping[str, str] | None = None,
    ) -> Adapter:
        """The adapter for a base, of whose layers it has the shapes, and whose values are finite.

        Args:
            base: The state dict of the base.
            name: What the base is called in the message.
            has_branches: Whether the base is in training form, which may be why an adapter does not fit.
            layout: Name in the base -> name in its file, of those that differ: other programs know the latter.

        Raises:
            InputError: It does not fit, or cannot be put onto any base.
        """
        try:
            if layout and isinstance(self.adapter, ForeignAdapter):
                with contextlib.suppress(Misfit):  # which is told by the names of the network
                    return renamed(adapter_for(self.adapter, in_layout(base, layout)), layout)
            return adapter_for(self.adapter, base)
        except Misfit as error:
            hint = ' (the base has branches, which `lora-sr merge` folds)' if has_branches else ''
            raise InputError(
                f'The adapter {self.path} does not fit the base {name}: {shown(str(error), SHOWN_MISFIT)}{hint}.'
            ) from None
        except InputError as error:
            raise InputError(f'The adapter {self.path} cannot be used: {str(error).rstrip(".")}.') from None

    def check_base(
        self,
        base: Mapping[str, Tensor],
        origin: Origin | None,
        name: object,
        force: bool,
        content: Content | None = None,
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
            key = None if content is None else _param_key_of(trained_on, content)
            if key is not None:
                key = shown(key, SHOWN_KEY)
                raise InputError(
                    f'The adapter {self.path} was trained on the state dict {key} of {name}, which is not the one '
                    f'that is read: name it with --param-key {key}.'
                )
            raise InputError(
                f'The adapter {self.path} was trained on another base than {name}: its fingerprint is '
                f'{trained_on[:SHOWN]}, got {found[:SHOWN]}; put it on this one with --force.'
            )


def _param_key_of(wanted: str, content: Content) -> str | None:
    """Where in a file the base of a fingerprint is; ``None`` where it is not."""
    for key in list(state_dicts(content))[:MOST_STATE_DICTS]:
        with contextlib.suppress(InputError):  # of names that it has twice
            if key and fingerprint(Checkpoint.of('', content, key).state) == wanted:
                return key
    return None


def check_once(files: Sequence[AdapterFile], force: bool) -> None:
    """Check that no adapter stands twice among those that go onto one base.

    Raises:
        InputError: One does; ``force`` allows it.
    """
    seen: dict[str, Path] = {}
    for file in files:
        if file.fingerprint in seen and not force:
            other = seen[file.fingerprint]
            raise InputError(f'{other} and {file.path} are one adapter: put it on twice with --force.')
        seen[file.fingerprint] = file.path


def fitted(
    files: Iterable[AdapterFile],
    base: Mapping[str, Tensor],
    origin: Origin | None,
    name: object,
    has_branches: bool,
    layout: Mapping[str, str] | None,
    content: Content | None,
    force: bool,
) -> list[Adapter]:
    """What the adapters of files are for a base, once each is known to be for it.

    The arguments are those of :meth:`AdapterFile.adapter_for` and :meth:`AdapterFile.check_base`.

    Raises:
        InputError: An adapter does not fit, cannot be used, was trained on another base, or is on this one already.
    """
    adapters = []
    for file in files:
        adapters.append(file.adapter_for(base, name, has_branches, layout))
        file.check_base(base, origin, name, force, content)
    return adapters
