"""Log-probabilities for callers: those of a step's tokens, and those of prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from idlm.decoding.law import Law
from idlm.decoding.verify import logprobs
from idlm.engine.prefill import Chunk
from idlm.engine.request import Logprob, Request
from idlm.engine.results import StepResult
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams

PROMPT_ROWS = 128
"""Prompt tokens whose laws are computed at once: a chunk's may be larger than what is free."""


def logprob_entries(outcome: StepResult, row: int, request: Request) -> list[dict[int, Logprob]]:
    """For each token of a result's row: its own log-probability, then those of the likeliest
    tokens, as many as the request asks for."""
    top = request.params.logprobs
    if top is None or not outcome.logprobs:
        return []
    tokens = outcome.packed[row, : outcome.logprobs[0].shape[1]].tolist()
    return _entries(tokens, [tensor[row] for tensor in outcome.logprobs], top)


def _entries(tokens: Sequence[int], found: Sequence[Tensor], top: int) -> list[dict[int, Logprob]]:
    """The entries of one slot's `tokens`, from its rows `found` of `Logprobs`."""
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
def add_prompt_logprobs(
    idlm: Idlm, work: Sequence[tuple[Request, Chunk]], hidden: Tensor, raw: bool
) -> None:
    """Append prompt log-probabilities to the results of prefilled requests that ask for them.

    `hidden` [T, D] has the rows of the chunks, chunk after chunk; row i gives the law of token
    i + 1. The law is the model's own if `raw`, else that of the request, with two changes.
    Temperature 0 becomes 1. Penalties and bad words are left out, since they are about generated
    tokens.
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
        ]  # a request that was pre-empted has some or all of its entries already
        targets = request.prompt[len(known) : len(known) + len(rows)]
        if not targets:
            continue
        params = replace(
            request.params,
            temperature=request.params.temperature or 1.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            bad_words=(),
        )
        law = Law.of_one(
            SamplingParams() if raw else params, idlm.vocab_size, idlm.mask_id, device=hidden.device
        )
        states, ids = rows[: len(targets)].split(PROMPT_ROWS), torch.tensor(targets)
        for some, tokens in zip(states, ids.split(PROMPT_ROWS), strict=True):
            on_device = tokens[None].to(hidden.device)
            first = torch.zeros_like(on_device[:, 0])
            found = logprobs(law, idlm.head(some)[None], on_device, first, top)
            known += _entries(tokens.tolist(), [tensor[0] for tensor in found], top)
