"""What a baseline writes, and the law that it draws tokens from.

Shapes: n tokens, V logit columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.decoding.law import Law
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams


class Drawn(NamedTuple):
    """Tokens [n], the probability of each [n], and their laws, float64 [n, V]; for greedy params
    the most likely tokens and the laws at temperature 1."""

    tokens: Tensor
    probability: Tensor
    log_q: Tensor


@dataclass(frozen=True)
class Written:
    """The answer to one prompt.

    Attributes:
        token_ids: up to the first end token, which is included, or to the limit.
        forwards: forward passes after the prompt's, those for tokens past the end included.
        rows: of these forwards.
        log_q: float32 [n, V], the law that each token was committed from, if it was asked for.
    """

    prompt: list[int]
    token_ids: list[int]
    forwards: int
    rows: int
    log_q: Tensor | None = None

    @property
    def tpf(self) -> float:
        """Tokens per forward."""
        return len(self.token_ids) / self.forwards


def law_of(idlm: Idlm, params: SamplingParams) -> Callable[[Tensor], Tensor]:
    """A function from logits [n, V] to the logs of the law that `params` make of them, float64
    [n, V]; for greedy params at temperature 1.

    Raises:
        InputError: the params need more than temperature, top-k, top-p and min-p.
    """
    law = Law.of_one(params, idlm.vocab_size, idlm.mask_id)
    needs = law.features
    if needs.historic or needs.biased or needs.held or params.stop or params.n > 1:
        raise InputError(
            "acceptance and baselines take temperature, top_k, top_p, min_p, seed and max_tokens; "
            "leave the other sampling parameters out"
        )
    at = torch.zeros(1, dtype=torch.int64)

    def log_law(logits: Tensor) -> Tensor:
        return law.soft_log_p(law.scores(logits[None].clone(), at))[0].double()

    return log_law


def drawer(idlm: Idlm, params: SamplingParams) -> Callable[[Tensor], Drawn]:
    """A function that draws a token for each row of logits [n, V], with random numbers of its own
    that `params.seed` starts (0 if it is None).

    Raises:
        InputError: as `law_of`.
    """
    law = law_of(idlm, params)
    random = torch.Generator().manual_seed(params.seed or 0)

    def draw(logits: Tensor) -> Drawn:
        log_q = law(logits)
        if params.greedy:
            tokens = log_q.argmax(-1)
        else:
            tokens = torch.multinomial(log_q.exp(), 1, generator=random)[:, 0]
        return Drawn(tokens, log_q.gather(1, tokens[:, None])[:, 0].exp(), log_q)

    return draw


def cut(tokens: list[int], ends: frozenset[int], limit: int) -> list[int]:
    """The tokens up to the first end token, and at most `limit`."""
    tokens = tokens[:limit]
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[: at + 1]
    return tokens


def check(idlm: Idlm, prompts: list[list[int]], longest: int) -> None:
    """Refuse what cannot be decoded; `longest` are the most tokens of a prompt and its answer.

    Raises:
        InputError: a prompt is empty, the context is too short, the model has an adapter or no MASK
            token, or is not on the CPU.
    """
    if idlm.device.type != "cpu":
        raise InputError(f"a baseline runs on the CPU, not on {idlm.device}; leave --device out")
    if idlm.gate is not None or idlm.mask_id >= idlm.vocab_size:
        what = "has an adapter" if idlm.gate is not None else "has no MASK token"
        raise InputError(f"{idlm.name!r} {what}; a baseline is a whole model, see docs/methods.md")
    if not prompts or not all(prompts):
        raise InputError("a prompt has no tokens; give one")
    if longest > idlm.context:
        raise InputError(
            f"prompt and answer take {longest} tokens in whole blocks, the context of "
            f"{idlm.name!r} is {idlm.context}; lower max_tokens"
        )
