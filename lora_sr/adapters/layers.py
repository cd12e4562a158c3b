"""Layers that carry a low-rank update of their weight."""

from __future__ import annotations

import functools
import math
import re

import torch
from torch import Tensor, nn

from lora_sr.errors import InputError

LORA_TENSORS = ('lora_A', 'lora_B', 'lora_alpha')
SHIFT_PREFIX = 'lora_shift_'
POSITION = re.compile('rel(ative)?_pos|absolute_pos')  # parameters that are tables of positions


def low_rank_update(lora_A: Tensor, lora_B: Tensor, factor: Tensor | float, shape: torch.Size) -> Tensor:
    """factor * B @ A, in the shape of a layer's weight."""
    return (lora_B @ lora_A).view(shape) * factor


class AdaptedModule:
    """What everything that trains beside a frozen base shares: parameters that are read as base plus update.

    Whoever reads such a parameter, ``module.weight``, gets the updated value: the module's own forward, and also code
    that computes with the weight of another module, as networks with re-parameterised branches do. The base value is
    the parameter that stands under that name in the state dict, and :meth:`base_parameter` gives it.

    ``lora_scale`` is the run-time strength s of the updates (a Python number that is not saved): 0 is the base, 1 the
    adapted module.
    """

    lora_scale: float = 1.0
    base_class: type

    def base_parameter(self, name: str) -> Tensor | None:
        """The frozen parameter of that name, without its update."""
        if name in self._parameters:
            return self._parameters[name]
        return self.__dict__.get(f'_base_{name}')  # of a replica that DataParallel made

    def drop_update(self) -> None:
        """Become the plain module again, in place, with the base parameters as they stand."""
        for tensors in (self._parameters, self._buffers):
            for name in [name for name in tensors if name.startswith('lora_')]:
                del tensors[name]
        for name in ('rank', 'lora_scale'):
            self.__dict__.pop(name, None)
        while isinstance(self, AdaptedModule):  # a layer may carry a shift over its LoRA
            self.__class__ = self.base_class

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A checkpoint of the base network loads strictly: only a layer that has half of its LoRA tensors is incomplete.
        absent = [prefix + name for name in LORA_TENSORS if prefix + name not in state_dict]
        forgiven = absent if len(absent) == len(LORA_TENSORS) else [prefix + 'lora_alpha']
        missing_keys[:] = [
            key for key in missing_keys if key not in forgiven and not key.startswith(prefix + SHIFT_PREFIX)
        ]


def _updated(name: str, update: str) -> property:
    """A property that reads the parameter ``name`` with what the method ``update`` makes of it."""

    def get(self):
        base = AdaptedModule.base_parameter(self, name)
        if base is None:
            raise AttributeError(f'{type(self).__name__} has no parameter "{name}"')
        try:
            return getattr(self, update)(name, base)
        except AttributeError as error:  # Module.__getattr__ would take it for a missing attribute, and give the base
            raise RuntimeError(f'{type(self).__name__}.{name} cannot be computed: {error}') from error

    def put(self, value):  # parameters are registered and do not come here; the tensors of a replica do
        self.__dict__[f'_base_{name}'] = value

    return property(get, put)


class LoRALayer(AdaptedModule):
    """What the adapted layers share: a frozen weight W plus a trained update, W' = W + s * (alpha / r) * delta(B, A).

    The update lives in weight space: the layer's forward is that of the layer it replaces, with W' for W. So it needs
    no activation memory of its own on full-resolution feature maps, and merging is exact. In the state dict ``weight``
    and ``bias`` keep their names; beside them stand

    - ``lora_A``, Kaiming-uniform (a = sqrt(5)) at first, and ``lora_B``, zero at first, so that the adapted layer
      starts exactly as the layer it replaces;
    - ``lora_alpha``, a scalar tensor, because a checkpoint must be mergeable on its own and shapes tell only the rank.

    The attribute ``weight`` is W', W itself is ``base_parameter('weight')``.
    """

    weight = _updated('weight', '_updated_weight')

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: Tensor
    rank: int = 0  # until the layer has its update

    def _init_lora(self, a_shape: tuple[int, int], b_shape: tuple[int, int], rank: int, alpha: float):
        if rank < 1:
            raise InputError(f'LoRA rank is {rank}: it must be an integer of at least 1.')
        weight = self.base_parameter('weight')
        like = {'device': weight.device, 'dtype': weight.dtype}
        self.rank = rank
        self.lora_A = nn.Parameter(torch.empty(a_shape, **like))
        self.lora_B = nn.Parameter(torch.zeros(b_shape, **like))
        self.register_buffer('lora_alpha', torch.tensor(float(alpha), **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta_weight(self) -> Tensor:
        """The update of the weight at the present ``lora_scale``, in the shape of ``weight``."""
        factor = self.lora_alpha * (self.lora_scale / self.rank)
        return low_rank_update(self.lora_A, self.lora_B, factor, self.base_parameter('weight').shape)

    def _updated_weight(self, name: str, base: Tensor) -> Tensor:
        # At scale 0 the base itself, to the bit: 0 * update is NaN where an update is infinite.
        return base + self.delta_weight() if self.rank and self.lora_scale else base

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, rank={self.rank}, alpha={self.lora_alpha.item():g}'


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """ConvLoRA: a 2-D convolution whose weight carries a low-rank update.

    With kernel (kh, kw): ``lora_A`` is (r * kh, in * kw), ``lora_B`` is (out / groups * kh, r * kh), and
    delta W = (alpha / r) * (lora_B @ lora_A) viewed as ``weight``. Stride, padding, dilation and groups are free.

    Source: DSCLoRA (arXiv:2504.11271); the shapes are those of the loralib package.

    Args:
        conv: The convolution to adapt. Its ``weight`` and ``bias`` are shared, not copied.
        rank: Rank r, at least 1.
        alpha: Numerator of the update's scale.

    Raises:
        InputError: A rank below 1.
    """

    base_class = nn.Conv2d

    def __init__(self, conv: nn.Conv2d, rank: int, alpha: float):
        # On the meta device the constructor draws no random weights, so the generator's state is spent on LoRA alone.
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device='meta',
        )
        self.weight, self.bias = conv.weight, conv.bias
        kh, kw = conv.kernel_size
        self._init_lora(
            (rank * kh, conv.in_channels * kw), (conv.out_channels // conv.groups * kh, rank * kh), rank, alpha
        )


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer whose weight carries a low-rank update: ``lora_A`` (r, in), ``lora_B`` (out, r).

    Source: LoRA (arXiv:2106.09685), section 4.1.

    Args:
        linear: The layer to adapt. Its ``weight`` and ``bias`` are shared, not copied.
        rank: Rank r, at least 1.
        alpha: Numerator of the update's scale.

    Raises:
        InputError: A rank below 1.
    """

    base_class = nn.Linear

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        self.weight, self.bias = linear.weight, linear.bias
        self._init_lora((rank, linear.in_features), (linear.out_features, rank), rank, alpha)


# The exact types, not their subclasses: a subclass may use its weight in a way that an update would bypass.
LORA_LAYERS = {nn.Conv2d: LoRAConv2d, nn.Linear: LoRALinear}


class ShiftedModule(AdaptedModule):
    """A module some of whose parameters p carry a trained shift, p' = p + s * ``lora_shift_p``, zero at first.

    For what is too small for a low rank: biases, the scale and offset of a normalisation, tables of relative positions.
    """

    shifted_parameters: tuple[str, ...]

    def __reduce_ex__(self, protocol):  # its class stands in no module, where pickle would look for it
        return _empty_shifted, (self.base_class, self.shifted_parameters), self.__dict__

    def _shifted_parameter(self, name: str, base: Tensor) -> Tensor:
        return base + getattr(self, SHIFT_PREFIX + name) * self.lora_scale if self.lora_scale else base


def kind_of_shift(parameter: str, has_lora: bool) -> str:
    """Which word of ``also_train`` the shift of a parameter belongs to: ``bias``, ``position`` or ``norm``."""
    if has_lora:
        return 'bias'
    return 'position' if POSITION.search(parameter) else 'norm'


def add_shift(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let parameters of a module carry a shift, in place: the module gets a class of the same name that reads them so.

    Args:
        module: Any module.
        names: Names of parameters that are its own.
    """
    for name in names:
        module.register_parameter(SHIFT_PREFIX + name, nn.Parameter(torch.zeros_like(module._parameters[name])))
    module.__class__ = _shifted_class(type(module), names)


def _empty_shifted(base: type, names: tuple[str, ...]) -> nn.Module:
    shifted = _shifted_class(base, names)
    return shifted.__new__(shifted)


@functools.lru_cache(maxsize=None)
def _shifted_class(base: type, names: tuple[str, ...]) -> type:
    readers = {name: _updated(name, '_shifted_parameter') for name in names}
    members = {'base_class': base, 'shifted_parameters': names, '__module__': base.__module__, **readers}
    return type(base.__name__, (ShiftedModule, base), members)
