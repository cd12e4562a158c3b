"""Attention in plain operators, for files whose images are of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` in linear layers, products and a softmax.

    torch's own has an operator that ONNX does not know, and shapes that its exporter makes constants of.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in torch, for tokens in batches: (N, L, E), or (L, N, E) without ``batch_first``."""
        if key_padding_mask is not None or self.bias_k is not None or self.add_zero_attn or query.ndim != 3:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not self.batch_first:
            query, key, value = (tokens.transpose(0, 1) for tokens in (query, key, value))
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for tokens, weight, bias in zip((query, key, value), weights, biases)
        )
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, float('-inf'))
            scores = scores + attn_mask
        shares = scores.softmax(-1)
        output = self.out_proj((shares @ v).transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, shares.mean(1) if average_attn_weights else shares


def use_plain_attention(network: nn.Module) -> None:
    """Let every ``nn.MultiheadAttention`` of a network compute in plain operators, in place."""
    for module in network.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = PlainAttention
