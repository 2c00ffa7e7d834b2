"""Is the output of ISD that of the AR model?

The exact rules are compared token by token; for the ratio rule a test compares the law.

Shapes: n tokens of one output, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from idlm.decoding.law import Law
from idlm.decoding.noise import Stream, gumbel
from idlm.engine.llm import LLM, Result
from idlm.models.idlm_model import Idlm
from idlm.params import SEED_LIMIT, SamplingParams

FALSE_ALARM = 1e-6
"""Probability that the law test rejects a correct decoder."""


@dataclass(frozen=True)
class Difference:
    """The first token at which AR and ISD differ on a prompt; later tokens follow different texts.

    Attributes:
        prompt: its index.
        position: of the token in the output, from 0.
        ar_token, isd_token: None if that output had ended.
        ar_margin, isd_margin: the token's score less the best other score, in a full recomputation.
            The score is what the argmax runs over: log p + noise, or the logit when greedy. One of
            the two margins is positive, the other negative; if both are tiny, the difference is
            rounding.
    """

    prompt: int
    position: int
    ar_token: int | None
    isd_token: int | None
    ar_margin: float | None
    isd_margin: float | None


@dataclass(frozen=True)
class Parity:
    """AR against ISD on some prompts.

    Attributes:
        compared_tokens: up to and including each prompt's first difference.
    """

    prompts: int
    compared_tokens: int
    differences: list[Difference]
    results: list[Result]

    @property
    def identical(self) -> bool:
        """Whether every prompt gave the same tokens."""
        return not self.differences


def numbered_seeds(params: SamplingParams, count: int) -> list[SamplingParams]:
    """`params` for each of `count` prompts, with seeds that count up from its own (0 if it has
    none).

    With one seed for two prompts their noise would be the same and their tokens not independent.
    """
    first = params.seed or 0
    return [
        replace(params, seed=(first + index + SEED_LIMIT) % (2 * SEED_LIMIT) - SEED_LIMIT)
        for index in range(count)
    ]


def compare(
    idlm: Idlm,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stride: int,
    branches: str | Iterable[int] = "all",
    advance: Callable[[], None] = lambda: None,
) -> Parity:
    """Decode each prompt with AR and with ISD, with the same seed, and compare the tokens.

    Raises:
        InputError: a prompt or a parameter cannot be used.
    """
    options: Any = {"max_num_seqs": 1, "generation_config": "none"}  # `params` are complete
    ar = LLM(idlm, stride=1, **options)
    isd = LLM(idlm, stride=stride, branches=branches, **options)
    compared, differences, results = 0, [], []
    for index, (prompt, seeded) in enumerate(
        zip(prompts, numbered_seeds(params, len(prompts)), strict=True)
    ):
        left, right = (
            ar.generate([list(prompt)], seeded)[0],
            isd.generate([list(prompt)], seeded)[0],
        )
        results.append(right)
        at = first_difference(left.token_ids, right.token_ids)
        compared += len(left.token_ids) if at is None else at + 1
        if at is not None:
            differences.append(_difference(idlm, index, at, left, right, seeded))
        advance()
    return Parity(len(prompts), compared, differences, results)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which two outputs differ or one has ended; None if they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _difference(
    idlm: Idlm, prompt: int, at: int, ar: Result, isd: Result, params: SamplingParams
) -> Difference:
    tokens = [result.token_ids[at] if at < len(result.token_ids) else None for result in (ar, isd)]
    scores = token_scores(idlm, ar.prompt_token_ids, ar.token_ids[:at], params)
    margins = [None if token is None else margin(scores, token) for token in tokens]
    return Difference(prompt, at, *tokens, *margins)


def margin(scores: Tensor, token: int) -> float:
    """The score of `token` less the best score of any other token; `scores` is [V]."""
    others = scores.clone()
    others[token] = -math.inf
    return float(scores[token] - others.max())


def token_scores(
    idlm: Idlm, prompt: list[int], output: list[int], params: SamplingParams
) -> Tensor:
    """What the argmax runs over after `output`: float64 [V], from logits of the model's own
    precision."""
    soft = (
        replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) if params.greedy else params
    )
    log_p = _laws(idlm, prompt, output, soft, first=len(output))[0]
    if params.greedy:
        return log_p
    settings = Law.of_one(params, idlm.vocab_size, idlm.mask_id).settings
    position = torch.tensor([[len(prompt) + len(output)]])
    return log_p + gumbel(settings.keys[:, Stream.TOKEN], position, settings.steps)[0, 0]


@torch.inference_mode()
def _laws(
    idlm: Idlm, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, first: int = 0
) -> Tensor:
    """AR's law of each token of `output` from index `first` on, and of the one after it.

    float64 [n + 1 - first, V], from one causal forward over the whole text: no window, no cache, no
    MASK.
    """
    text = torch.tensor([*prompt, *output], device=idlm.device)
    causal = torch.ones(len(text), len(text), dtype=torch.bool, device=idlm.device).tril()
    logits = idlm.forward(text, torch.arange(len(text), device=idlm.device), causal)
    rows = logits[len(prompt) + first - 1 :].double().cpu()
    law = Law.of_one(params, idlm.vocab_size, idlm.mask_id, prompt, output[:first])
    ahead = torch.tensor([output[first:]], dtype=torch.int64)
    return law.log_p(law.scores(rows[None], torch.tensor([len(prompt) + first]), ahead))[0]


@dataclass(frozen=True)
class LawTest:
    """A Kolmogorov-Smirnov test of the probability integral transform.

    Attributes:
        tokens: n.
        statistic: sqrt(n) times the largest distance between the empirical and the uniform
            distribution.
        bound: exceeded with probability at most `FALSE_ALARM` if the law is right.
        impossible: tokens to which AR's law gives probability 0; 0 for a correct decoder, but for
            rounding.
    """

    tokens: int
    statistic: float
    bound: float
    impossible: int

    @property
    def passed(self) -> bool:
        """Whether the test finds no evidence against AR's law."""
        return self.statistic <= self.bound and self.impossible == 0


def check_law(
    idlm: Idlm,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stride: int,
    branches: str | Iterable[int] = "all",
    advance: Callable[[], None] = lambda: None,
) -> tuple[LawTest, list[Result]]:
    """Test whether each token of ISD follows AR's law, given the text before it.

    The end token is ignored: for outputs of a fixed length the number of tokens does not depend on
    the tokens, so the bound holds.

    Raises:
        InputError: a prompt or a parameter cannot be used.
    """
    options: Any = {"max_num_seqs": 1, "generation_config": "none"}  # `params` are complete
    llm = LLM(idlm, stride=stride, branches=branches, **options)
    values, impossible, results = [], 0, []
    generator = torch.Generator().manual_seed(params.seed or 0)
    for prompt, seeded in zip(
        prompts, numbered_seeds(replace(params, ignore_eos=True), len(prompts)), strict=True
    ):
        result = llm.generate([list(prompt)], seeded)[0]
        results.append(result)
        log_p = _laws(idlm, prompt, result.token_ids, seeded)[:-1]
        tokens = torch.tensor(result.token_ids)
        impossible += int((log_p.gather(1, tokens[:, None]) == -math.inf).sum())
        values.append(
            transform(
                log_p, tokens, torch.rand(len(tokens), generator=generator, dtype=torch.float64)
            )
        )
        advance()
    return kolmogorov_smirnov(torch.cat(values), impossible), results


def transform(log_p: Tensor, tokens: Tensor, uniform: Tensor) -> Tensor:
    """Randomised probability integral transform of `tokens` [n] under the laws `log_p` [n, V]; [n]
    in [0, 1].

    With the tokens of a row in the order of falling probability, the value is the probability
    before the token plus a uniform share of its own. The values are independent and uniform if and
    only if each token follows its row's law (Rosenblatt 1952, "Remarks on a multivariate
    transformation").
    """
    probabilities, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    rank = (order == tokens[:, None]).to(torch.int64).argmax(dim=-1, keepdim=True)
    probability = probabilities.gather(1, rank)[:, 0]
    before = probabilities.cumsum(dim=-1).gather(1, rank)[:, 0] - probability
    return (before + uniform * probability).clamp(0, 1)


def kolmogorov_smirnov(values: Tensor, impossible: int = 0) -> LawTest:
    """Test `values` [n] for uniformity.

    The bound is that of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990).
    """
    n = len(values)
    ordered = values.sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()
    return LawTest(
        n, math.sqrt(n) * float(distance), math.sqrt(math.log(2 / FALSE_ALARM) / 2), impossible
    )
