"""`batch_law`: `law.law` for many requests at once, each with its own settings, and the steps it is made of.

A setting that a slot does not use leaves its numbers as they are, to the bit. Everything computed is float64.

Shapes: B slots, R rows, V logit columns. `first` int64 [B] is the position of the token that row 0 gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from idlm.decoding.settings import NEVER, Features, Settings


class Past(NamedTuple):
    """The tokens before each row: bool and integer [B, R, V], as `law.History`."""

    seen: Tensor
    counts: Tensor


def positions(first: Tensor, rows: int) -> Tensor:
    """The positions [B, R] of the tokens that the rows give."""
    return first[:, None] + torch.arange(rows, device=first.device)


def adjusted(logits: Tensor, settings: Settings, features: Features, first: Tensor, drafts: Tensor | None) -> Tensor:
    """Logits [B, R, V] adjusted and filtered; row r comes after the first r of `drafts`, which only penalties need."""
    past = None
    if features.penalised and drafts is not None:
        past = past_of(settings, drafts, 0, logits.shape[1])
    return filtered(adjust(logits, settings, features, first, past), settings, features)


def adjust(logits: Tensor, settings: Settings, features: Features, first: Tensor, past: Past | None) -> Tensor:
    """`law.adjust`, in float64 wherever anything is computed."""
    scores = logits
    if past is not None:
        scores = _penalise(scores.to(torch.float64), settings, past)
    if features.biased and settings.bias is not None:
        scores = scores + settings.bias[:, None]
    elif settings.mask_id < settings.vocab_size:
        scores = scores.clone()
        scores[..., settings.mask_id] = NEVER
    if features.held and settings.stop is not None:
        outputs = positions(first - settings.prompt_length, logits.shape[1])
        early = outputs < settings.hold_until[:, None]
        scores = scores.masked_fill(settings.stop[:, None] & early[..., None], NEVER)
    return scores


def past_of(settings: Settings, drafts: Tensor, start: int, stop: int) -> Past:
    """What rows `start` to `stop` come after: row r after the first r of `drafts`."""
    if settings.seen is None or settings.counts is None:
        raise ValueError("penalties need the history of the slots")
    placed = settings.counts.new_zeros(drafts.shape[0], stop, settings.vocab_size)
    placed[:, 1:].scatter_(2, drafts[:, : stop - 1, None].clamp(0, settings.vocab_size - 1), 1)
    fresh = placed.cumsum(dim=1)[:, start:]
    return Past(settings.seen[:, None] | (fresh > 0), settings.counts[:, None] + fresh)


def _penalise(scores: Tensor, settings: Settings, past: Past) -> Tensor:
    counts, rate = past.counts.to(torch.float64), settings.repetition[:, None, None]
    scores = torch.where(past.seen, torch.where(scores > 0, scores / rate, scores * rate), scores)
    scores = scores - settings.frequency[:, None, None] * counts
    return scores - settings.presence[:, None, None] * (past.counts > 0)


def _divisor(settings: Settings) -> Tensor:
    """The temperature [B, 1, 1]; 1 for greedy slots."""
    return torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None, None]


def filtered(scores: Tensor, settings: Settings, features: Features) -> Tensor:
    """-inf for what top-k, top-p and min-p drop, as `law.law` does it; the others as they were."""
    if not features.filtered:
        return scores
    scaled = scores / _divisor(settings)
    if features.ranked:
        dropped = _past_rank(scaled, settings)
        scores, scaled = scores.masked_fill(dropped, NEVER), scaled.masked_fill(dropped, NEVER)
    probabilities = scaled.softmax(dim=-1)
    floor = settings.min_p[:, None, None] * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < floor, NEVER)


def _past_rank(scaled: Tensor, settings: Settings) -> Tensor:
    """Which tokens top-k, then top-p drop: bool [B, R, V]."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    kth = ordered.gather(2, (settings.top_k - 1)[:, None, None].expand(-1, ordered.shape[1], 1))
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    probabilities = ordered.softmax(dim=-1)
    before_it = probabilities.cumsum(dim=-1) - probabilities
    drop = (before_it >= settings.top_p[:, None, None]) | (ordered < kth)
    return torch.zeros_like(drop).scatter(2, order, drop)


def softened(scores: Tensor, settings: Settings) -> Tensor:
    """Log-probabilities at the slots' temperatures; at temperature 1 for greedy slots."""
    return (scores / _divisor(settings)).log_softmax(dim=-1)


def point_law(scores: Tensor, settings: Settings) -> Tensor:
    """`softened`, with the point mass on the argmax for greedy slots."""
    point = torch.full_like(scores, NEVER, dtype=torch.float64).scatter(2, scores.argmax(dim=-1, keepdim=True), 0.0)
    return torch.where(settings.temperature[:, None, None] > 0, softened(scores, settings), point)


def batch_law(logits: Tensor, settings: Settings, features: Features, first: Tensor, drafts: Tensor) -> Tensor:
    """Log-probabilities float64 [B, R, V] of rows `logits` [B, R, V]; row r comes after `drafts` [B, R - 1] up to r."""
    return point_law(adjusted(logits, settings, features, first, drafts), settings)
