"""`verify`, `draft`, `logprobs`: which drafts stand, what comes after them, and the next drafts.

Three rules, slot by slot; all of them choose by the slots' `Law`.

    coupled   A draft stands where it equals the AR token argmax(log p + noise). The output is that
              of AR decoding, whatever the drafts.
    ratio     Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192): a draft, sampled from
              q, stands with probability min(1, p / q); a sample of normalise(max(0, p - q))
              replaces it. p and q are both filtered. The output has AR's law, not its sample path.
    relaxed   APPROXIMATE: as coupled, and a draft stands too where its probability is at least tau
              times the largest.

Shapes: B slots, R rows, K drafts, V logit columns. `first` int64 [B] is the position of the token
that row 0 gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.decoding.law import Law, positions, restrict
from idlm.decoding.noise import Stream, gumbel, uniform
from idlm.decoding.settings import RATIO

Allow = Callable[[Tensor], Tensor]
"""Guides: from the drafts so far, int64 [B, k], the tokens that may come next, bool [B, 1, V]."""


class Drafts(NamedTuple):
    """Drafts to verify.

    Attributes:
        tokens: int64 [B, K], ids below V where valid.
        valid: int64 [B], how many of them count; the token after all of those is a bonus.
        log_q: float64 [B, K, V], the laws that `draft` drew them from; for the ratio rule.
    """

    tokens: Tensor
    valid: Tensor
    log_q: Tensor | None = None


class Verdicts(NamedTuple):
    """The outcome of one window of each slot.

    Attributes:
        accepted: int64 [B], the drafts that stand.
        tokens: int64 [B, 1 + K], what is committed: the drafts that stand, then a correction, or
            the bonus where all stand; the rest has no meaning.
        log_p: float64 [B, 1 + K, V], the law of the verify rows, where a rule needed it.
    """

    accepted: Tensor
    tokens: Tensor
    log_p: Tensor | None


class Logprobs(NamedTuple):
    """Reported log-probabilities.

    Attributes:
        chosen: float64 [B, R], of the tokens themselves.
        rank: int64 [B, R], 1 + the number of likelier tokens.
        values: float64 [B, R, top], the largest.
        ids: int64 [B, R, top], whose they are.
    """

    chosen: Tensor
    rank: Tensor
    values: Tensor
    ids: Tensor


def verify(law: Law, logits: Tensor, drafts: Drafts, first: Tensor) -> Verdicts:
    """Judge each slot's drafts by its own rule; `logits` [B, 1 + K, V] are the verify rows."""
    scores = law.scores(logits, first, drafts.tokens)
    tokens = law.choose(scores, Stream.TOKEN, first)
    if law.features.ratio or law.features.relaxed:
        return _judge(law, law.log_p(scores), tokens, drafts, first)
    accepted = _leading(tokens[:, :-1] == drafts.tokens, drafts.valid)
    return Verdicts(accepted, tokens, None)


def _judge(law: Law, log_p: Tensor, tokens: Tensor, drafts: Drafts, first: Tensor) -> Verdicts:
    """The verdicts where a slot uses another rule than coupled, whose are `tokens` [B, 1 + K]."""
    settings, features, log_q = law.settings, law.features, drafts.log_q
    drafted = drafts.tokens.clamp(0, settings.vocab_size - 1)
    stand = tokens[:, :-1] == drafts.tokens
    chosen = _pick(log_p[:, :-1], drafted)
    if features.relaxed:
        stand |= chosen >= log_p[:, :-1].amax(dim=-1) + settings.log_tau[:, None]
    by_ratio = settings.rule == RATIO
    if features.ratio and log_q is not None:
        chance = uniform(settings.keys[:, Stream.ACCEPT], positions(first, drafted.shape[1]))
        below = chance.log() < chosen - _pick(log_q, drafted)
        stand = torch.where(by_ratio[:, None], below, stand)
    accepted = _leading(stand, drafts.valid)
    token = tokens.gather(1, accepted[:, None])
    if features.ratio and log_q is not None:
        at = accepted[:, None, None].expand(-1, 1, log_p.shape[2])
        p, q = log_p.gather(1, at)[:, 0], log_q.gather(1, at.clamp(max=log_q.shape[1] - 1))[:, 0]
        # the bonus has no q
        rest = torch.where((accepted < drafts.valid)[:, None], residual(p, q), p)
        other = _sample(law, rest, (first + accepted)[:, None])
        token = torch.where(by_ratio[:, None], other, token)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    committed = torch.cat([drafted, token], dim=1)
    return Verdicts(accepted, torch.where(place == accepted[:, None], token, committed), log_p)


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log of max(0, p - q), not normalised, [B, V].

    A row where rounding leaves nothing (p = q up to an ulp, so that a rejection has probability 0
    but for rounding) falls back to p.
    """
    left = (log_p.exp() - log_q.exp()).clamp(min=0)
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left.log(), log_p)


def _sample(law: Law, log_p: Tensor, at: Tensor) -> Tensor:
    """A token [B, 1] of log-probabilities [B, V] for the positions `at` [B, 1]."""
    settings = law.settings
    noise = gumbel(settings.keys[:, Stream.TOKEN], at, settings.steps)[:, 0]
    scores = torch.where(settings.temperature[:, None] > 0, log_p + noise, log_p)
    return scores.argmax(dim=-1, keepdim=True)


def draft(
    law: Law,
    logits: Tensor,
    first: Tensor,
    allow: Allow | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw K drafts from the mask rows `logits` [B, K, V]; `first` is the first draft's position.

    The tokens before them must have been recorded (`Settings.record`); each draft's penalties count
    the drafts before it, and `allow` is asked before each.

    Returns:
        The drafts, int64 [B, K], and the laws they were drawn from, float64 [B, K, V], where the
        ratio rule is in use.
    """
    if law.features.penalised or allow is not None:
        return _draft_in_turn(law, logits, first, allow)
    scores = law.scores(logits, first)
    tokens = law.choose(scores, Stream.DRAFT, first)
    return tokens, law.log_p(scores) if law.features.ratio else None


def _draft_in_turn(
    law: Law,
    logits: Tensor,
    first: Tensor,
    allow: Allow | None,
) -> tuple[Tensor, Tensor | None]:
    drafts = first.new_empty(first.shape[0], 0)
    laws: list[Tensor] = []
    for k in range(logits.shape[1]):
        row = logits[:, k : k + 1]
        row = row if allow is None else restrict(row, allow(drafts))
        scores = law.scores(row, first + k, drafts)
        drafts = torch.cat([drafts, law.choose(scores, Stream.DRAFT, first + k)], dim=1)
        laws += [law.log_p(scores)] if law.features.ratio else []
    return drafts, torch.cat(laws, dim=1) if laws else None


def logprobs(law: Law, logits: Tensor, tokens: Tensor, first: Tensor, top: int) -> Logprobs:
    """What is reported of `tokens` [B, R], given by rows `logits` [B, R, V] after one another.

    Under the verification law; at temperature 0, where that is a point mass, under the adjusted
    logits at temperature 1. To be called before the tokens are recorded.
    """
    log_p = law.soft_log_p(law.scores(logits, first, tokens[:, :-1]))
    chosen = _pick(log_p, tokens.clamp(0, law.settings.vocab_size - 1))
    rank = (log_p > chosen[..., None]).sum(dim=-1) + 1
    values, ids = log_p.topk(top, dim=-1)
    return Logprobs(chosen, rank, values, ids)


def _pick(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each row [B, R, V] at its token [B, R]."""
    return rows.gather(2, tokens[..., None])[..., 0]


def _leading(stand: Tensor, valid: Tensor) -> Tensor:
    """The length of each row's run of True from its start, `valid` [B] at most; `stand` [B, K]."""
    depth = torch.arange(stand.shape[1], device=stand.device)
    return (stand & (depth < valid[:, None])).cumprod(dim=1).sum(dim=1)
