"""Adapters of other programs, which become ours on a base: PEFT's, and those of kohya's scripts and of LyCORIS."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_sr.adapters.foreign_products import Update, our_factors, product, with_magnitude
from lora_sr.adapters.layers import (
    DELTA_PREFIX,
    DTYPES,
    LORA_TENSORS,
    LoRAMultiheadAttention,
    join,
    shape_text,
    weight_key,
)
from lora_sr.adapters.misfit import Differs, Misfit, describe_differing
from lora_sr.errors import InputError, shown


@dataclass(frozen=True, eq=False)
class ForeignAdapter:
    """An adapter of another program, which :func:`lora_sr.adapters.adapter_for` makes ours for a base.

    Args:
        kind: ``PEFT`` or ``kohya``, whose layout is also that of LyCORIS.
        updates: What each layer gets, by the name that the file has for it.
        values: Parameters that the file has as a whole (biases, ``modules_to_save``), by their names.
        obstacle: Why it cannot be put onto any base, as part of a sentence; ``None`` where nothing is in the way.
    """

    kind: str
    updates: dict[str, Update]
    values: dict[str, Tensor] = field(default_factory=dict)
    obstacle: str | None = None

    @property
    def layers(self) -> list[str]:
        """The names of the layers with an update, as the file has them."""
        return list(self.updates)

    @property
    def deltas(self) -> dict[str, Tensor]:
        """Name of a parameter, as the file has it -> its whole value."""
        return self.values

    def factors_of(self, layer: str) -> list[Tensor]:
        """The tensors of a layer's update."""
        return list(self.updates[layer].parts.values())

    def rank_of(self, layer: str) -> int:
        """The rank of a layer's update."""
        return self.updates[layer].rank

    def alpha_of(self, layer: str) -> float:
        """The numerator of a layer's scale; NaN where the file does not tell it."""
        alpha = self.updates[layer].alpha
        return math.nan if alpha is None else alpha

    @torch.no_grad()
    def tensors_for(self, base: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
        """The tensors of our adapter that does the same to a base.

        Plain LoRA stays LoRA, of the same rank and to the bit. What is no product of two factors in our layout (DoRA,
        LoHa, LoKr, updates of grouped convolutions) is worked out in float64 and becomes a delta of the weight, and so
        do whole values.

        Args:
            base: The state dict of the base.

        Returns:
            Name -> tensor, and name of a layer -> rank and alpha.

        Raises:
            Misfit: It does not fit: how many layers differ, and the first of them.
            InputError: It cannot be put onto any base.
        """
        if self.obstacle:
            raise InputError(self.obstacle)
        self._check_values()
        names = _Names([*self.updates, *self.values], base)
        tensors: dict[str, Tensor] = {}
        layers: dict[str, tuple[int, float]] = {}
        differing: dict[str, str] = {}
        owners: dict[str, str] = {}  # of the weights, by the names that the file has for them
        for own_name, update in self.updates.items():
            try:
                name = names.layer(own_name)
                owner = owners.setdefault(weight_key(name, base), own_name)
                if owner != own_name:
                    raise Differs(f'{shown(owner)} and {shown(own_name)} are both for {shown(name)}')
                if self.kind == 'PEFT' and _is_out_projection(name, base) and update.parts['up'].any():
                    # https://github.com/huggingface/peft/pull/3774
                    raise Differs(f'{shown(name)} counts once or twice in PEFT, depending on its version')
                if _convert(name, update, base, tensors):
                    layers[name] = update.rank, update.our_alpha
            except Differs as error:
                differing[own_name] = str(error)
        for own_name, value in self.values.items():
            try:
                _convert_value(names.parameter(own_name), value, base, tensors)
            except Differs as error:
                differing.setdefault(own_name.rpartition('.')[0], str(error))
        if differing:
            count = len({*self.updates, *(name.rpartition('.')[0] for name in self.values)})
            raise Misfit(describe_differing(differing, count))
        return tensors, layers

    def _check_values(self) -> None:
        for name in (*self.updates, *self.values):
            values = self.updates[name].parts.values() if name in self.updates else [self.values[name]]
            if not all(value.isfinite().all() for value in values if value.dtype in DTYPES):
                raise InputError(f'it has values that are not finite, in {shown(name)}')


class _Names:
    """Finds the layers of a base by the names that a file has for them.

    Other programs put something before the names (``lora_unet_``, ``unet.``), and some write underscores for dots.
    What stands before them is what is left of most names when the longest name of the base is taken off their ends.
    """

    def __init__(self, names: Iterable[str], base: Mapping[str, Tensor]):
        self.base = base
        self.layers = {
            key[: -len(end)]: None  # in their order, for messages
            for key in base
            for end in ('.weight', f'.{LoRAMultiheadAttention.weight_name}')
            if key.endswith(end)
        }
        self.flat: dict[str, list[str]] = {}
        for name in (*self.layers, *base):
            self.flat.setdefault(_flat(name), []).append(name)
        prefixes: Counter[str] = Counter()
        for name in names:
            flat = _flat(name)
            starts = [0, *(place.end() for place in re.finditer('_', flat))]
            prefixes.update(flat[:start] for start in starts if flat[start:] in self.flat)
        most = max(prefixes.values(), default=0)
        self.prefix = min((prefix for prefix, count in prefixes.items() if count == most), key=len, default='')

    def layer(self, name: str) -> str:
        """The name that the base has for a layer."""
        return self._find(name, self.layers)

    def parameter(self, name: str) -> str:
        """The key that the base has for a parameter."""
        return self._find(name, self.base)

    def _find(self, name: str, known: Mapping[str, Any]) -> str:
        flat = _flat(name)
        prefix = self.prefix if flat.startswith(self.prefix) else ''
        # Also with some of what stands before it: a base may have both, net.conv1 and conv1.
        starts = [0, *(place.end() for place in re.finditer('_', prefix))]
        found = list(dict.fromkeys(other for start in starts for other in self._of(name[start:], known)))
        if not found:
            raise Differs(f'{shown(name)} is not there')
        if len(found) > 1:
            raise Differs(f'{shown(name)} may be {shown(found[0])} or {shown(found[1])}')
        return found[0]

    def _of(self, name: str, known: Mapping[str, Any]) -> list[str]:
        """The names that a name may stand for: itself, else those that differ in dots and underscores alone."""
        return [name] if name in known else [other for other in self.flat.get(_flat(name), ()) if other in known]


def _flat(name: str) -> str:
    return name.replace('.', '_')


def _convert(name: str, update: Update, base: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    """Add the tensors of our adapter for one layer: LoRA or a delta of its weight, and a delta of its bias.

    Returns:
        Whether it is LoRA.
    """
    key, parts = weight_key(name, base), update.parts
    weight = base[key]
    if weight.ndim < 2 or not weight.is_floating_point():
        raise Differs(f'{shown(name)} is {shape_text(weight.shape)} of {weight.dtype} here, which carries no LoRA')
    scale = update.our_alpha / update.rank
    factors = our_factors(name, update, weight) if parts.keys() <= {'down', 'up', 'bias'} else None
    if factors is None:
        delta = product(name, update, weight) * scale
        _add_delta(tensors, key, with_magnitude(name, update, weight, delta), weight)
    else:
        values = (*factors, torch.tensor(update.our_alpha, dtype=torch.float32))
        tensors.update((join(name, tensor), value) for tensor, value in zip(LORA_TENSORS, values))
    if 'bias' in parts:
        bias = base.get(join(name, 'bias'))
        if bias is None or bias.shape != parts['bias'].shape:
            raise Differs(f'{shown(name)} has {"no" if bias is None else "another"} bias here')
        _add_delta(tensors, join(name, 'bias'), parts['bias'].double() * scale, bias)
    return factors is not None


def _convert_value(key: str, value: Tensor, base: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Add the delta that brings a parameter to its value; counters of batches stay as they are."""
    if base[key].shape != value.shape:
        raise Differs(f'{shown(key)} is {shape_text(base[key].shape)} here, got {shape_text(value.shape)}')
    if not base[key].is_floating_point():
        return
    if value.dtype not in DTYPES:
        raise Differs(f'{shown(key)} is of {base[key].dtype} here, got {value.dtype}')
    _add_delta(tensors, key, value.double() - base[key].double(), base[key])


def _add_delta(tensors: dict[str, Tensor], key: str, delta: Tensor, parameter: Tensor) -> None:
    """Add to the delta of a parameter, unless it changes nothing."""
    if not delta.any():
        return
    name, _, last = key.rpartition('.')
    delta_key = join(name, DELTA_PREFIX + last)
    delta = delta.to(torch.promote_types(parameter.dtype, torch.float32))
    tensors[delta_key] = tensors[delta_key] + delta if delta_key in tensors else delta


def _is_out_projection(name: str, base: Mapping[str, Tensor]) -> bool:
    """Whether a layer is that behind ``nn.MultiheadAttention``."""
    attention, _, last = name.rpartition('.')
    return last == 'out_proj' and join(attention, LoRAMultiheadAttention.weight_name) in base
