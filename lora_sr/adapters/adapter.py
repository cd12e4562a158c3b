"""An adapter by itself: taken out of a network, mixed with others, and fitted to a base."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_sr.adapters.checkpoint import (
    exact_config,
    infer_lora_config,
    is_delta_key,
    is_lora_key,
    key_of_base,
    merge_state_dict,
    only_lora,
)
from lora_sr.adapters.config import LARGEST_ALPHA, LoRAConfig
from lora_sr.adapters.foreign import ForeignAdapter
from lora_sr.adapters.layers import (
    DELTA_PREFIX,
    DTYPES,
    LORA_TENSORS,
    LoRAMultiheadAttention,
    join,
    low_rank_update,
    matrix_shape,
    shape_text,
    weight_key,
)
from lora_sr.adapters.misfit import Misfit, describe_differing
from lora_sr.errors import InputError, shown


@dataclass(frozen=True, eq=False)
class Adapter:
    """The updates of a network without the network.

    Args:
        config: What gives a base these layers, with their ranks: an exact name for each.
        tensors: Name in the adapted network's state dict -> tensor: ``lora_A``, ``lora_B`` and ``lora_alpha`` of every
            layer with LoRA (for shapes see :class:`lora_sr.adapters.LoRALayer`), and ``lora_shift_<parameter>``, of the
            parameter's shape. The adapter that changes nothing has none.

    Raises:
        InputError: A layer lacks some of its tensors, or their shapes do not go with each other and with its rank.
    """

    config: LoRAConfig
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name in self.layers:
            missing = [tensor for tensor in LORA_TENSORS if join(name, tensor) not in self.tensors]
            if missing:
                raise InputError(f'The adapter lacks {" and ".join(missing)} of the layer "{shown(name)}".')
            (lora_A, lora_B, alpha), rank = self.update_of(name), self.rank_of(name)
            if not (
                lora_A.ndim == lora_B.ndim == 2
                and alpha.ndim == 0
                and all(value.dtype in DTYPES for value in (lora_A, lora_B))
                and not alpha.is_complex()
                and lora_A.dtype == lora_B.dtype
                and lora_A.shape[0] == lora_B.shape[1]
                and rank > 0
                and lora_A.shape[0] % rank == lora_B.shape[0] % (lora_A.shape[0] // rank or 1) == 0
            ):
                kinds = '' if lora_A.dtype == lora_B.dtype in DTYPES else f' of {lora_A.dtype} and {lora_B.dtype}'
                raise InputError(
                    f'The adapter is damaged: "{shown(name)}" has lora_A {shape_text(lora_A.shape)} and lora_B '
                    f'{shape_text(lora_B.shape)}{kinds}, which do not go with rank {rank}.'
                )
        for name, delta in self.deltas.items():
            if delta.dtype not in DTYPES:
                raise InputError(f'The adapter is damaged: the delta of {shown(name)} is of {delta.dtype}.')

    @property
    def layers(self) -> list[str]:
        """The names of the layers with LoRA."""
        return list(dict.fromkeys(key.rpartition('.')[0] for key in self.tensors if not is_delta_key(key)))

    @property
    def deltas(self) -> dict[str, Tensor]:
        """Name of a parameter of the base -> what is added to it."""
        return {key_of_base(key): value for key, value in self.tensors.items() if is_delta_key(key)}

    def update_of(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """``lora_A``, ``lora_B`` and ``lora_alpha`` of a layer."""
        lora_A, lora_B, alpha = (self.tensors[join(layer, tensor)] for tensor in LORA_TENSORS)
        return lora_A, lora_B, alpha

    def factors_of(self, layer: str) -> list[Tensor]:
        """``lora_A`` and ``lora_B`` of a layer."""
        return list(self.update_of(layer)[:2])

    def rank_of(self, layer: str) -> int:
        """The rank of a layer's update."""
        return self.config.rank_of(layer)

    def alpha_of(self, layer: str) -> float:
        """The numerator of a layer's scale alpha / rank."""
        return self.update_of(layer)[2].item()


def extract_adapter(adapted: nn.Module | Mapping[str, Tensor]) -> Adapter:
    """Take the adapter out of an adapted network or state dict; it is a copy, on the CPU.

    Raises:
        InputError: There are no LoRA tensors, or a layer lacks some of its tensors.
    """
    state = adapted.state_dict() if isinstance(adapted, nn.Module) else adapted
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in only_lora(state).items()
    }
    if not tensors:
        raise InputError('There is no adapter to take out: no layer carries LoRA.')
    return Adapter(infer_lora_config(state), tensors)


def apply_adapter(base: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of the base network -> that of the adapted one: its tensors and, beside them, the adapter's.

    It needs no network, so it serves any that has layers of those names.

    Raises:
        InputError: ``base`` carries LoRA already, or the adapter does not fit it: the layers that differ are named.
    """
    if any(map(is_lora_key, base)):
        raise InputError('The base carries LoRA already: merge it, or take its adapter out.')
    misfit = describe_misfit(adapter, base)
    if misfit:
        raise InputError(f'The adapter does not fit the base: {misfit}.')
    adapted = dict(base)
    for key, value in adapter.tensors.items():
        parameter = key_of_base(key) if is_delta_key(key) else weight_key(key.rpartition('.')[0], base)
        adapted[key] = value.to(base[parameter].dtype)
    return adapted


def merge_adapter(base: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of the base network with the updates added: a plain one, of the same keys.

    Where the adapter changes nothing, the tensors are the base's own.

    Raises:
        InputError: As :func:`apply_adapter` does, and as :func:`lora_sr.adapters.merge_state_dict` does.
    """
    adapted = apply_adapter(base, adapter)
    return merge_state_dict(adapted) if adapter.tensors else adapted


@torch.no_grad()
def mix_adapters(parts: Iterable[tuple[Adapter, float]]) -> Adapter:
    """One adapter that does what several do together, each to its part: delta W = sum over i of w_i * delta W_i.

    This is exact, since B_1 A_1 + B_2 A_2 is the product of the matrices put side by side: the rank of a layer is the
    sum of its ranks, its alpha equals it, and the weights are in ``lora_B``. A layer that only one adapter has keeps
    its tensors, and its alpha is multiplied by the weight. Deltas add up likewise; where one adapter has LoRA on a
    layer and another the delta of its weight, the sum is a delta.

    Args:
        parts: Adapters of one base, each with its weight: any finite number, also negative or beyond 1. With 0 an
            adapter is left out; if all are, what results changes nothing, not by a bit.

    Raises:
        InputError: A weight is not finite, or two adapters are for different shapes of the same layer.
    """
    parts = [(adapter, float(weight)) for adapter, weight in parts]
    for _, weight in parts:
        if not math.isfinite(weight):
            raise InputError(f'The weight of an adapter must be a finite number, got {weight}.')
    parts = [(adapter, weight) for adapter, weight in parts if weight]
    tensors: dict[str, Tensor] = {}
    ranks_and_alphas = {}
    for name in dict.fromkeys(name for adapter, _ in parts for name in adapter.layers):
        update, rank = _mix_layer(name, [part for part in parts if name in part[0].layers])
        tensors.update((join(name, tensor), value) for tensor, value in zip(LORA_TENSORS, update))
        ranks_and_alphas[name] = rank, update[-1].item()
    for key in dict.fromkeys(key for adapter, _ in parts for key in adapter.tensors if key not in tensors):
        deltas = [adapter.tensors[key] * weight for adapter, weight in parts if key in adapter.tensors]
        _check_same_shape(key, [delta.shape for delta in deltas])
        tensors[key] = sum(deltas[1:], deltas[0])
    return _adapter_of(tensors, ranks_and_alphas)


def _adapter_of(tensors: dict[str, Tensor], layers: Mapping[str, tuple[int, float]]) -> Adapter:
    """The adapter of tensors and of the rank and alpha of each layer, of which none has both LoRA and a delta."""
    tensors, layers = dict(tensors), dict(layers)
    for name in list(layers):
        for key in (join(name, DELTA_PREFIX + last) for last in ('weight', LoRAMultiheadAttention.weight_name)):
            if key not in tensors:
                continue
            lora_A, lora_B, alpha = (tensors.pop(join(name, tensor)) for tensor in LORA_TENSORS)
            rank, _ = layers.pop(name)
            if lora_B.shape[0] * lora_A.shape[1] != tensors[key].numel():
                raise InputError(f'The adapters are not of one base: they are for different shapes of "{shown(name)}".')
            tensors[key] = tensors[key] + low_rank_update(lora_A, lora_B, alpha / rank, tensors[key].shape)
    if not tensors:
        return Adapter(LoRAConfig(['.*'], rank_pattern={'.*': 0}), {})
    return Adapter(exact_config(layers, tensors), tensors)


def adapter_for(adapter: Adapter | ForeignAdapter, base: Mapping[str, Tensor]) -> Adapter:
    """What an adapter of a file is for a base, given by its state dict: of its shapes, with values that can be used.

    Raises:
        Misfit: It does not fit: how many layers differ, and the first of them.
        InputError: It cannot be put onto any base; the message is the part of a sentence that says why.
    """
    if isinstance(adapter, ForeignAdapter):
        adapter = _adapter_of(*adapter.tensors_for(base))
    misfit = describe_misfit(adapter, base)
    if misfit:
        raise Misfit(misfit)
    check_values(adapter)
    return adapter


def renamed(adapter: Adapter, layout: Mapping[str, str]) -> Adapter:
    """An adapter for the layers of a network, of one for their names in a file.

    Args:
        adapter: The latter.
        layout: Name of a parameter in the network -> name in the file, of those that differ.
    """
    layers = {old.rpartition('.')[0]: new.rpartition('.')[0] for new, old in layout.items()}

    def rename(key: str) -> str:
        name, _, last = key.rpartition('.')
        return join(layers.get(name, name), last)

    tensors = {rename(key): value for key, value in adapter.tensors.items()}
    return _adapter_of(
        tensors, {layers.get(name, name): (adapter.rank_of(name), adapter.alpha_of(name)) for name in adapter.layers}
    )


def check_values(adapter: Adapter) -> None:
    """Check that the values of an adapter are finite, and that its alphas can be used.

    Raises:
        InputError: One is not; the message is the part of a sentence that says which.
    """
    for key, value in adapter.tensors.items():
        if key.rpartition('.')[2] == 'lora_alpha':
            if not 0 < abs(value.item()) <= LARGEST_ALPHA:
                raise InputError(
                    f'{shown(key)} must be a number of at most {LARGEST_ALPHA:g} other than 0, got {value.item():g}'
                )
        elif not value.isfinite().all():
            raise InputError(f'it has values that are not finite, in {shown(key)}')


def _mix_layer(name: str, parts: list[tuple[Adapter, float]]) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """``lora_A``, ``lora_B`` and ``lora_alpha`` of a mixed layer, and its rank."""
    updates = [adapter.update_of(name) for adapter, _ in parts]
    ranks = [adapter.rank_of(name) for adapter, _ in parts]
    _check_same_shape(name, [(a.shape[0] // rank, a.shape[1], b.shape[0]) for (a, b, _), rank in zip(updates, ranks)])
    if len(parts) == 1:
        (lora_A, lora_B, alpha), ((_, weight),) = updates[0], parts
        return (lora_A.clone(), lora_B.clone(), alpha * weight), ranks[0]
    factors = [weight * alpha.item() / rank for (_, _, alpha), (_, weight), rank in zip(updates, parts, ranks)]
    lora_A = torch.cat([lora_A for lora_A, _, _ in updates])
    lora_B = torch.cat([lora_B * factor for (_, lora_B, _), factor in zip(updates, factors)], dim=1)
    return (lora_A, lora_B, torch.tensor(float(sum(ranks)), dtype=lora_B.dtype)), sum(ranks)


def _check_same_shape(name: str, shapes: Sequence[Hashable]) -> None:
    if len(set(shapes)) > 1:
        raise InputError(f'The adapters are not of one base: they are for different shapes of "{name}".')


def describe_misfit(adapter: Adapter, base: Mapping[str, Tensor]) -> str | None:
    """Where an adapter does not fit a base network: how many of its layers differ, and the first of them.

    Args:
        adapter: The adapter.
        base: The state dict of the base; LoRA tensors in it do not count.

    Returns:
        E.g. ``2 of its 20 layers differ: conv is 30x3x3x3 here, the adapter is for 60x3x3x3; tail is not there``;
        ``None`` if it fits.
    """
    wanted = {weight_key(name, base): name for name in adapter.layers}
    differing: dict[str, str] = {}  # layer -> how
    for key in [*wanted, *adapter.deltas]:
        here, layer = base.get(key), wanted.get(key)
        what = key if layer is None else layer
        shape = adapter.deltas[key].shape if layer is None else _shape_of_weight(adapter, layer, here)
        if here is None:
            differing.setdefault(key.rpartition('.')[0], f'{shown(what)} is not there')
        elif here.shape != shape:
            how = f'{shown(what)} is {shape_text(here.shape)} here, the adapter is for {shape_text(shape)}'
            differing.setdefault(key.rpartition('.')[0], how)
    if not differing:
        return None
    return describe_differing(differing, len({key.rpartition('.')[0] for key in [*wanted, *adapter.deltas]}))


def _shape_of_weight(adapter: Adapter, name: str, weight: Tensor | None) -> tuple[int, ...]:
    """The shape of the weight that a layer of an adapter is for.

    For a weight (m, n, kh, kw) the tensors tell m / groups, kh and n * groups * kw. The rest is taken from ``weight``,
    the layer of that name in the base, where it can be; else for a square kernel and one group. Of all other weights
    they tell m and the product of the rest.
    """
    lora_A, lora_B, _ = adapter.update_of(name)
    height = lora_A.shape[0] // adapter.rank_of(name)
    out_of_group, columns = lora_B.shape[0] // height, lora_A.shape[1]
    if weight is None or weight.ndim != 4:
        if height > 1:
            return out_of_group, columns // height, height, height
        is_flattened = weight is not None and weight.ndim > 2 and matrix_shape(weight.shape) == (out_of_group, columns)
        return tuple(weight.shape) if weight is not None and is_flattened else (out_of_group, columns)
    out_here, in_of_group_here, height_here, width_here = weight.shape
    if height == 1 < height_here and in_of_group_here == 1:  # kernels of channels by themselves
        side = math.isqrt(columns)
        if columns == height_here * width_here:
            return out_of_group, 1, height_here, width_here
        if columns == side**2:
            return out_of_group, 1, side, side
    width = width_here if height == height_here and columns % width_here == 0 else height
    in_channels = columns // width
    groups = in_channels // in_of_group_here if in_of_group_here else 0
    is_depthwise = in_of_group_here == out_of_group == 1
    if is_depthwise or (groups * in_of_group_here, groups * out_of_group) == (in_channels, out_here):
        return groups * out_of_group, in_of_group_here, height, width
    return out_of_group, in_channels, height, width
