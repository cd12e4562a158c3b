"""DSCLoRA: SPAN adapted by ConvLoRA (arXiv:2504.11271), winner of the NTIRE 2025 efficient SR challenge."""

from __future__ import annotations

from basicsr.utils.registry import ARCH_REGISTRY

from lora_sr.adapters import LoRAConfig, add_lora, mark_trainable
from lora_sr.archs.span_arch import SPAN

# The 20 convolutions in which the authors' merged entry differs from the SPAN it started from.
DSCLORA_TARGETS = (r'block_[1-6]\.c[123]_r\.eval_conv', r'conv_2\.eval_conv', r'upsampler\.0')


@ARCH_REGISTRY.register()
class DSCLoRA(SPAN):
    """SPAN in deploy form with ConvLoRA in every SPAB (which makes it an SConvLB), in ``conv_2`` and in the upsampler.

    Only the LoRA tensors train. A checkpoint of SPAN, in either form, loads strictly; merging gives SPAN back.

    Args:
        num_in_ch: Channels of the input; 3.
        num_out_ch: Channels of the output; 3.
        feature_channels: Width C of the SPAN that is adapted.
        upscale: Scale factor.
        rank: Rank of ConvLoRA.
        alpha: Numerator of the update's scale alpha / rank.
        rank_pattern: Regular expression of layer names -> rank, for layers that differ, e.g. ``upsampler.0: 16``.
        alpha_pattern: Likewise for alpha.

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
        alpha: float = 16,
        rank_pattern: dict | None = None,
        alpha_pattern: dict | None = None,
    ):
        super().__init__(num_in_ch, num_out_ch, feature_channels, upscale, deploy=True)
        add_lora(
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
