"""Attention of one new token a row, on a CPU, for models in which several query heads share a key head.

transformers repeats the keys and values of the whole cache for each query head, in every layer and step. Here the query
heads that share a key head take the place of query positions, so that nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The result of transformers' own function. `query` has the shape (rows, heads, tokens, width)."""
    rows, heads, tokens, width = query.shape
    same_mask = attention_mask is None or attention_mask.shape[1:3] == (1, 1)
    special = dropout or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None
    if tokens > 1 or heads == key.shape[1] or query.device.type != "cpu" or not same_mask or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    groups = query.reshape(rows, key.shape[1], -1, width)
    found = torch.nn.functional.scaled_dot_product_attention(groups, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, -1), None


def register() -> None:
    """Makes the models of this process use `attention` for attn_implementation=sdpa, which is the default."""
    AttentionInterface.register("sdpa", attention)
