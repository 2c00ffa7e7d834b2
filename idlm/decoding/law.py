"""`law`: the one place where logits become the probabilities that tokens are chosen by.

Verification, the bonus token, drafts and reported log-probabilities all call it, so the two laws of a draft (p of the
row that verifies it, q of the mask that proposed it) are filtered alike.

Shapes: R rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.params import SamplingParams

NEVER = float("-inf")


@dataclass(frozen=True)
class History:
    """The tokens before each row, as the penalties see them.

    Attributes:
        seen: bool [R, V], the token is in the prompt or in the output before the row.
        counts: int64 [R, V], how often the token is in the output before the row.
    """

    seen: Tensor
    counts: Tensor


def history(prompt: Sequence[int], output: Sequence[int], drafts: Sequence[int], vocab_size: int) -> History:
    """The history of 1 + len(drafts) rows: row k comes after `prompt`, `output` and the first k drafts.

    A prompt may hold ids past the logit columns (an added MASK row never does): they have no logit to penalise.
    """
    counts = torch.zeros(1 + len(drafts), vocab_size, dtype=torch.int64)
    counts[:] = torch.bincount(torch.tensor(list(output), dtype=torch.int64), minlength=vocab_size)
    for k, draft in enumerate(drafts):
        counts[k + 1 :, draft] += 1
    seen = counts > 0
    seen[:, list(prompt)] = True
    return History(seen, counts)


def adjust(
    logits: Tensor,
    params: SamplingParams,
    before: History | None = None,
    mask_id: int | None = None,
    held_back: Iterable[int] = (),
    allowed: Tensor | None = None,
) -> Tensor:
    """Logits [R, V] after penalties, logit bias and bans, in at least float32; greedy decoding takes their argmax.

    The penalties are those of vLLM and the OpenAI API: repetition counts prompt and output, presence and frequency the
    output alone. `mask_id` is banned wherever it has a column, and so is `held_back`: the stop ids of a request that
    has fewer than `min_tokens` tokens. `allowed`, bool [V] or [R, V], is what the request's guide lets through.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if params.penalised:
        if before is None:
            raise ValueError("penalties need the history of the rows")
        scores = _penalise(scores, params, before)
    for token, bias in params.logit_bias.items():
        scores[:, token] += bias
    banned = [*params.banned_tokens, *held_back]
    if mask_id is not None and mask_id < scores.shape[-1]:
        banned.append(mask_id)
    scores[:, banned] = NEVER
    return scores if allowed is None else restrict(scores, allowed)


def restrict(scores: Tensor, allowed: Tensor) -> Tensor:
    """-inf for all but the tokens `allowed`, bool, broadcastable to the scores.

    Nothing that `adjust` does makes -inf another number, so logits may as well be restricted before it.
    """
    return scores.masked_fill(~allowed, NEVER)


def _penalise(scores: Tensor, params: SamplingParams, before: History) -> Tensor:
    # counts in the scores' own type: a Python number times an integer tensor would be rounded to float32
    seen, counts = before.seen.to(scores.device), before.counts.to(scores)
    rate = params.repetition_penalty
    scores = torch.where(seen, torch.where(scores > 0, scores / rate, scores * rate), scores)
    return scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def law(
    logits: Tensor,
    params: SamplingParams,
    before: History | None = None,
    mask_id: int | None = None,
    held_back: Iterable[int] = (),
    allowed: Tensor | None = None,
) -> Tensor:
    """Log-probabilities [R, V] that tokens are chosen by; -inf for a token that cannot come out.

    In order: penalties, logit bias, bans, guide; temperature; top-k, top-p, min-p (each on what is left); normalise.
    Temperature 0 is the point mass on the argmax (the lowest id among equals).
    """
    scores = adjust(logits, params, before, mask_id, held_back, allowed)
    if params.greedy:
        point = torch.full_like(scores, NEVER)
        return point.scatter_(1, scores.argmax(dim=-1, keepdim=True), 0.0)
    scores = scores / params.temperature
    if params.top_k > 0:
        scores = _top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = _top_p(scores, params.top_p)
    if params.min_p > 0:
        probabilities = scores.softmax(dim=-1)
        floor = params.min_p * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < floor, NEVER)
    return scores.log_softmax(dim=-1)


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k likeliest; tokens equal to the k-th stay too, so that no sort decides between equals."""
    kth = scores.topk(min(k, scores.shape[-1]), dim=-1).values[:, -1:]
    return scores.masked_fill(scores < kth, NEVER)


def _top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the shortest run of likeliest tokens whose probability reaches p; the likeliest always stays."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before_it = probabilities.cumsum(dim=-1) - probabilities
    drop = before_it >= p
    drop[:, 0] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), NEVER)
