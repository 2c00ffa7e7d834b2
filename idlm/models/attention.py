"""The attention function that stock transformers models call.

Training and the reference decoder say with `visible` what a row sees, the engine with `cache`;
`idlm.models.routes` brings both here. So windows, training layouts and causal text differ only in
them.

Shapes: B batch, H query heads, G key/value heads, Q query rows, S key rows, E head size.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

NAME = "idlm"
"""The `attn_implementation` of the function in transformers."""


class Cache(Protocol):
    """A KV cache that computes attention itself."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store a layer's keys and values, then attend to all rows that each query sees.

        Those include rows of earlier forwards. query [B, H, Q, E], key and value [B, G, Q, E] ->
        [B, Q, H, E].
        """
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    visible: Tensor | None = None,
    cache: Cache | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention under `visible`; causal attention without it.

    Args:
        module: the layer's attention module; its `layer_idx` is the cache layer.
        query, key, value: [B, H, Q, E], [B, G, Q, E], [B, G, Q, E], after the rotary embedding.
        attention_mask: transformers' own argument, used only without `visible` (by `generate`).
        scaling, dropout: as in transformers.
        visible: bool, broadcastable to [B, H, Q, S]; True if a query row sees a key row.
        cache: stores the keys and values and decides what each row sees; `visible` is ignored.

    Returns:
        the output [B, Q, H, E], and None in place of the attention weights.
    """
    if cache is not None:
        return cache.attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]
    return attend(
        query, key, value, attention_mask if visible is None else visible, scaling, dropout
    ), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under a boolean mask; causal without a mask. Shapes as in `attention`."""
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return mixed.transpose(1, 2)
