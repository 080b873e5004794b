"""PyTorch's fused encoder layer in terms of the operators that it is made of.

`torch.nn.TransformerEncoderLayer` calls one operator for the whole layer when it is in eval mode and no gradient is
needed, which is what a decode step or an encoder is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def _encoder_layer(
    x: torch.Tensor,
    width: int,
    heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """x: [B, T, width]. mask: of what is not attended to, [T, T] (type 0), [B, T] (1) or [B, heads, T, T] (2)."""
    allowed = None if mask is None else mask.to(torch.bool).logical_not()
    if allowed is not None and mask_type == 1:
        allowed = allowed[:, None, None]

    def attention(y: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = y.shape
        parts = F.linear(y, qkv_weight, qkv_bias).chunk(3, -1)
        q, k, v = (p.reshape(batch, tokens, heads, width // heads).transpose(1, 2) for p in parts)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return F.linear(found.transpose(1, 2).reshape(batch, tokens, width), proj_weight, proj_bias)

    def feed_forward(y: torch.Tensor) -> torch.Tensor:
        inner = F.linear(y, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def first(y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, (width,), norm_weight_1, norm_bias_1, eps)

    def second(y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, (width,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = x + attention(first(x))
        return x + feed_forward(second(x))
    x = first(x + attention(x))
    return second(x + feed_forward(x))


MADE_OF: dict[Any, Callable[..., Any]] = {torch._transformer_encoder_layer_fwd: _encoder_layer}
"""Target of a node of Dynamo's graph -> what is recorded in its place."""
