"""The one attention function: it stands between a stock transformers model and ISD.

Shapes: B batch, H query heads, G key/value heads, Q query rows, S key rows, E head size.

Training, the reference decoder and the cached decoder all call the model with `visible=...`; the model hands it down
to this function untouched, so a window, a training layout and plain causal text differ only in that mask.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "idlm"
"""The name under which transformers knows the function."""


class KVCache(Protocol):
    """What the function needs of a cache."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's rows, [B, G, Q, E]; return all keys and values its queries may look at, [B, G, S, E]."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    visible: Tensor | None = None,
    cache: KVCache | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over what `visible` allows; plain causal attention without it.

    Args:
        module: the layer's attention module; its `layer_idx` names the cache layer.
        query, key, value: [B, H, Q, E], [B, G, Q, E], [B, G, Q, E], rotated already.
        attention_mask: transformers' own argument; used only by callers that know no `visible` (its `generate`).
        scaling, dropout: as in transformers.
        visible: bool, broadcastable to [B, H, Q, S]; True where a query row may see a key row.
        cache: where the rows' keys and values go and where earlier ones come from.

    Returns:
        the mixed values [B, Q, H, E], and None in place of the attention weights.
    """
    if cache is not None:
        key, value = cache.write(module.layer_idx, key, value)  # type: ignore[arg-type]
    mask = attention_mask if visible is None else visible
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
    return mixed.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
