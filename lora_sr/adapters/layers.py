"""Layers that carry a trained update of their weight: one of low rank, or a delta of the weight's own shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_sr.errors import InputError, shown

LORA_TENSORS = ('lora_A', 'lora_B', 'lora_alpha')
DELTA_PREFIX = 'lora_shift_'  # deltas were called shifts when the first checkpoints were written
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of updates
POSITION = re.compile('rel(ative)?_pos|absolute_pos')  # parameters that are tables of positions


def shape_text(shape: Iterable[int]) -> str:
    """A shape as people write it: ``30x3x3x3``."""
    return shown('x'.join(map(str, shape)) or 'a number', 40)


def rows_of_unit(shape: Sequence[int], groups: int = 1) -> int:
    """Rows of ``lora_A`` in one unit of rank: kh for a weight (., ., kh, kw), but 1 where it is flattened."""
    return shape[2] if len(shape) == 4 and not is_channelwise(shape, groups) else 1


def is_channelwise(shape: Sequence[int], groups: int) -> bool:
    """Whether a weight (m, 1, kh, kw) has a kernel for each channel by itself, as in a depth-wise convolution."""
    return len(shape) == 4 and groups > 1 and shape[1] == 1


def matrix_shape(shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
    """Rows and columns of the matrix B @ A that is viewed as a weight of that shape.

    A weight (m, n, kh, kw) has (m / groups * kh, n * groups * kw), whether it is of a convolution or of a transposed
    one, so that a state dict need not tell which. Any other weight is flattened to (m, all the rest), and so are
    kernels for each channel by itself: as (kh, m * kw) their factors would be larger than they are from rank 1 on, and
    (m, kh * kw) lets the kernels of all channels change alike, each as much as it likes.
    """
    if len(shape) == 4 and not is_channelwise(shape, groups):
        return shape[0] // groups * shape[2], shape[1] * groups * shape[3]
    return shape[0], math.prod(shape[1:])


def low_rank_update(lora_A: Tensor, lora_B: Tensor, factor: Tensor | float, shape: torch.Size) -> Tensor:
    """factor * B @ A, in the shape of a layer's weight."""
    return (lora_B @ lora_A).view(shape) * factor


class AdaptedModule(nn.Module):
    """What everything that trains beside a frozen base shares: parameters that are read as base plus update.

    Whoever reads such a parameter, ``module.weight``, gets the updated value: the module's own forward, and also code
    that computes with the weight of another module, as networks with reparameterized branches do. The base value is
    the parameter that stands under that name in the state dict, and :meth:`base_parameter` gives it.

    ``lora_scale`` is the run-time strength s of the updates (a Python number that is not saved): 0 is the base, 1 the
    adapted module.
    """

    lora_scale: float = 1.0
    base_class: ClassVar[type[nn.Module]]

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
        self.__class__ = cast(Any, base_class_of(self))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A checkpoint of the base network loads strictly: only a layer that has half of its LoRA tensors is incomplete.
        absent = [prefix + name for name in LORA_TENSORS if prefix + name not in state_dict]
        forgiven = absent if len(absent) == len(LORA_TENSORS) else [prefix + 'lora_alpha']
        missing_keys[:] = [
            key for key in missing_keys if key not in forgiven and not key.startswith(prefix + DELTA_PREFIX)
        ]


def base_class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it was adapted."""
    kind = type(module)
    while issubclass(kind, AdaptedModule):  # a layer may carry deltas over its LoRA
        kind = kind.base_class
    return kind


def _updated(name: str, update: str) -> Any:
    """A property that reads the parameter ``name`` with what the method ``update`` makes of it."""

    def get(self: AdaptedModule) -> Tensor:
        base = AdaptedModule.base_parameter(self, name)
        if base is None:
            raise AttributeError(f'{type(self).__name__} has no parameter "{name}"')
        try:
            return cast(Tensor, getattr(self, update)(name, base))
        except AttributeError as error:  # Module.__getattr__ would take it for a missing attribute, and give the base
            raise RuntimeError(f'{type(self).__name__}.{name} cannot be computed: {error}') from error

    def put(self: AdaptedModule, value: Tensor) -> None:  # registered parameters do not come here; a replica's do
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

    The attribute ``weight`` is W', W itself is ``base_parameter('weight')``. With ``matrix_shape`` of the weight being
    (rows, columns), and ``rows_of_unit`` u, ``lora_A`` is (r * u, columns) and ``lora_B`` is (rows, r * u).

    Source: LoRA (arXiv:2106.09685), section 4.1.

    Args:
        layer: The layer to adapt. It stays as it is; the adapted one shares its tensors.
        rank: Rank r, at least 1.
        alpha: Numerator of the update's scale.

    Raises:
        InputError: A rank below 1.
    """

    weight_name: ClassVar[str] = 'weight'
    weight = _updated('weight', '_updated_weight')

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: Tensor
    rank: int

    def __init__(self, layer: nn.Module, rank: int, alpha: float) -> None:
        # Not the constructor of the layer's class, which would draw random weights. Its registries are copied.
        for name, value in layer.__dict__.items():
            self.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
        self._init_lora(rank, alpha)

    def _init_lora(self, rank: int, alpha: float) -> None:
        if rank < 1:
            raise InputError(f'LoRA rank must be an integer of at least 1, got {rank}.')
        weight = self.base_weight()
        rows, columns = matrix_shape(weight.shape, getattr(self, 'groups', 1))
        inner = rank * rows_of_unit(weight.shape, getattr(self, 'groups', 1))
        self.rank = rank
        self.lora_A = nn.Parameter(weight.new_empty(inner, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(rows, inner))
        self.register_buffer('lora_alpha', torch.tensor(float(alpha), device=weight.device, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def base_weight(self) -> Tensor:
        """The frozen weight, without its update."""
        return cast(Tensor, self.base_parameter(self.weight_name))

    def delta_weight(self) -> Tensor:
        """The update of the weight at the present ``lora_scale``, in the shape of ``weight``."""
        factor = self.lora_alpha * (self.lora_scale / self.rank)
        return low_rank_update(self.lora_A, self.lora_B, factor, self.base_weight().shape)

    def _updated_weight(self, name: str, base: Tensor) -> Tensor:
        # At scale 0 the base itself, to the bit: 0 * update is NaN where an update is infinite.
        return base + self.delta_weight() if self.lora_scale else base

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f'{own}, ' * bool(own) + f'rank={self.rank}, alpha={self.lora_alpha.item():g}'


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """ConvLoRA: a 2-D convolution whose weight carries a low-rank update.

    With kernel (kh, kw): ``lora_A`` is (r * kh, in * kw), ``lora_B`` is (out / groups * kh, r * kh), and
    delta W = (alpha / r) * (lora_B @ lora_A) viewed as ``weight``. Stride, padding, dilation and groups are free. Where
    each channel has a kernel by itself, ``lora_A`` is (r, kh * kw) and ``lora_B`` is (out, r), see
    :func:`matrix_shape`.

    Source: DSCLoRA (arXiv:2504.11271); the shapes are those of the loralib package, but for depth-wise layers.
    """

    base_class = nn.Conv2d


class LoRAConvTranspose2d(LoRALayer, nn.ConvTranspose2d):
    """A transposed 2-D convolution, whose weight is (in, out / groups, kh, kw).

    ``lora_A`` is (r * kh, out * kw), ``lora_B`` is (in / groups * kh, r * kh): :class:`LoRAConv2d` with in for out.
    """

    base_class = nn.ConvTranspose2d


class LoRAConv1d(LoRALayer, nn.Conv1d):
    """A 1-D convolution: ``lora_A`` is (r, in / groups * k), ``lora_B`` is (out, r)."""

    base_class = nn.Conv1d


class LoRAConv3d(LoRALayer, nn.Conv3d):
    """A 3-D convolution: ``lora_A`` is (r, in / groups * kd * kh * kw), ``lora_B`` is (out, r)."""

    base_class = nn.Conv3d


class LoRAConvTranspose1d(LoRALayer, nn.ConvTranspose1d):
    """A transposed 1-D convolution: ``lora_A`` is (r, out / groups * k), ``lora_B`` is (in, r)."""

    base_class = nn.ConvTranspose1d


class LoRAConvTranspose3d(LoRALayer, nn.ConvTranspose3d):
    """A transposed 3-D convolution: ``lora_A`` is (r, out / groups * kd * kh * kw), ``lora_B`` is (in, r)."""

    base_class = nn.ConvTranspose3d


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer: ``lora_A`` is (r, in), ``lora_B`` is (out, r)."""

    base_class: ClassVar[type[nn.Module]] = nn.Linear


class LoRAOutProjection(LoRALinear, NonDynamicallyQuantizableLinear):
    """The linear layer behind ``nn.MultiheadAttention``, which reads its weight and does not call it."""

    base_class = NonDynamicallyQuantizableLinear


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """An embedding: ``lora_A`` is (r, width), ``lora_B`` is (entries, r)."""

    base_class = nn.Embedding


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """Attention whose ``in_proj_weight`` carries the update: ``lora_A`` is (r, width), ``lora_B`` is (3 * width, r).

    Its ``out_proj`` is a layer of its own. torch's fast path for inference reads both and so computes with the updates.
    """

    base_class = nn.MultiheadAttention
    weight_name = 'in_proj_weight'
    in_proj_weight = _updated('in_proj_weight', '_updated_weight')


_LAYERS: tuple[type[LoRALayer], ...] = (
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAConvTranspose1d,
    LoRAConvTranspose2d,
    LoRAConvTranspose3d,
    LoRAEmbedding,
    LoRALinear,
    LoRAMultiheadAttention,
    LoRAOutProjection,
)
# The exact types, not their subclasses: a subclass may use its weight in a way that an update would bypass.
LORA_LAYERS = {layer.base_class: layer for layer in _LAYERS}


def weight_name(layer: nn.Module) -> str:
    """The parameter of a layer that LoRA updates."""
    return LORA_LAYERS[base_class_of(layer)].weight_name


def weight_key(layer: str, state: Mapping[str, Any]) -> str:
    """Likewise in a state dict: only ``nn.MultiheadAttention`` has an ``in_proj_weight``, and it has no ``weight``."""
    attention = join(layer, LoRAMultiheadAttention.weight_name)
    return attention if attention in state else join(layer, 'weight')


def join(module: str, name: str) -> str:
    """The full name of what a module calls ``name``; the outermost module is called ''."""
    return f'{module}.{name}' if module else name


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module carries LoRA or can.

    What cannot: a subclass of a layer, a weight that is computed (``weight_norm``), has no values or carries a delta,
    attention with separate widths of keys and values, and an embedding that renormalizes its table or has sparse
    gradients.
    """
    kind = base_class_of(module)
    if isinstance(module, LoRALayer) or kind not in LORA_LAYERS:
        return isinstance(module, LoRALayer)
    name, own = weight_name(module), module._parameters
    is_special = getattr(module, 'sparse', False) or getattr(module, 'max_norm', None) is not None
    weight = own.get(name)
    return weight is not None and weight.numel() > 0 and DELTA_PREFIX + name not in own and not is_special


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    groups = getattr(module, 'groups', 1)
    return base_class_of(module) in LORA_LAYERS and 1 < groups == module.in_channels == module.out_channels


def give_lora(layer: nn.Module, rank: int, alpha: float, tied: LoRALayer | None = None) -> LoRALayer:
    """Let a layer carry LoRA, in place, so that whoever holds the layer holds the adapted one.

    Args:
        layer: A layer for which :func:`is_adaptable` holds, without LoRA.
        rank: Rank of the update.
        alpha: Numerator of its scale.
        tied: A layer with LoRA of that rank and alpha and with the same weight: both then share one update.
    """
    layer.__class__ = cast(Any, LORA_LAYERS[type(layer)])
    adapted = cast(LoRALayer, layer)
    if tied is None:
        adapted._init_lora(rank, alpha)
    else:
        adapted.rank, adapted.lora_A, adapted.lora_B = tied.rank, tied.lora_A, tied.lora_B
        adapted.register_buffer('lora_alpha', tied.lora_alpha)
    return adapted


class DeltaModule(AdaptedModule):
    """A module some of whose parameters p carry a trained delta, p' = p + s * ``lora_shift_p``, zero at first.

    For what is too small for a low rank: biases, the scale and offset of a normalization, tables of relative positions,
    bare parameters and depth-wise convolutions.
    """

    delta_parameters: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # pickle would not find its class in a module
        return _empty_delta_module, (self.base_class, self.delta_parameters), self.__dict__

    def _with_delta(self, name: str, base: Tensor) -> Tensor:
        return base + getattr(self, DELTA_PREFIX + name) * self.lora_scale if self.lora_scale else base


# Whose own parameters belong to no layer: the containers, and the one activation of torch that has a weight.
_BARE = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.PReLU)


def delta_kind(module: nn.Module, parameter: str) -> str | None:
    """The word of ``also_train`` that lets a parameter of a module carry a delta, None where there is none."""
    kind = base_class_of(module)
    if kind in LORA_LAYERS:
        if parameter == weight_name(module):
            return 'depthwise' if is_depthwise(module) else None
        return 'bias' if 'bias' in parameter else None
    if 'norm' in kind.__name__.lower():
        return 'norm'
    if POSITION.search(parameter):
        return 'position'
    of_torch = next(base for base in kind.__mro__ if base.__module__.startswith('torch.nn.'))
    return 'parameters' if of_torch in _BARE else None


def carries_delta(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter of a module carries a delta."""
    return DELTA_PREFIX + parameter in module._parameters


def give_deltas(module: nn.Module, deltas: Mapping[str, nn.Parameter]) -> None:
    """Let parameters of a module carry deltas, in place: it gets a class of the same name that reads them so.

    Args:
        module: Any module.
        deltas: Name of a parameter of its own -> its delta, of the same shape.
    """
    for name, delta in deltas.items():
        module.register_parameter(DELTA_PREFIX + name, delta)
    module.__class__ = cast(Any, _delta_class(type(module), tuple(deltas)))


def _empty_delta_module(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _delta_class(base, names)
    return kind.__new__(kind)


def _delta_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    if (base, names) not in _delta_classes:
        readers = {name: _updated(name, '_with_delta') for name in names}
        members = {'base_class': base, 'delta_parameters': names, '__module__': base.__module__, **readers}
        _delta_classes[base, names] = type(base.__name__, (DeltaModule, base), members)
    return _delta_classes[base, names]


# One class for equal arguments, so that a copy of a module is of its class.
_delta_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
