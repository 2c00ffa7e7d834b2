"""The laws p and q of a text's tokens, for AR models and I-DLMs; `baselines.rereading` has others.

Shapes: L tokens of a text, n of its answer, K draft depths, V logit columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.decoding.lookup import look_up
from idlm.models.gate import NO_ROWS
from idlm.models.heads import RowsBefore, corrected
from idlm.models.idlm_model import Idlm

Law = Callable[[Tensor], Tensor]
"""From logits [n, V] to log-probabilities, float64 [n, V]: `baselines.written.law_of`."""


class Pairs(NamedTuple):
    """Tokens [n], each with its depth from 1 [n], and the logs of p and q, float64 [n, V]."""

    tokens: Tensor
    depth: Tensor
    log_p: Tensor
    log_q: Tensor


PLACES = 16
"""Places of a text where an AR model's law is computed once more."""
LOOKED_UP = 256
"""Places that are looked up at once."""


@torch.inference_mode()
def causal_logits(idlm: Idlm, tokens: Sequence[int]) -> Tensor:
    """Logits [L, V] of a text under the causal mask, whose row k says token k + 1."""
    text = torch.tensor(tokens, device=idlm.device)
    position = torch.arange(len(text), device=idlm.device)
    seen = position <= position[:, None]
    return idlm.head(idlm.hidden(text[None], position[None], seen[None, None]))[0].cpu()


def ar_pairs(idlm: Idlm, tokens: Sequence[int], first: int, law: Law) -> Pairs:
    """AR: q is the law that wrote a token, from the text before it alone; p is that of one forward
    over the whole text. At most `PLACES` places of the answer, evenly spaced."""
    count = min(PLACES, len(tokens) - first)
    at = torch.linspace(first, len(tokens) - 1, count).round().long()
    log_p = law(causal_logits(idlm, tokens)[at - 1])
    written = [causal_logits(idlm, tokens[: int(place)])[-1] for place in at]
    found = torch.tensor(tokens)[at]
    return Pairs(found, torch.ones_like(at), log_p, law(torch.stack(written)))


def draft_pairs(idlm: Idlm, tokens: Sequence[int], first: int, drafts: int, law: Law) -> Pairs:
    """I-DLM: q is the law of each depth's MASK row, p that of the row before the token.

    A window may begin anywhere in the answer, so each token is drafted at every depth, but for the
    first ones. The drafts before one are the text's own tokens, as they are wherever it counts.
    """
    log_p = law(causal_logits(idlm, tokens))
    parts = [_phase(idlm, tokens, first, drafts, phase) for phase in range(drafts)]
    column, depth, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    text = torch.tensor(tokens)
    return Pairs(text[column + 1], depth, log_p[column], law(logits))


def lookup_pairs(idlm: Idlm, tokens: Sequence[int], first: int, drafts: int, law: Law) -> Pairs:
    """Lookup drafts: q is a point mass on the draft, p that of the row before it.

    The text is looked up at every token of the answer. A draft counts where the drafts before it
    are the text's own tokens, so that it would be reached; where nothing matches there is none.
    """
    text, log_p = torch.tensor(tokens), law(causal_logits(idlm, tokens))
    parts = []
    for length in torch.arange(first + 1, len(tokens)).split(LOOKED_UP):
        found = look_up(text.expand(len(length), -1), length, drafts)
        place = length[:, None] + torch.arange(drafts)
        right = found.drafts == text[place.clamp(max=len(tokens) - 1)]
        reached = torch.cat([right.new_ones(len(length), 1), right[:, :-1]], 1).cumprod(1).bool()
        counts = reached & (place < len(tokens)) & (found.matched > 0)[:, None]
        depth = torch.arange(1, drafts + 1).expand_as(place)
        parts.append(torch.stack([found.drafts[counts], depth[counts], place[counts]]))
    token, depth, place = torch.cat(parts, 1)
    log_q = torch.full((len(token), log_p.shape[1]), -torch.inf, dtype=torch.float64)
    return Pairs(token, depth, log_p[place - 1], log_q.scatter(1, token[:, None], 0.0))


@torch.inference_mode()
def _phase(
    idlm: Idlm, tokens: Sequence[int], first: int, drafts: int, phase: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The MASK rows of the windows that begin at first + phase, + K, ...: their columns [m], their
    depths from 1 [m], and their logits [m, V]. A row predicts the token after its column."""
    size = len(tokens)
    column = torch.arange(first + phase, size - 1)
    depth = (column - first - phase) % drafts
    text, index = torch.tensor(tokens), torch.arange(size)
    rows = torch.cat([text, torch.full_like(column, idlm.mask_id)])[None]
    position = torch.cat([index, column])[None]
    start = column - depth
    of_text = torch.cat([index <= index[:, None], index < start[:, None]])
    same = (start == start[:, None]) & (column <= column[:, None])
    of_masks = torch.cat([torch.zeros(size, len(column), dtype=torch.bool), same])
    visible = torch.cat([of_text, of_masks], 1)[None, None]
    masks = slice(size, size + len(column)) if len(column) else NO_ROWS
    where = idlm.device
    hidden = idlm.hidden(rows.to(where), position.to(where), visible.to(where), masks)[0, size:]
    logits = idlm.head(hidden)
    if (head := idlm.draft_heads.get(0)) is not None:
        before = RowsBefore(logits, hidden, text[column].to(where))
        logits = corrected(idlm.model, head, before)
    return column, depth + 1, logits.cpu()
