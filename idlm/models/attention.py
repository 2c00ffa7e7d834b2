"""The attention function that stock transformers models call.

Training and the reference decoder say with `visible` what a row sees, the engine with `cache`;
`idlm.models.routes` brings both here. So windows, training layouts and causal text differ only in
them.
What a layer does with the scores, the model says itself: sliding window, soft cap, sinks.

Shapes: B batch, H query heads, G key/value heads, Q query rows, S key rows, E head size.
"""

from __future__ import annotations

from typing import Protocol, Required, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.decoding.scores import Scores

NAME = "idlm"
"""The `attn_implementation` of the function in transformers."""


class Cache(Protocol):
    """A KV cache that computes attention itself."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """Store a layer's keys and values, then attend to all rows that each query sees.

        Those include rows of earlier forwards. query [B, H, Q, E], key and value [B, G, Q, E] ->
        [B, Q, H, E].
        """
        ...


class Visible:
    """Which key rows each query row sees.

    Args:
        rows: bool, broadcastable to [B, H, Q, S]: what is seen by a layer without a window.
        queries, keys: the positions [B, Q] and [B, S] of the rows.
    """

    def __init__(self, rows: Tensor, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = queries, keys
        self._by_window: dict[int | None, Tensor] = {None: rows}
        self._without: tuple[slice, Visible] | None = None

    def within(self, window: int | None) -> Tensor:
        """What a layer with this sliding window sees: broadcastable to [B, H, Q, S]."""
        if window is not None and window not in self._by_window:
            distance = self.queries[:, None, :, None] - self.keys[:, None, None]
            self._by_window[window] = self._by_window[None] & (distance < window)
        return self._by_window[window]

    def without(self, rows: slice) -> Visible:
        """What the rows but `rows` see of each other, if queries and keys are the same rows."""
        if self._without is None or self._without[0] != rows:
            kept = torch.ones_like(self.queries[0], dtype=torch.bool)
            kept[rows] = False
            seen = self._by_window[None][..., kept, :][..., kept]
            self._without = rows, Visible(seen, self.queries[:, kept], self.keys[:, kept])
        return self._without[1]


class Options(TypedDict, total=False):
    """The named arguments of an attention function that change its result.

    Attributes:
        attention_mask: transformers' own argument, used only without `visible` (by `generate`).
        scaling, dropout: as in transformers.
        sliding_window, softcap, s_aux: transformers' names for the constants of `Scores`.
        visible: which key rows each query row sees.
        cache: stores the keys and values and decides what each row sees; `visible` is ignored.
    """

    attention_mask: Tensor | None
    scaling: Required[float]
    dropout: float
    sliding_window: int | None
    softcap: float | None
    s_aux: Tensor | None
    visible: Visible | None
    cache: Cache | None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, None]:
    """Dot-product attention under `visible`; causal attention without it.

    Args:
        module: the layer's attention module; its `layer_idx` is the cache layer.
        query, key, value: [B, H, Q, E], [B, G, Q, E], [B, G, Q, E], after the rotary embedding.
        options: transformers may pass more than those named, which change nothing.

    Returns:
        the output [B, Q, H, E], and None in place of the attention weights.
    """
    window = _hiding(module, options.get("sliding_window"))
    scores = Scores(options["scaling"], window, options.get("softcap"), options.get("s_aux"))
    if (cache := options.get("cache")) is not None:
        return cache.attend(module.layer_idx, query, key, value, scores), None  # type: ignore[arg-type]
    visible = options.get("visible")
    mask = options.get("attention_mask") if visible is None else visible.within(scores.window)
    return attend(query, key, value, mask, scores, options.get("dropout", 0.0)), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under a boolean mask, which has the window in it; without a mask causal, with the
    last key row at the position of the last query row. Shapes as in `attention`."""
    if mask is None and not (scores.plain and scores.window is None):
        mask = _causal(query.shape[2], key.shape[2], query.device).within(scores.window)
    grouped = key.shape[1] != query.shape[1]
    if scores.plain:
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and query.shape[2] > 1,
            scale=scores.scale,
            enable_gqa=grouped,
        )
        return mixed.transpose(1, 2)
    assert mask is not None  # noqa: S101
    if grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    sinks = None if scores.sinks is None else scores.sinks[:, None, None]
    weights = scores.weights(query @ key.transpose(2, 3), bias, sinks).to(value.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2)


def _causal(queries: int, keys: int, device: torch.device) -> Visible:
    positions = torch.arange(keys, device=device)[None]
    last = positions[:, keys - queries :]
    return Visible((positions <= last.mT)[None, None], last, positions)


def _hiding(module: nn.Module, window: int | None) -> int | None:
    """The window, or None if it is as long as the context and so never hides a token."""
    context = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return None if window is None or (context and window >= context) else window
