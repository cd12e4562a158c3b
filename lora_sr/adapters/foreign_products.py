"""Updates of other programs, and what they add to a weight: two factors of our layout, or a product in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_sr.adapters.layers import matrix_shape, shape_text
from lora_sr.adapters.misfit import Differs
from lora_sr.errors import shown

LARGEST_GROWTH = 4  # times the values of a weight that its two factors may have

MAGNITUDES = {'lora_magnitude_vector', 'dora_scale'}  # of DoRA: PEFT's, and that of LyCORIS


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


def our_factors(name: str, update: Update, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """``lora_A`` and ``lora_B`` of our layout whose product is that of ``up`` and ``down``, to the bit.

    For a kernel (kh, kw) our matrix has a row for each output channel and row of the kernel. So a row of ``down``
    becomes kh rows, and an entry of ``up`` that entry times the identity of kh rows.

    Returns:
        The two; ``None`` where they cannot hold it, or would be far larger than the weight.
    """
    up, down = _oriented(update, weight)
    rank = down.shape[0]
    if up.shape[1] != rank or (weight.ndim == 4 and weight.shape[1] == 1):  # of groups, as far as a weight tells
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
        raise Differs(f'{shown(name)} is {shape_text(weight.shape)} here, the adapter is for {shape_text(shape)}')


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def product(name: str, update: Update, weight: Tensor) -> Tensor:
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
        raise Differs(f'{shown(name)} has no {groups} groups')
    _check_shape(name, shape, weight)
    down = down.reshape(groups, down.shape[0] // groups, groups, -1)
    own = torch.eye(groups, dtype=torch.bool)[:, None, :, None]
    if down.masked_select(~own).any():
        raise Differs(
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
                raise Differs(f'{shown(name)} has LoHa of {shape_text(a.shape)} and {shape_text(b.shape)}')
            size = a.shape[0] * b[0].numel()
        else:
            if a.ndim != 2 or b.ndim != 2 or core.ndim < 2 or core.shape[:2] != (a.shape[0], b.shape[0]):
                shapes = f'{shape_text(a.shape)}, {shape_text(b.shape)} and {shape_text(core.shape)}'
                raise Differs(f'{shown(name)} has LoHa of {shapes}')
            size = a.shape[1] * b.shape[1] * core[0, 0].numel()
        if size != weight.numel() or (a.shape[0] if core is None else a.shape[1]) != weight.shape[0]:
            raise Differs(f'{shown(name)} is {shape_text(weight.shape)} here, which its LoHa is not for')
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
            raise Differs(f'{shown(name)} lacks a part of its LoKr')
        elif core is None:
            shapes.append((a.shape[0], *b.shape[1:]))
        else:
            shapes.append((a.shape[1], b.shape[1], *core.shape[2:]))
    (m1, n1, *_), (m2, *rest) = shapes
    if len(shapes[0]) != 2 or m1 * m2 != weight.shape[0] or n1 * math.prod(rest) != weight[0].numel():
        raise Differs(f'{shown(name)} is {shape_text(weight.shape)} here, which its LoKr is not for')
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
        raise Differs(f'{shown(name)} has LoKr of {shape_text(a.shape)} and {shape_text(b.shape)}')
    return a @ b.flatten(1) if core is None else _tucker(core, a, b)


def with_magnitude(name: str, update: Update, weight: Tensor, delta: Tensor) -> Tensor:
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
        raise Differs(
            f'{shown(name)} is {shape_text(weight.shape)} here, its magnitudes are {shape_text(magnitude.shape)}'
        )
    updated = base + delta
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm = updated.square().sum(others, keepdim=True).sqrt()
    return magnitude.reshape(norm.shape) / norm * updated - base
