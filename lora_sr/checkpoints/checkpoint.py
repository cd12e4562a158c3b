"""The noun for a file of weights: read once, and handed on."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from lora_sr.adapters import is_lora_key, only_lora, without_lora
from lora_sr.adapters.foreign_files import is_foreign
from lora_sr.checkpoints.community import architecture_of, names_in_network
from lora_sr.checkpoints.content import Content, read_checkpoint, weights_for
from lora_sr.checkpoints.families import family_of
from lora_sr.checkpoints.layouts import as_rrdbnet, in_layout
from lora_sr.checkpoints.origin import Origin, fingerprint
from lora_sr.checkpoints.sections import names_file
from lora_sr.checkpoints.unwrapping import find_weights

BASE, ADAPTED, ADAPTER = 'base', 'adapted', 'adapter'


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights that has been read.

    Args:
        path: The file.
        content: What it holds.
        param_key: Where in it the state dict is, by the keys of the sections around it; ``None`` for the file itself.
        prefix: What the file has before, or within, the names of its weights, as ``module.``.
        state: The state dict, on the CPU, under the names of its network.
        layout: Name in ``state`` -> name in the file, of those that differ by more than the prefix. Of a file that a
            run has written it is that of the file from which the run began.
    """

    path: Path
    content: Content
    param_key: str | None
    prefix: str
    state: dict[str, Tensor]
    layout: dict[str, str]

    @classmethod
    def read(cls, path: str | os.PathLike[str], param_key: str | None = None) -> Checkpoint:
        """Read a file.

        Args:
            path: A file in the format of torch or of safetensors, whatever its name.
            param_key: Where the state dict is in the file. By default
                :func:`lora_sr.checkpoints.unwrapping.find_weights` finds it.

        Raises:
            InputError: The file is missing, is no checkpoint, or does not have ``param_key``.
        """
        return cls.of(path, read_checkpoint(path), param_key)

    @classmethod
    def of(cls, path: str | os.PathLike[str], content: Content, param_key: str | None = None) -> Checkpoint:
        """The same of a file that has been read already."""
        found = find_weights(content, path, param_key, _is_known)
        found.warn(path)
        state, layout = as_rrdbnet(found.state) or (found.state, {})
        if not layout and content.origin is not None:
            layout = content.origin.layout or {}
        names = names_in_network(state) if not layout and family_of(state) is None else None
        if names is not None:
            layout = {name: old for name, old in names.items() if old != name}
            updates = only_lora(state)
            state = OrderedDict({**{name: state[old] for name, old in names.items()}, **updates})
        return cls(Path(path), content, found.param_key, found.prefix, state, layout)

    def of_network(self, network: nn.Module) -> Checkpoint:
        """The same for a network at hand, whose names tell what of those in the file is a prefix."""
        found = weights_for(network, self.content, self.path, self.param_key)
        return replace(self, state=found.state, layout=self.layout or found.layout)

    @property
    def form(self) -> str:
        """``base``; ``adapted``, i.e. a base with LoRA beside; or ``adapter``, LoRA alone. See :func:`form_of`."""
        return form_of(self.state)

    @cached_property
    def family(self) -> str | None:
        """The name of the network that it belongs to, or ``None`` where that is not known here."""
        return None if self._is_of_spandrel else family_of(self.state)

    @cached_property
    def architecture(self) -> str | None:
        """What spandrel calls the network, where no family of this package knows it and spandrel does."""
        return architecture_of(self.in_file) if self.family is None else None

    @cached_property
    def in_file(self) -> dict[str, Tensor]:
        """The state dict under the names of its file, or of that from which a run began: spandrel knows it by these."""
        return dict(in_layout(self.state, self.layout))

    @cached_property
    def _is_of_spandrel(self) -> bool:
        """Whether spandrel has built its network, which may then have the names of a family."""
        if self.origin is not None and names_file(self.origin.network):
            return True
        if not self.layout:
            return False
        base = without_lora(self.in_file)
        return as_rrdbnet(base) is None and architecture_of(base) is not None

    @property
    def is_known(self) -> bool:
        """Whether its network is known by its keys: here, or by spandrel."""
        return self.family is not None or self.architecture is not None

    @property
    def origin(self) -> Origin | None:
        """Where it says that it comes from."""
        return self.content.origin

    @cached_property
    def fingerprint(self) -> str:
        """That of its base, see :func:`lora_sr.checkpoints.origin.fingerprint`."""
        return fingerprint(self.state)


def form_of(state: Mapping[str, Tensor]) -> str:
    """The form of a state dict, which its keys tell; what PEFT, kohya's scripts and LyCORIS write is an ``adapter``."""
    if is_foreign(state):
        return ADAPTER
    is_lora = [is_lora_key(key) for key in state]
    return ADAPTER if all(is_lora) else ADAPTED if any(is_lora) else BASE


def _is_known(state: Mapping[str, Tensor]) -> bool:
    return family_of(state) is not None or as_rrdbnet(state) is not None or architecture_of(state) is not None
