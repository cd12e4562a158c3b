"""Adapters of other programs, which become ours on a base: PEFT's, and those of kohya's scripts and of LyCORIS."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Iterable, Mapping

import torch
from torch import Tensor

from lora_sr.adapters.layers import (
    DELTA_PREFIX,
    DTYPES,
    LORA_TENSORS,
    LoRAMultiheadAttention,
    join,
    matrix_shape,
    weight_key,
)
from lora_sr.errors import InputError, shown

SHOWN_MISFITS = 3  # of the layers that do not fit
LARGEST_GROWTH = 4  # times the values of a weight that its two factors may have

MAGNITUDES = {'lora_magnitude_vector', 'dora_scale'}  # of DoRA: PEFT's, and that of LyCORIS


class Misfit(InputError):
    """An adapter that is not for a base; the message is the part of a sentence that says why."""


@dataclass(frozen=True, eq=False)
class Update:
    """What a file holds for one layer.

    Args:
        parts: Name of a part -> tensor. ``down`` (r, n, …) and ``up`` (m, r, …) are those of LoRA for a weight
            (m, n, …), and ``mid`` (r, r, …) may stand between them. The others keep their names.
        is_transposed: Whether a matrix is stored as (n, m), as that of embeddings is.
        alpha: Numerator of its scale; ``None`` where nothing tells.
        is_rank_stabilized: Whether the denominator of the scale is the square root of the rank.
    """

    parts: dict[str, Tensor]
    is_transposed: bool = False
    alpha: float | None = None
    is_rank_stabilized: bool = False

    @property
    def rank(self) -> int:
        """The denominator of its scale."""
        for part in ('down', 'hada_w1_b', 'lokr_w1_b', 'lokr_w2_b'):
            if part in self.parts:
                return self.parts[part].shape[0]
        return 1

    @property
    def our_alpha(self) -> float:
        """The alpha for which alpha / rank is its scale."""
        assert self.alpha is not None
        if 'lokr_w1' in self.parts and 'lokr_w2' in self.parts:
            return float(self.rank)  # of two whole matrices LyCORIS takes no scale
        return self.alpha * math.sqrt(self.rank) if self.is_rank_stabilized else self.alpha


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
                    raise _Differs(f'{shown(owner)} and {shown(own_name)} are both for {shown(name)}')
                if self.kind == 'PEFT' and _is_out_projection(name, base) and update.parts['up'].any():
                    # https://github.com/huggingface/peft/pull/3774
                    raise _Differs(f'{shown(name)} counts once or twice in PEFT, depending on its version')
                if _convert(name, update, base, tensors):
                    layers[name] = update.rank, update.our_alpha
            except _Differs as error:
                differing[own_name] = str(error)
        for own_name, value in self.values.items():
            try:
                _convert_value(names.parameter(own_name), value, base, tensors)
            except _Differs as error:
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


def describe_differing(differing: Mapping[str, str], count: int) -> str:
    """How many of ``count`` layers differ, and the first of them, given by name -> how."""
    colon = ':' if len(differing) <= SHOWN_MISFITS else ', e.g.'
    return f'{len(differing)} of its {count} layers differ{colon} {"; ".join(list(differing.values())[:SHOWN_MISFITS])}'


class _Differs(Exception):
    """How a layer differs from that of a base, as part of a sentence."""


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
        bare = name[len(self.prefix) :] if _flat(name).startswith(self.prefix) else name
        if bare in known:
            return bare
        found = [other for other in self.flat.get(_flat(bare), ()) if other in known]
        if not found:
            raise _Differs(f'{shown(name)} is not there')
        if len(found) > 1:
            raise _Differs(f'{shown(name)} may be {shown(found[0])} or {shown(found[1])}')
        return found[0]


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
        raise _Differs(f'{shown(name)} is {text_of(weight.shape)} of {weight.dtype} here, which carries no LoRA')
    scale = update.our_alpha / update.rank
    factors = _our_factors(name, update, weight) if parts.keys() <= {'down', 'up', 'bias'} else None
    if factors is None:
        delta = _product(name, update, weight) * scale
        _add_delta(tensors, key, _with_magnitude(name, update, weight, delta), weight)
    else:
        values = (*factors, torch.tensor(update.our_alpha, dtype=torch.float32))
        tensors.update((join(name, tensor), value) for tensor, value in zip(LORA_TENSORS, values))
    if 'bias' in parts:
        bias = base.get(join(name, 'bias'))
        if bias is None or bias.shape != parts['bias'].shape:
            raise _Differs(f'{shown(name)} has {"no" if bias is None else "another"} bias here')
        _add_delta(tensors, join(name, 'bias'), parts['bias'].double() * scale, bias)
    return factors is not None


def _convert_value(key: str, value: Tensor, base: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Add the delta that brings a parameter to its value; counters of batches stay as they are."""
    if base[key].shape != value.shape:
        raise _Differs(f'{shown(key)} is {text_of(base[key].shape)} here, got {text_of(value.shape)}')
    if not base[key].is_floating_point():
        return
    if value.dtype not in DTYPES:
        raise _Differs(f'{shown(key)} is of {base[key].dtype} here, got {value.dtype}')
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


def _our_factors(name: str, update: Update, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """``lora_A`` and ``lora_B`` of our layout whose product is that of ``up`` and ``down``, to the bit.

    For a kernel (kh, kw) our matrix has a row for each output channel and row of the kernel. So a row of ``down``
    becomes kh rows, and an entry of ``up`` that entry times the identity of kh rows.

    Returns:
        The two; ``None`` where they cannot hold it, or would be far larger than the weight.
    """
    up, down = _oriented(update, weight)
    rank = down.shape[0]
    if up.shape[1] != rank:  # of groups
        return None
    _check_shape(name, (up.shape[0], *down.shape[1:]), weight)
    height = weight.shape[2] if weight.ndim == 4 else 1
    rows, columns = matrix_shape(weight.shape)
    if rank * height * (rows + columns) > LARGEST_GROWTH * weight.numel() and height > 1:
        return None
    dtype = torch.promote_types(up.dtype, down.dtype)
    identity = torch.eye(height, dtype=dtype)
    lora_B = torch.kron(up.reshape(-1, rank).to(dtype), identity) if height > 1 else up.reshape(-1, rank).to(dtype)
    return down.to(dtype).reshape(rank * height, columns).contiguous(), lora_B.contiguous()


def _oriented(update: Update, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``up`` and ``down`` in the order of the weight."""
    up, down = update.parts['up'], update.parts['down']
    return (down.T, up.T) if _is_transposed(update, weight) else (up, down)


def _is_transposed(update: Update, weight: Tensor) -> bool:
    return update.is_transposed and weight.ndim == update.parts['down'].ndim == 2


def _check_shape(name: str, shape: Iterable[int], weight: Tensor) -> None:
    """Refuse an update of another shape than the weight's; 1x1 kernels do not count."""
    shape = tuple(shape)
    if _without_ones(shape) != _without_ones(tuple(weight.shape)):
        raise _Differs(f'{shown(name)} is {text_of(weight.shape)} here, the adapter is for {text_of(shape)}')


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _product(name: str, update: Update, weight: Tensor) -> Tensor:
    """The update of a weight before its scale, in float64."""
    parts = {part: value.double() for part, value in update.parts.items()}
    if 'hada_w1_a' in parts:
        return _hadamard(name, parts, weight)
    if any(part.startswith('lokr_') for part in parts):
        return _kronecker(name, parts, weight)
    if 'mid' in parts:
        up, mid, down = (parts[part] for part in ('up', 'mid', 'down'))
        _check_shape(name, (up.shape[0], down.shape[1], *mid.shape[2:]), weight)
        return _tucker(mid, up.flatten(1).T, down.flatten(1)).reshape(weight.shape)
    up, down = (value.double() for value in _oriented(update, weight))
    groups = down.shape[0] // up.shape[1]
    if groups > 1:
        return _grouped_product(name, up, down, groups, weight)
    _check_shape(name, (up.shape[0], *down.shape[1:]), weight)
    return (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def _grouped_product(name: str, up: Tensor, down: Tensor, groups: int, weight: Tensor) -> Tensor:
    """That of PEFT for a convolution in groups, whose ``down`` reads the channels of all groups."""
    shape = (up.shape[0], down.shape[1] // groups, *down.shape[2:])
    if down.shape[1] % groups or up.shape[0] % groups:
        raise _Differs(f'{shown(name)} has no {groups} groups')
    _check_shape(name, shape, weight)
    down = down.reshape(groups, down.shape[0] // groups, groups, -1)
    own = torch.eye(groups, dtype=torch.bool)[:, None, :, None]
    if down.masked_select(~own).any():
        raise _Differs(
            f'{shown(name)} is in {groups} groups, across which its update in PEFT reaches, as no weight in groups can'
        )
    down = down.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # groups, r / groups, columns of a group
    return (up.reshape(groups, up.shape[0] // groups, -1) @ down).reshape(weight.shape)


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(r, s, …), (r, m) and (s, n) -> (m, n, …), the smaller of the two products first."""
    if core.shape[0] * down.shape[1] <= core.shape[1] * up.shape[1]:
        return torch.einsum('rn...,rm->mn...', torch.einsum('rs...,sn->rn...', core, down), up)
    return torch.einsum('ms...,sn->mn...', torch.einsum('rs...,rm->ms...', core, up), down)


def _hadamard(name: str, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """LoHa: the product, entry by entry, of two updates of low rank."""
    halves = []
    for number in '12':
        a, b, core = (parts.get(f'hada_{part}') for part in (f'w{number}_a', f'w{number}_b', f't{number}'))
        assert a is not None and b is not None
        if core is None:
            if a.ndim != 2 or b.ndim < 2 or a.shape[1] != b.shape[0]:
                raise _Differs(f'{shown(name)} has LoHa of {text_of(a.shape)} and {text_of(b.shape)}')
            size = a.shape[0] * b[0].numel()
        else:
            if a.ndim != 2 or b.ndim != 2 or core.ndim < 2 or core.shape[:2] != (a.shape[0], b.shape[0]):
                raise _Differs(
                    f'{shown(name)} has LoHa of {text_of(a.shape)}, {text_of(b.shape)} and {text_of(core.shape)}'
                )
            size = a.shape[1] * b.shape[1] * core[0, 0].numel()
        if size != weight.numel() or (a.shape[0] if core is None else a.shape[1]) != weight.shape[0]:
            raise _Differs(f'{shown(name)} is {text_of(weight.shape)} here, which its LoHa is not for')
        half = a @ b.flatten(1) if core is None else _tucker(core, a, b)
        halves.append(half.reshape(weight.shape))
    return halves[0] * halves[1]


def _kronecker(name: str, parts: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """LoKr: the Kronecker product of two matrices, each a whole one or of low rank."""
    shapes: list[tuple[int, ...]] = []
    for number in '12':
        whole, a, b = (parts.get(f'lokr_w{number}{end}') for end in ('', '_a', '_b'))
        core = parts.get(f'lokr_t{number}')
        if whole is not None:
            shapes.append(tuple(whole.shape))
        elif a is None or b is None or a.ndim != 2 or b.ndim < 2:
            raise _Differs(f'{shown(name)} lacks a part of its LoKr')
        elif core is None:
            shapes.append((a.shape[0], *b.shape[1:]))
        else:
            shapes.append((a.shape[1], b.shape[1], *core.shape[2:]))
    (m1, n1, *_), (m2, *rest) = shapes
    if len(shapes[0]) != 2 or m1 * m2 != weight.shape[0] or n1 * math.prod(rest) != weight[0].numel():
        raise _Differs(f'{shown(name)} is {text_of(weight.shape)} here, which its LoKr is not for')
    first, second = (_matrix_of(name, parts, number) for number in '12')
    second = second.reshape(m2, weight.shape[1] // n1, *weight.shape[2:])
    return torch.kron(first.reshape(m1, n1, *[1] * (weight.ndim - 2)), second)


def _matrix_of(name: str, parts: Mapping[str, Tensor], number: str) -> Tensor:
    whole = parts.get(f'lokr_w{number}')
    if whole is not None:
        return whole
    a, b, core = (parts.get(f'lokr_{part}') for part in (f'w{number}_a', f'w{number}_b', f't{number}'))
    assert a is not None and b is not None
    if (core is None and a.shape[1] != b.shape[0]) or (
        core is not None and (b.ndim != 2 or core.ndim < 2 or core.shape[:2] != (a.shape[0], b.shape[0]))
    ):
        raise _Differs(f'{shown(name)} has LoKr of {text_of(a.shape)} and {text_of(b.shape)}')
    return a @ b.flatten(1) if core is None else _tucker(core, a, b)


def _with_magnitude(name: str, update: Update, weight: Tensor, delta: Tensor) -> Tensor:
    """DoRA: the delta of a weight whose updated rows have given norms m, m * (W + dW) / ||W + dW|| - W.

    Without magnitudes it is the delta itself.
    """
    if not MAGNITUDES & update.parts.keys():
        return delta
    base = weight.double()
    if 'dora_scale' in update.parts:  # of LyCORIS, whose earlier versions normalized columns
        magnitude = update.parts['dora_scale'].double()
        axis = 1 if magnitude.ndim > 1 and magnitude.shape[0] == 1 != weight.shape[0] else 0
    else:
        magnitude, axis = update.parts['lora_magnitude_vector'].double(), int(_is_transposed(update, weight))
    if magnitude.numel() != weight.shape[axis]:
        raise _Differs(f'{shown(name)} is {text_of(weight.shape)} here, its magnitudes are {text_of(magnitude.shape)}')
    updated = base + delta
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm = updated.square().sum(others, keepdim=True).sqrt()
    return magnitude.reshape(norm.shape) / norm * updated - base


def text_of(shape: Iterable[int]) -> str:
    """A shape as people write it: ``30x3x3x3``."""
    return shown('x'.join(map(str, shape)) or 'a number', 40)
