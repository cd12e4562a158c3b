"""Ranks for layers, from their gradients, within a budget of parameters."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora_sr.adapters.layers import matrix_shape, rows_of_unit, weight_name
from lora_sr.errors import InputError


@dataclass(frozen=True)
class LayerImportance:
    """What rank is worth in one layer, and what it costs.

    Args:
        gains: What each unit of rank adds, the first one first; they do not rise.
        cost: Parameters of one unit of rank.
    """

    gains: tuple[float, ...]
    cost: int


def base_weight(layer: nn.Module) -> nn.Parameter:
    """The weight that LoRA updates in a layer (in attention ``in_proj_weight``), without its update if it has one."""
    return cast(nn.Parameter, layer._parameters[weight_name(layer)])


def update_shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of the matrix B @ A that is viewed as the weight of ``layer``."""
    return matrix_shape(base_weight(layer).shape, getattr(layer, 'groups', 1))


def rank_cost(layer: nn.Module) -> int:
    """Parameters of one unit of rank in ``layer``, which are kh rows of A and kh columns of B if the kernel is 2-D."""
    return _rows_of_unit(layer) * sum(update_shape(layer))


def full_rank(layer: nn.Module) -> int:
    """The least rank with which every update of the weight can be reached."""
    return -(-min(update_shape(layer)) // _rows_of_unit(layer))


def largest_useful_rank(layer: nn.Module) -> int:
    """The largest rank at which the update has no more parameters than the weight itself, but at least 1."""
    return max(1, base_weight(layer).numel() // rank_cost(layer))


def layer_importance(layer: nn.Module, gradient: Tensor) -> LayerImportance:
    """What each unit of rank in a layer is worth, by the gradient of the loss with respect to its weight.

    To first order the loss falls with an update along the gradient G. Seen as the matrix B @ A, an update of rank r
    reaches the r largest singular directions of G (r * kh of a 2-D kernel, see :class:`LoRAConv2d`), and a step along
    them lowers the loss by the sum of their squared singular values, times the step.

    Args:
        layer: A layer that can carry LoRA, with it or without.
        gradient: G, in the shape of the weight.

    Returns:
        Gains up to :func:`largest_useful_rank`, and the cost.

    Raises:
        InputError: The gradient is not finite.
    """
    if not torch.isfinite(gradient).all():
        raise InputError('A gradient is not finite: the importance of a layer cannot be told from it.')
    values = torch.linalg.svdvals(gradient.detach().double().reshape(update_shape(layer)))
    units = values.square().split(_rows_of_unit(layer))
    gains = tuple(unit.sum().item() for unit in units[: largest_useful_rank(layer)])
    return LayerImportance(gains, rank_cost(layer))


def allocate_ranks(importance: dict[str, LayerImportance], budget: int, max_rank: int) -> dict[str, int]:
    """Share out a budget of parameters: time and again, one more unit of rank where it gains most per parameter.

    As gains do not rise within a layer, this is the best choice for what it spends; what is left of the budget at the
    end is less than one unit in any layer that could gain by it.

    Args:
        importance: Name of a layer -> what rank is worth there, see :func:`layer_importance`.
        budget: Largest sum of rank * cost over the layers.
        max_rank: Largest rank of a layer.

    Returns:
        Name -> rank, 0 to ``max_rank``, in the order of ``importance``. A layer without gain has rank 0.

    Raises:
        InputError: A limit below 1, a budget that is less than a single unit of rank, or no layer gains anything.
    """
    if max_rank < 1:
        raise InputError(f'The largest rank is {max_rank}: it must be an integer of at least 1.')
    gaining = {name: layer for name, layer in importance.items() if layer.gains and layer.gains[0] > 0}
    if not gaining:
        raise InputError('No layer has a gradient other than 0: there is nothing to allocate ranks by.')
    least = min(layer.cost for layer in gaining.values())
    if budget < least:
        raise InputError(f'The budget is {budget:,} parameters: rank 1 in a single layer takes at least {least:,}.')
    ranks = dict.fromkeys(importance, 0)
    left = budget
    heap = [(-layer.gains[0] / layer.cost, order, name) for order, (name, layer) in enumerate(gaining.items())]
    heapq.heapify(heap)
    while heap:
        _, order, name = heapq.heappop(heap)
        layer = gaining[name]
        if layer.cost > left:
            continue  # nor will a later unit of this layer fit: all of its units cost the same
        left -= layer.cost
        ranks[name] += 1
        if ranks[name] < min(max_rank, len(layer.gains)) and layer.gains[ranks[name]] > 0:
            heapq.heappush(heap, (-layer.gains[ranks[name]] / layer.cost, order, name))
    return ranks


def _rows_of_unit(layer: nn.Module) -> int:
    return rows_of_unit(base_weight(layer).shape, getattr(layer, 'groups', 1))
