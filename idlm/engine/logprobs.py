"""Log-probabilities for callers: those a step brings along, and those of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from idlm.decoding.law import law
from idlm.engine.prefill import Chunk
from idlm.engine.request import Logprob, Request
from idlm.engine.step import Outcome
from idlm.models.idlm_model import Idlm


def logprob_entries(outcome: Outcome, row: int, request: Request) -> list[dict[int, Logprob]]:
    """For each token of a row of a step: itself, then the likeliest ones the request asked for."""
    top = request.params.logprobs
    if top is None or not outcome.logprobs:
        return []
    chosen, rank, values, ids = (tensor[row].tolist() for tensor in outcome.logprobs)
    tokens = outcome.packed[row, : len(chosen)].tolist()
    return [_entry(*token, top) for token in zip(tokens, chosen, rank, ids, values, strict=True)]


def _entry(
    token: int, chosen: float, rank: int, ids: Sequence[int], values: Sequence[float], top: int
) -> dict[int, Logprob]:
    entry = {token: Logprob(chosen, rank)}
    for place, (other, value) in enumerate(zip(ids[:top], values[:top], strict=True), start=1):
        entry.setdefault(other, Logprob(value, place))
    return entry


@torch.inference_mode()
def add_prompt_logprobs(idlm: Idlm, work: Sequence[tuple[Request, Chunk]], hidden: Tensor) -> None:
    """Give the requests of a prefill that asked for them the log-probabilities of their prompt tokens.

    `hidden` [T, D] are the chunks' rows one after the other; row i gives the law of token i + 1. The law is the
    request's own, at temperature 1 where it is greedy, without penalties: those are about what was generated.
    """
    start = 0
    for request, chunk in work:
        rows = hidden[start : start + len(chunk.tokens)]
        start += len(chunk.tokens)
        top, known = request.params.prompt_logprobs, request.result.prompt_logprobs
        if top is None or known is None:
            continue
        rows = rows[len(known) - chunk.start - 1 :]  # one that was pre-empted has some, or all of them, already
        targets = request.prompt[len(known) : len(known) + len(rows)]
        if not targets:
            continue
        params = replace(
            request.params,
            temperature=request.params.temperature or 1.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
        )
        log_p = law(idlm.head(rows[: len(targets)]), params, None, idlm.mask_id)
        known += _rows(log_p, targets, top)


def _rows(log_p: Tensor, targets: list[int], top: int) -> list[dict[int, Logprob]]:
    own = log_p.gather(1, torch.tensor(targets, device=log_p.device)[:, None])
    rank = (log_p > own).sum(dim=-1) + 1
    values, ids = log_p.topk(top, dim=-1)
    columns = (own[:, 0].tolist(), rank.tolist(), ids.tolist(), values.tolist())
    return [_entry(*token, top) for token in zip(targets, *columns, strict=True)]
