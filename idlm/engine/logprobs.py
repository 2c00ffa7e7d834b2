"""Log-probabilities for callers: those a step brings along, and those of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from idlm.decoding.law import Law
from idlm.decoding.verify import logprobs
from idlm.engine.prefill import Chunk
from idlm.engine.request import Logprob, Request
from idlm.engine.step import StepResult
from idlm.models.idlm_model import Idlm


def logprob_entries(outcome: StepResult, row: int, request: Request) -> list[dict[int, Logprob]]:
    """For each token of a row of a step: itself, then the likeliest ones the request asked for."""
    top = request.params.logprobs
    if top is None or not outcome.logprobs:
        return []
    tokens = outcome.packed[row, : outcome.logprobs[0].shape[1]].tolist()
    return _entries(tokens, [tensor[row] for tensor in outcome.logprobs], top)


def _entries(tokens: Sequence[int], found: Sequence[Tensor], top: int) -> list[dict[int, Logprob]]:
    """Of one slot's `tokens`; `found` are its rows of `idlm.decoding.verify.Logprobs`."""
    chosen, rank, values, ids = (tensor.tolist() for tensor in found)
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
    """Give the requests of a prefill that asked for them the log-probabilities of their prompt
    tokens.

    `hidden` [T, D] are the chunks' rows one after the other; row i gives the law of token i + 1.
    The law is the request's own, at temperature 1 where it is greedy, without penalties: those are
    about what was generated.
    """
    start = 0
    for request, chunk in work:
        rows = hidden[start : start + len(chunk.tokens)]
        start += len(chunk.tokens)
        top, known = request.params.prompt_logprobs, request.result.prompt_logprobs
        if top is None or known is None:
            continue
        rows = rows[
            len(known) - chunk.start - 1 :
        ]  # one that was pre-empted has some, or all of them, already
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
        law = Law.of_one(params, idlm.vocab_size, idlm.mask_id, device=hidden.device)
        tokens = torch.tensor([targets], device=hidden.device)
        logits, first = idlm.head(rows[: len(targets)])[None], torch.zeros_like(tokens[:, 0])
        found = logprobs(law, logits, tokens, first, top)
        known += _entries(targets, [tensor[0] for tensor in found], top)
