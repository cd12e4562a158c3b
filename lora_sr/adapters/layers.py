"""Layers that carry a low-rank update of their weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sr.errors import InputError

LORA_TENSORS = ('lora_A', 'lora_B', 'lora_alpha')


class LoRALayer:
    """What the adapted layers share: a frozen weight W plus a trained update, W' = W + s * (alpha / r) * delta(B, A).

    The update lives in weight space: the layer's forward is that of the layer it replaces, with W' for W. So it needs
    no activation memory of its own on full-resolution feature maps, and merging is exact. ``weight`` and ``bias`` keep
    their names; beside them stand

    - ``lora_A``, Kaiming-uniform (a = sqrt(5)) at first, and ``lora_B``, zero at first, so that the adapted layer
      starts exactly as the layer it replaces;
    - ``lora_alpha``, a scalar tensor, because a checkpoint must be mergeable on its own and shapes tell only the rank;
    - ``lora_scale``, the run-time strength s (a Python number that is not saved): 0 is the base, 1 the adapted layer.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: Tensor
    lora_scale: float
    rank: int

    def _init_lora(self, a_shape: tuple[int, int], b_shape: tuple[int, int], rank: int, alpha: float):
        if rank < 1:
            raise InputError(f'LoRA rank is {rank}: it must be an integer of at least 1.')
        like = {'device': self.weight.device, 'dtype': self.weight.dtype}
        self.rank = rank
        self.lora_scale = 1.0
        self.lora_A = nn.Parameter(torch.empty(a_shape, **like))
        self.lora_B = nn.Parameter(torch.zeros(b_shape, **like))
        self.register_buffer('lora_alpha', torch.tensor(float(alpha), **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta_weight(self) -> Tensor:
        """The update of the weight at the present ``lora_scale``, in the shape of ``weight``."""
        factor = self.lora_alpha * (self.lora_scale / self.rank)
        return (self.lora_B @ self.lora_A).view(self.weight.shape) * factor

    def adapted_weight(self) -> Tensor:
        """Weight plus update, in the shape of ``weight``."""
        return self.weight + self.delta_weight()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A checkpoint of the base network loads strictly: only a layer that has half of its LoRA tensors is incomplete.
        absent = [prefix + name for name in LORA_TENSORS if prefix + name not in state_dict]
        forgiven = absent if len(absent) == len(LORA_TENSORS) else [prefix + 'lora_alpha']
        missing_keys[:] = [key for key in missing_keys if key not in forgiven]

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

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W'), as of the convolution it replaces."""
        return self._conv_forward(x, self.adapted_weight(), self.bias)

    def to_base(self) -> nn.Conv2d:
        """The plain convolution with this layer's ``weight`` and ``bias``, without the update."""
        base = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device='meta',
        )
        base.weight, base.bias = self.weight, self.bias
        return base


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

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device='meta')
        self.weight, self.bias = linear.weight, linear.bias
        self._init_lora((rank, linear.in_features), (linear.out_features, rank), rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.adapted_weight(), self.bias)

    def to_base(self) -> nn.Linear:
        """The plain linear layer with this layer's ``weight`` and ``bias``, without the update."""
        base = nn.Linear(self.in_features, self.out_features, self.bias is not None, device='meta')
        base.weight, base.bias = self.weight, self.bias
        return base


# The exact types, not their subclasses: a subclass may use its weight in a way that an update would bypass.
LORA_LAYERS = {nn.Conv2d: LoRAConv2d, nn.Linear: LoRALinear}
