"""Causal attention for short sequences on a CPU.

torch's fused CPU attention is slow in the backward pass for the short sequences of many RL tasks: at 256 x 72 tokens plain
fp32 batched products take less than half of its time, and their rounding error is smaller (`benchmarks/attention.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "short_causal"
LONGEST = 256
"""Beyond this length the scores no longer fit the cache and the fused kernel wins."""


def register() -> str:
    """Make the function known to transformers; returns the name to give as `attn_implementation`."""
    AttentionInterface.register(NAME, short_causal_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def short_causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T / sqrt(d)) V in fp32 under a causal mask.

    Args:
        module: The attention layer that asks.
        query: bf16 [batch, num_heads, length, head_dim].
        key: bf16 [batch, num_kv_heads, length, head_dim]; each serves num_heads / num_kv_heads query heads.
        value: Like `key`.
        attention_mask: None for plain causal attention; anything else goes to torch's fused kernel, as do long sequences,
            decoding with a cache and sliding windows.
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        dropout: Not applied; the learner trains without.
        **kwargs: The rest of transformers' interface.

    Returns:
        bf16 [batch, length, num_heads, head_dim], and no attention weights.
    """
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if attention_mask is not None or key.shape[2] != length or length > LONGEST or kwargs.get("sliding_window"):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    group = num_heads // num_kv_heads
    factor = head_dim**-0.5 if scaling is None else scaling
    rows = (query.float() * factor).reshape(batch * num_kv_heads, group * length, head_dim)
    columns = key.float().reshape(batch * num_kv_heads, length, head_dim)
    mask = torch.full((length, length), float("-inf"), device=query.device).triu(1).repeat(group, 1)
    scores = torch.baddbmm(mask.expand(batch * num_kv_heads, -1, -1), rows, columns.transpose(1, 2))
    out = torch.bmm(scores.softmax(dim=-1), value.float().reshape(batch * num_kv_heads, length, head_dim))
    return out.reshape(batch, num_heads, length, head_dim).transpose(1, 2).to(query.dtype), None
