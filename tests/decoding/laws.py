"""One row's law, two ways: the batched law as a batch of one, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import reference
from idlm.decoding.law import Law, restrict
from idlm.decoding.settings import Settings


def batch_of_one(
    params: SamplingParams,
    vocab_size: int,
    mask_id: int,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> Law:
    """`Law.of_one`, with stop ids and a seed."""
    settings = Settings.empty(1, vocab_size, mask_id)
    settings.put(0, params, seed, prompt, output, stop_ids)
    return Law(settings, settings.features)


def fast_law(
    logits: Tensor,
    params: SamplingParams,
    mask_id: int,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: Tensor | None = None,
    stop_ids: Sequence[int] = (),
) -> Tensor:
    """Log-probabilities [V] of the token after `output`, from logits [V]."""
    law = batch_of_one(params, len(logits), mask_id, prompt, output, stop_ids)
    rows = logits if allowed is None else restrict(logits, allowed)
    nothing, position = (
        torch.empty(1, 0, dtype=torch.int64),
        torch.tensor([len(prompt) + len(output)]),
    )
    return law.log_p(law.scores(rows[None, None], position, nothing))[0, 0]


def slow_law(
    logits: Tensor,
    params: SamplingParams,
    mask_id: int,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: Tensor | None = None,
    stop_ids: Sequence[int] = (),
) -> Tensor:
    """The same by the oracle."""
    guide = None if allowed is None else lambda _: allowed
    request = reference.Request(list(prompt), params, mask_id, frozenset(stop_ids), 0, guide)
    return request.law(logits, list(output))


BOTH: list[Callable[..., Tensor]] = [fast_law, slow_law]
