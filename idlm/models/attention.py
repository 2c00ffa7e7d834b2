"""The one attention function: it stands between a stock transformers model and ISD.

Shapes: B batch, H query heads, G key/value heads, Q query rows, S key rows, E head size.

Training and the reference decoder call the model with `visible=...`, the engine with `cache=...`;
the model hands them down to this function untouched, so a window, a training layout and plain
causal text differ only in that.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "idlm"
"""The name under which transformers knows the function."""


class Cache(Protocol):
    """What the function needs of a cache."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep one layer's rows and mix the values that each query may see, those of earlier
        forwards included.

        query [B, H, Q, E], key and value [B, G, Q, E] -> [B, Q, H, E].
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
    """Scaled dot-product attention over what `visible` allows; plain causal attention without it.

    Args:
        module: the layer's attention module; its `layer_idx` names the cache layer.
        query, key, value: [B, H, Q, E], [B, G, Q, E], [B, G, Q, E], rotated already.
        attention_mask: transformers' own argument; used only by callers that know no `visible` (its
            `generate`).
        scaling, dropout: as in transformers.
        visible: bool, broadcastable to [B, H, Q, S]; True where a query row may see a key row.
        cache: keeps the rows' keys and values and knows what they may see; `visible` is not looked
            at then.

    Returns:
        the mixed values [B, Q, H, E], and None in place of the attention weights.
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
    """Attention under a boolean mask; plain causal without one. Shapes as in `attention`."""
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


AttentionInterface.register(NAME, attention)
