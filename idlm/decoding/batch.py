"""The law, verification and drafting of many requests at once: `law`, `verify` and the oracle's drafting, vectorised.

Every slot has its own settings. Nothing here looks at a value on the host, so a step can be recorded and replayed.

Tokens are chosen by argmax(scores + temperature * noise), with scores the adjusted logits that the filters left: the
same argmax as that of the law plus noise, without a normalisation, and the same numbers whatever the other slots need.

Shapes: B slots, R rows, K drafts, V logit columns. `first` int64 [B] is the position of the token that row 0 gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.decoding.batch_law import adjust, adjusted, filtered, past_of, point_law, positions, softened
from idlm.decoding.batch_noise import gumbel_rows, uniform_rows
from idlm.decoding.law import restrict
from idlm.decoding.noise import Stream
from idlm.decoding.settings import NEVER, RATIO, Features, Settings

Chooser = Callable[[Tensor, Tensor | None, Settings, bool, Stream, Tensor], Tensor]
"""`choose`, or a kernel that does the same."""
Allow = Callable[[Tensor], Tensor]
"""The guides of a batch: from the drafts so far, int64 [B, k], the tokens that may come next, bool [B, 1, V]."""


class Verdicts(NamedTuple):
    """The outcome of one window of each slot.

    Attributes:
        accepted: int64 [B], the drafts that stand.
        token: int64 [B], the token after them.
        tokens: int64 [B, 1 + K], what is committed: the drafts that stand, then `token`; the rest has no meaning.
        log_p: float64 [B, 1 + K, V], the law of the verify rows, where a rule needed it.
    """

    accepted: Tensor
    token: Tensor
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


def choose(
    logits: Tensor, bias: Tensor | None, settings: Settings, sampled: bool, stream: Stream, first: Tensor
) -> Tensor:
    """A token of each row: argmax(logits + bias + temperature * noise), the lowest id among equals, never MASK.

    Args:
        logits: [B, R, V].
        bias: `settings.bias` or None.
        settings: of the slots; only temperature, keys and MASK are read.
        sampled: False where every slot is greedy.
        stream: of the noise; TOKEN or DRAFT.
        first: int64 [B].

    Returns:
        int64 [B, R].
    """
    scores = logits if bias is None else logits + bias[:, None]
    if sampled:
        noise = gumbel_rows(settings.keys[:, stream], positions(first, logits.shape[1]), settings.steps)
        scores = noise.mul_(settings.temperature[:, None, None]).add_(scores)
    if bias is None and settings.mask_id < settings.vocab_size:
        scores = scores if sampled else scores.clone()
        scores[..., settings.mask_id] = NEVER
    return scores.argmax(dim=-1)


def verify(
    logits: Tensor,
    drafts: Tensor,
    valid: Tensor,
    log_q: Tensor | None,
    settings: Settings,
    features: Features,
    first: Tensor,
    chooser: Chooser = choose,
) -> Verdicts:
    """Judge each slot's drafts by its own rule.

    Args:
        logits: [B, 1 + K, V], the verify rows.
        drafts: int64 [B, K], ids below V where valid.
        valid: int64 [B], how many of the drafts count; none past them is accepted, and the token after all of them
            is a bonus, not a correction.
        log_q: float64 [B, K, V], the laws they were drawn from, as `draft` gave them; for the ratio rule.
        settings: of the slots.
        features: `settings.features`.
        first: int64 [B].
        chooser: what chooses tokens.
    """
    scores = _scores(logits, settings, features, first, drafts)
    tokens = chooser(scores, _bias(settings, features), settings, features.sampled, Stream.TOKEN, first)
    if not (features.ratio or features.relaxed):
        accepted = _leading(tokens[:, :-1] == drafts, valid)
        return Verdicts(accepted, tokens.gather(1, accepted[:, None])[:, 0], tokens, None)
    return _judge(point_law(scores, settings), tokens, drafts, valid, log_q, settings, features, first)


def _judge(
    log_p: Tensor,
    tokens: Tensor,
    drafts: Tensor,
    valid: Tensor,
    log_q: Tensor | None,
    settings: Settings,
    features: Features,
    first: Tensor,
) -> Verdicts:
    """The verdicts where some slots use the ratio or the relaxed rule; `tokens` are the coupled rule's."""
    stand = tokens[:, :-1] == drafts
    drafts = drafts.clamp(0, settings.vocab_size - 1)
    chosen = _pick(log_p[:, :-1], drafts)
    if features.relaxed:
        stand |= chosen >= log_p[:, :-1].amax(dim=-1) + settings.log_tau[:, None]
    if features.ratio and log_q is not None:
        chance = uniform_rows(settings.keys[:, Stream.ACCEPT], positions(first, drafts.shape[1]))
        stand = torch.where(settings.rule[:, None] == RATIO, chance.log() < chosen - _pick(log_q, drafts), stand)
    accepted = _leading(stand, valid)
    token = tokens.gather(1, accepted[:, None])[:, 0]
    if features.ratio and log_q is not None:
        token = torch.where(settings.rule == RATIO, _replace(log_p, log_q, accepted, valid, settings, first), token)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    committed = torch.cat([drafts, token[:, None]], dim=1)
    return Verdicts(accepted, token, torch.where(place == accepted[:, None], token[:, None], committed), log_p)


def draft(
    logits: Tensor,
    settings: Settings,
    features: Features,
    first: Tensor,
    chooser: Chooser = choose,
    allow: Allow | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw K drafts from the mask rows `logits` [B, K, V]; `first` is the first draft's position.

    The tokens before them must have been recorded (`Settings.record`); each draft counts those before it. `allow` is
    asked before each draft.

    Returns:
        The drafts, int64 [B, K], and the laws they were drawn from, float64 [B, K, V], where the ratio rule is in use.
    """
    if features.penalised or allow is not None:
        return _draft_in_turn(logits, settings, features, first, chooser, allow)
    scores = _scores(logits, settings, features, first, None)
    tokens = chooser(scores, _bias(settings, features), settings, features.sampled, Stream.DRAFT, first)
    return tokens, point_law(scores, settings) if features.ratio else None


def _draft_in_turn(
    logits: Tensor, settings: Settings, features: Features, first: Tensor, chooser: Chooser, allow: Allow | None
) -> tuple[Tensor, Tensor | None]:
    drafts = first.new_empty(first.shape[0], 0)
    laws: list[Tensor] = []
    for k in range(logits.shape[1]):
        row = logits[:, k : k + 1]
        row = row if allow is None else restrict(row, allow(drafts))
        past = past_of(settings, drafts, k, k + 1) if features.penalised else None
        scores = filtered(adjust(row, settings, features, first + k, past), settings, features)
        token = chooser(scores, None, settings, features.sampled, Stream.DRAFT, first + k)
        drafts = torch.cat([drafts, token], dim=1)
        laws += [point_law(scores, settings)] if features.ratio else []
    return drafts, torch.cat(laws, dim=1) if laws else None


def logprobs(
    logits: Tensor, tokens: Tensor, settings: Settings, features: Features, first: Tensor, top: int
) -> Logprobs:
    """What is reported of `tokens` [B, R], given by rows `logits` [B, R, V] after one another.

    Under the verification law; at temperature 0, where that is a point mass, under the adjusted logits at
    temperature 1. To be called before the tokens are recorded.
    """
    log_p = softened(adjusted(logits, settings, features, first, tokens[:, :-1]), settings)
    chosen = _pick(log_p, tokens.clamp(0, settings.vocab_size - 1))
    rank = (log_p > chosen[..., None]).sum(dim=-1) + 1
    values, ids = log_p.topk(top, dim=-1)
    return Logprobs(chosen, rank, values, ids)


def _pick(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each row [B, R, V] at its token [B, R]."""
    return rows.gather(2, tokens[..., None])[..., 0]


def _leading(stand: Tensor, valid: Tensor) -> Tensor:
    """The length of the run of True at the start of each row of `stand` [B, K], `valid` [B] at most."""
    depth = torch.arange(stand.shape[1], device=stand.device)
    return (stand & (depth < valid[:, None])).cumprod(dim=1).sum(dim=1)


def _bias(settings: Settings, features: Features) -> Tensor | None:
    """The bias that is left to `choose`, since `_scores` did not need it."""
    return settings.bias if features.biased and features.choice_only else None


def _scores(logits: Tensor, settings: Settings, features: Features, first: Tensor, drafts: Tensor | None) -> Tensor:
    """What `choose` starts from: adjusted and filtered logits of rows that come after `drafts` up to each.

    Where the choice needs no more than a bias, the logits themselves.
    """
    return logits if features.choice_only else adjusted(logits, settings, features, first, drafts)


def _replace(
    log_p: Tensor, log_q: Tensor, accepted: Tensor, valid: Tensor, settings: Settings, first: Tensor
) -> Tensor:
    """The ratio rule's token [B] after the accepted drafts: of max(0, p - q) after a rejection, of p after none."""
    at = accepted[:, None, None].expand(-1, 1, log_p.shape[2])
    p = log_p.gather(1, at)[:, 0]
    q = log_q.gather(1, at.clamp(max=log_q.shape[1] - 1))[:, 0]
    left = (p.exp() - q.exp()).clamp(min=0)
    # as `verify.residual`: a row where rounding leaves nothing falls back to p, and so does the bonus, which has no q
    corrected = (accepted < valid)[:, None] & (left.sum(dim=-1, keepdim=True) > 0)
    rest = torch.where(corrected, left.log(), p)
    noise = gumbel_rows(settings.keys[:, Stream.TOKEN], (first + accepted)[:, None], settings.steps)[:, 0]
    return torch.where(settings.temperature[:, None] > 0, rest + noise, rest).argmax(dim=-1)
