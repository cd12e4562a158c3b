"""Where a file comes from: what every file that a run or a command writes says of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_sr.adapters.checkpoint import LONGEST_NAME, is_lora_key
from lora_sr.errors import shown

KEY = 'lora_sr'  # in a .pth file beside the state dicts, in the metadata of other formats
# Buffers that follow from the sizes of a network and that not every file has, or that move while it trains.
DERIVED = ('attn_mask', 'relative_position_index', 'num_batches_tracked', 'running_mean', 'running_var')
SHOWN = 12  # digits of a fingerprint
SHOWN_ADAPTERS = 4
LARGEST_ITERATION = 10**12


@dataclass(frozen=True)
class Origin:
    """Where a file comes from.

    Args:
        run: Name of the run that trained it.
        iteration: Of that run; ``None`` stands for its end.
        options: SHA-256 of the effective options of the run.
        network: The section ``network_g`` of the run.
        base: Fingerprint of the base that was adapted or fine-tuned, see :func:`fingerprint`.
        adapters: Fingerprints of the adapters that have been put onto it, merged or beside its base.
        layout: Name of a weight -> its name in the file of the base, of those that differ.
        version: Of lora_sr.
    """

    run: str | None = None
    iteration: int | None = None
    options: str | None = None
    network: dict[str, Any] | None = None
    base: str | None = None
    adapters: tuple[str, ...] = ()
    layout: dict[str, str] | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if self.version is None:
            import lora_sr

            object.__setattr__(self, 'version', lora_sr.__version__)

    def to_dict(self) -> dict[str, Any]:
        """What is known, in values that ``torch.load(weights_only=True)`` reads; the version is that at hand."""
        import lora_sr

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values.update(adapters=list(self.adapters), network=None, version=lora_sr.__version__)
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # of a file, in which anything may stand
            values['network'] = json.loads(json.dumps(self.network))
        return {key: value for key, value in values.items() if value not in (None, [], {})}

    def to_json(self) -> str:
        """The same as one line, for the metadata of safetensors, ONNX and TorchScript files."""
        return json.dumps(self.to_dict())

    @classmethod
    def parse(cls, value: object) -> Origin | None:
        """What :meth:`to_dict` or :meth:`to_json` gave; ``None`` for anything else."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if not isinstance(value, Mapping):
            return None
        values = {key: value[key] for key, kind in _KINDS.items() if isinstance(value.get(key), kind)}
        if not 0 <= values.get('iteration', 0) <= LARGEST_ITERATION:
            del values['iteration']
        if not _is_layout(values.get('layout', {})):
            del values['layout']
        adapters = tuple(adapter for adapter in values.pop('adapters', ()) if isinstance(adapter, str))
        return cls(**{'version': 'unknown', **values, 'adapters': adapters})

    def with_adapters(self, base: Mapping[str, Tensor], adapters: Iterable[str]) -> Origin:
        """The origin of what becomes of a base, given by its state dict, when adapters are put on it."""
        adapters = tuple(dict.fromkeys((*self.adapters, *adapters)))
        return dataclasses.replace(self, base=fingerprint(base), adapters=adapters)

    def __str__(self) -> str:
        """As a part of a line: a file may say anything of itself."""
        parts = []
        if self.run is not None:
            iteration = '' if self.iteration is None else f', iteration {self.iteration:,}'
            parts.append(f'run {shown(self.run)}{iteration}')
        if self.options is not None:
            parts.append(f'options {shown(self.options[:SHOWN])}')
        if self.base is not None:
            parts.append(f'base {shown(self.base[:SHOWN])}')
        if self.adapters:
            adapters = [shown(adapter[:SHOWN]) for adapter in self.adapters[:SHOWN_ADAPTERS]]
            more = len(self.adapters) - len(adapters)
            parts.append(f'with adapters {", ".join(adapters)}' + (f' and {more} more' if more else ''))
        return ', '.join([*parts, f'lora_sr {shown(self.version or "")}'])


_KINDS: dict[str, type | tuple[type, ...]] = {
    'run': str,
    'iteration': int,
    'options': str,
    'network': Mapping,
    'base': str,
    'adapters': (list, tuple),
    'layout': Mapping,
    'version': str,
}


def _is_layout(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping gives each name another one that no other name has."""
    names = [*value, *value.values()]
    return all(isinstance(name, str) and name.isprintable() and len(name) <= LONGEST_NAME for name in names) and len(
        value
    ) == len(set(value.values()))


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights of a base: names, shapes and values, whatever their order and precision.

    LoRA's tensors do not count, so that an adapted network has the fingerprint of its base.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        if is_lora_key(key) or key.endswith(DERIVED):
            continue
        digest.update(f'{key} {tuple(value.shape)}\n'.encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def adapter_fingerprint(state: Mapping[str, Tensor]) -> str:
    """The same of the tensors of LoRA in a state dict."""
    digest = hashlib.sha256()
    for key in sorted(filter(is_lora_key, state)):
        digest.update(f'{key} {tuple(state[key].shape)}\n'.encode())
        digest.update(_bytes(state[key]))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    value = value.float() if value.is_floating_point() else value
    return value.detach().cpu().resolve_conj().resolve_neg().reshape(-1).numpy().tobytes()
