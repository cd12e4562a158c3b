"""DSCLoRA: SPAN adapted by ConvLoRA (arXiv:2504.11271), winner of the NTIRE 2025 efficient SR challenge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_sr.adapters import LoRAConfig, infer_lora_config, mark_trainable
from lora_sr.adapters.verbs import attach_updates
from lora_sr.archs.span import SPAN, is_span, span_sizes

# The 20 convolutions in which the authors' merged entry differs from the SPAN it started from.
DSCLORA_TARGETS = (r'block_[1-6]\.c[123]_r\.eval_conv', r'conv_2\.eval_conv', r'upsampler\.0')


class DSCLoRA(SPAN):
    """SPAN in deploy form with ConvLoRA in every SPAB (which makes it an SConvLB), in ``conv_2`` and in the upsampler.

    Only the LoRA tensors train. A checkpoint of SPAN, in either form, loads strictly; merging gives SPAN back.

    Args:
        num_in_ch: Channels of the input, 3 or 1.
        num_out_ch: Channels of the output, 3 or 1.
        feature_channels: Width C of the SPAN that is adapted.
        upscale: Scale factor.
        rank: Rank of ConvLoRA.
        alpha: Numerator of the update's scale alpha / rank; ``None`` stands for the rank. An adapted checkpoint brings
            its own.
        rank_pattern: Regular expression of layer names -> rank, for layers that differ, e.g. ``upsampler.0: 16``.
        alpha_pattern: Likewise for alpha.
        norm: Whether the SPAN that is adapted normalizes images.

    Raises:
        InputError: As SPAN and LoRAConfig do.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        feature_channels: int = 48,
        upscale: int = 4,
        rank: int = 8,
        alpha: float | None = 16,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        norm: bool = True,
    ):
        super().__init__(num_in_ch, num_out_ch, feature_channels, upscale, deploy=True, norm=norm)
        # An adapted checkpoint may have any rank, that of a mix of adapters as well.
        attach_updates(
            self,
            LoRAConfig(
                list(DSCLORA_TARGETS),
                rank=rank,
                alpha=alpha,
                rank_pattern=rank_pattern or {},
                alpha_pattern=alpha_pattern or {},
            ),
        )
        mark_trainable(self)


def is_dsclora(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is a state dict of DSCLoRA: SPAN in deploy form with LoRA on just its layers."""
    layers = [key[: -len('.lora_A')] for key in state if key.endswith('.lora_A')]
    targets = [layer for layer in layers if any(re.fullmatch(target, layer) for target in DSCLORA_TARGETS)]
    return is_span(state) and len(layers) == len(targets) == 3 * SPAN.num_blocks + 2


def dsclora_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the DSCLoRA that a state dict belongs to, with the file's ranks and alphas.

    Raises:
        InputError: The LoRA tensors are incomplete, or the network takes or gives other than RGB or gray images.
    """
    lora = infer_lora_config(state)
    return dict(
        **span_sizes(state),
        rank=lora.rank,
        alpha=lora.alpha,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
    )
