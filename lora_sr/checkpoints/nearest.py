"""Which known network a state dict is nearest to, and in which tensors it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lora_sr.adapters import without_lora
from lora_sr.adapters.layers import shape_text
from lora_sr.checkpoints.bounds import bounded
from lora_sr.checkpoints.families import FAMILIES, OURS
from lora_sr.checkpoints.stock import STOCK_NETWORKS
from lora_sr.errors import shown

LEAST_SHARE = 0.5  # of the tensors that agree, for a network to be near
FACTOR = 2
SHOWN = 3  # tensors that differ


@dataclass(frozen=True)
class Nearest:
    """A network to which a state dict is near.

    Args:
        name: Its family.
        agreeing: How many tensors of the state dict it has.
        tensors: How many tensors the state dict has.
        differing: What differs, a phrase for each tensor.
    """

    name: str
    agreeing: int
    tensors: int
    differing: tuple[str, ...]

    def __str__(self) -> str:
        more = len(self.differing) - SHOWN
        differing = ', '.join(self.differing[:SHOWN]) + (f' and {more:,} more' if more > 0 else '')
        return f'{self.name}, with which {self.agreeing:,} of {self.tensors:,} tensors agree, and not {differing}'


def nearest_family(state: Mapping[str, Tensor]) -> Nearest | None:
    """The known network with which most tensors of a state dict agree; ``None`` where none is near.

    LoRA in the state dict is left out of account. Networks of this package are compared by names and shapes, those of
    BasicSR, which are recognized by their names, by these.
    """
    base = without_lora(state)
    found = [
        *(_of_names(stock.name, stock.has_name, stock.needed, base) for stock in STOCK_NETWORKS),
        *(_of_shapes(family, base) for family in OURS),
    ]
    near = [one for one in found if one is not None and one.differing and one.agreeing >= LEAST_SHARE * one.tensors]
    return max(near, key=lambda one: one.agreeing, default=None)


def _of_names(
    name: str, has_name: Callable[[str], bool], needed: tuple[str, ...], base: Mapping[str, Tensor]
) -> Nearest:
    unknown = [shown(key) for key in base if not has_name(key)]
    missing = [f'{key}, which is missing' for key in needed if key not in base]
    return Nearest(name, len(base) - len(unknown), len(base), (*unknown, *missing))


def _of_shapes(family: str, base: Mapping[str, Tensor]) -> Nearest | None:
    try:
        with bounded(base, FACTOR):
            own = without_lora(FAMILIES[family].build(base).state_dict())
    except Exception:  # whatever a constructor makes of names and shapes that are not its own
        return None
    differing, agreeing = [], 0
    for name, value in base.items():
        if name not in own:
            differing.append(shown(name))
        elif own[name].shape != value.shape:
            differing.append(f'{shown(name)} of {shape_text(value.shape)} rather than {shape_text(own[name].shape)}')
        else:
            agreeing += 1
    missing = [f'{name}, which is missing' for name in own if name not in base]
    return Nearest(family, agreeing, len(base), (*differing, *missing))
