"""`verify`, `draft`, `logprobs`: accept drafts, commit the token after them, draw the next drafts.

Each slot uses one of three rules, on the probabilities of its `Law`:

    coupled   Accept a draft if it equals the AR token argmax(log p + noise). The output is that of
              AR decoding, whatever the drafts are.
    ratio     Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192). A draft is sampled
              from q and accepted with probability min(1, p / q); the correction is a sample of
              normalise(max(0, p - q)). p and q are both filtered. The output has the distribution
              of AR decoding, not its sample path.
    relaxed   APPROXIMATE. Accept as coupled does, and also if the probability of the draft is at
              least tau times the largest.

Shapes: B slots, R rows, K drafts, V logit columns. `position` int64 [B] is the position of the
token that row 0 gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.decoding.law import Law, positions, restrict
from idlm.decoding.noise import Stream, gumbel, uniform
from idlm.decoding.settings import NEVER, RATIO

NOTHING = -1
"""Stands for a token where the request's bans leave none."""
Allow = Callable[[Tensor], Tensor]
"""A guide: maps the drafts so far, int64 [B, k], to the tokens that may follow, bool [B, 1, V]."""

Chain = Callable[[Tensor], Tensor]
"""A draft head: maps the drafts so far, int64 [B, k], to the logits [B, 1, V] of the next one."""


class Drafts(NamedTuple):
    """Drafts to verify.

    Attributes:
        tokens: int64 [B, K], ids below V where valid.
        valid: int64 [B], the number of valid drafts; the token after all of them is a bonus.
        log_q: float64 [B, K, V], the laws that `draft` sampled from; only for the ratio rule.
    """

    tokens: Tensor
    valid: Tensor
    log_q: Tensor | None = None


class Verdicts(NamedTuple):
    """The outcome of one window of each slot.

    Attributes:
        accepted: int64 [B], the number of accepted drafts.
        tokens: int64 [B, 1 + K], the tokens to commit: the accepted drafts, then the correction,
            or the bonus if all are accepted; `NOTHING` if the law leaves no token there. Entries
            past that have no meaning.
        log_p: float64 [B, 1 + K, V], the law of the verify rows; None if no rule needed it.
    """

    accepted: Tensor
    tokens: Tensor
    log_p: Tensor | None


class Logprobs(NamedTuple):
    """Log-probabilities that a request asked for.

    Attributes:
        chosen: float64 [B, R], those of the tokens themselves.
        rank: int64 [B, R], 1 + the number of likelier tokens.
        values: float64 [B, R, top], the largest of each row.
        ids: int64 [B, R, top], the tokens of `values`.
    """

    chosen: Tensor
    rank: Tensor
    values: Tensor
    ids: Tensor


def verify(law: Law, logits: Tensor, drafts: Drafts, position: Tensor) -> Verdicts:
    """Verify each slot's drafts by its own rule; `logits` [B, 1 + K, V] are the verify rows."""
    scores = law.scores(logits, position, drafts.tokens)
    tokens = law.choose(scores, Stream.TOKEN, position)  # [B, 1 + K], the AR tokens
    if law.features.banning:
        tokens = tokens.masked_fill(scores.amax(dim=-1) == NEVER, NOTHING)
    if law.features.ratio or law.features.relaxed:
        return _verify_by_rule(law, law.log_p(scores), tokens, drafts, position)
    # the tokens before the first mismatch are the accepted drafts, so `tokens` is the answer
    accepted = _leading(tokens[:, :-1] == drafts.tokens, drafts.valid)
    return Verdicts(accepted, tokens, None)


def _verify_by_rule(
    law: Law, log_p: Tensor, tokens: Tensor, drafts: Drafts, position: Tensor
) -> Verdicts:
    """Verify a batch in which a slot uses the ratio or the relaxed rule.

    `log_p` [B, 1 + K, V] is the law of the verify rows, `tokens` [B, 1 + K] are the AR tokens, or
    `NOTHING`: no rule accepts a draft there, or puts a token in its place.
    """
    settings, features, log_q = law.settings, law.features, drafts.log_q
    drafted = drafts.tokens.clamp(0, settings.vocab_size - 1)  # entries past `valid` may be any
    accept = tokens[:, :-1] == drafts.tokens  # [B, K], by the coupled rule
    log_p_drafted = _pick(log_p[:, :-1], drafted)  # [B, K]
    if features.relaxed:  # log_tau is inf for slots of the other rules
        accept |= log_p_drafted >= log_p[:, :-1].amax(dim=-1) + settings.log_tau[:, None]
    by_ratio = settings.rule == RATIO
    if features.ratio and log_q is not None:
        draws = uniform(settings.keys[:, Stream.ACCEPT], positions(position, drafted.shape[1]))
        below_ratio = draws.log() < log_p_drafted - _pick(log_q, drafted)
        accept = torch.where(by_ratio[:, None], below_ratio, accept)
    accepted = _leading(accept & (tokens[:, :-1] != NOTHING), drafts.valid)
    token = tokens.gather(1, accepted[:, None])  # [B, 1], the correction or the bonus
    if features.ratio and log_q is not None:
        # the laws [B, V] of the position after the accepted drafts; a bonus has no q
        at = accepted[:, None, None].expand(-1, 1, log_p.shape[2])
        p, q = log_p.gather(1, at)[:, 0], log_q.gather(1, at.clamp(max=log_q.shape[1] - 1))[:, 0]
        target = torch.where((accepted < drafts.valid)[:, None], residual(p, q), p)
        sampled = _sample(law, target, (position + accepted)[:, None])
        token = torch.where(by_ratio[:, None] & (token != NOTHING), sampled, token)
    depth = torch.arange(tokens.shape[1], device=tokens.device)
    committed = torch.cat([drafted, token], dim=1)
    return Verdicts(accepted, torch.where(depth == accepted[:, None], token, committed), log_p)


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log of max(0, p - q), not normalised, [B, V].

    A row without any mass left falls back to p. Then p = q up to rounding, and a rejection has
    probability 0 but for rounding.
    """
    mass = (log_p.exp() - log_q.exp()).clamp(min=0)
    return torch.where(mass.sum(dim=-1, keepdim=True) > 0, mass.log(), log_p)


def _sample(law: Law, log_p: Tensor, at: Tensor) -> Tensor:
    """Sample a token [B, 1] of `log_p` [B, V] with the noise of the positions `at` [B, 1]."""
    settings = law.settings
    noise = gumbel(settings.keys[:, Stream.TOKEN], at, settings.steps)[:, 0]
    scores = torch.where(settings.temperature[:, None] > 0, log_p + noise, log_p)
    return scores.argmax(dim=-1, keepdim=True)


def draft(
    law: Law,
    logits: Tensor,
    position: Tensor,
    allow: Allow | None = None,
    chain: Chain | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw K drafts from the MASK rows `logits` [B, K, V]; `position` is that of draft 1.

    The tokens before them must be recorded (`Settings.record`). The penalties and bad words of a
    draft count the drafts before it, and `allow` and `chain` are called before each. The logits of
    `chain` take the place of `logits`.

    Returns:
        The drafts, int64 [B, K], and the laws that they were sampled from, float64 [B, K, V]; None
        if no slot uses the ratio rule.
    """
    if chain is not None or law.features.historic or allow is not None:
        return _draft_in_turn(law, logits, position, allow, chain)
    scores = law.scores(logits, position)
    tokens = law.choose(scores, Stream.DRAFT, position)
    return tokens, law.log_p(scores) if law.features.ratio else None


def _draft_in_turn(
    law: Law,
    logits: Tensor,
    position: Tensor,
    allow: Allow | None,
    chain: Chain | None,
) -> tuple[Tensor, Tensor | None]:
    """`draft`, depth by depth: the law of each draft depends on the drafts before it."""
    drafts = position.new_empty(position.shape[0], 0)
    laws: list[Tensor] = []
    for k in range(logits.shape[1]):
        row = logits[:, k : k + 1] if chain is None else chain(drafts)
        row = row if allow is None else restrict(row, allow(drafts))
        scores = law.scores(row, position + k, drafts)
        drafts = torch.cat([drafts, law.choose(scores, Stream.DRAFT, position + k)], dim=1)
        laws += [law.log_p(scores)] if law.features.ratio else []
    return drafts, torch.cat(laws, dim=1) if laws else None


def logprobs(law: Law, logits: Tensor, tokens: Tensor, position: Tensor, top: int) -> Logprobs:
    """Log-probabilities to report of the consecutive `tokens` [B, R] of rows `logits` [B, R, V].

    They are those of the verification law. At temperature 0 that law is a point mass, so they are
    those of the adjusted logits at temperature 1. Call this before the tokens are recorded.
    """
    return report(law.soft_log_p(law.scores(logits, position, tokens[:, :-1])), tokens, top)


def report(log_p: Tensor, tokens: Tensor, top: int) -> Logprobs:
    """The entries of `log_p` [B, R, V] for the `tokens` [B, R] and the `top` likeliest ones."""
    chosen = _pick(log_p, tokens.clamp(0, log_p.shape[-1] - 1))
    rank = (log_p > chosen[..., None]).sum(dim=-1) + 1
    values, ids = log_p.topk(top, dim=-1)
    return Logprobs(chosen, rank, values, ids)


def _pick(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each row [B, R, V] at its token [B, R]."""
    return rows.gather(2, tokens[..., None])[..., 0]


def _leading(accept: Tensor, valid: Tensor) -> Tensor:
    """The number [B] of leading drafts that are accepted: the run of True at the start of `accept`
    [B, K], cut at `valid` [B]."""
    depth = torch.arange(accept.shape[1], device=accept.device)
    return (accept & (depth < valid[:, None])).cumprod(dim=1).sum(dim=1)
