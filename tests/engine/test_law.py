"""`idlm.decoding.law` is on the path of every token: where it is told what comes out, nothing else
does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm import Guide, Idlm, SamplingParams, load
from idlm.config import EngineConfig
from idlm.decoding import law
from idlm.decoding.law import Law, positions
from idlm.decoding.verify import Verdicts
from idlm.engine import step
from idlm.engine.build import build_engine
from idlm.engine.request import Result

PLANS: list[tuple[int, str]] = [(1, "all"), (4, "chain"), (4, "all")]
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
GUIDE = Guide("regex", "[a-e]+")
REQUESTS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(seed=3, temperature=1.4),
    "filters": SamplingParams(seed=4, top_k=9, top_p=0.9, min_p=0.05),
    "penalties": SamplingParams(seed=5, **PENALTIES),
    "greedy penalties": SamplingParams(temperature=0, **PENALTIES),
    "bias": SamplingParams(seed=6, logit_bias={3: 40.0}, banned_tokens=(4,)),
    "min_tokens": SamplingParams(seed=7, min_tokens=6),
    "ratio": SamplingParams(seed=8, verification="ratio"),
    "ratio, penalties": SamplingParams(seed=9, verification="ratio", **PENALTIES),
    "relaxed": SamplingParams(seed=10, verification="relaxed", tau=0.01),
    "guide": SamplingParams(seed=11, guide=GUIDE),
    "guide, ratio": SamplingParams(seed=12, guide=GUIDE, verification="ratio"),
    "logprobs": SamplingParams(seed=13, logprobs=2, prompt_logprobs=1),
    "greedy logprobs": SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1),
}
PROMPT = [40, 41, 70, 99, 300]
TOKENS = 12


@pytest.fixture(scope="module")
def idlm(checkpoint: Path) -> Idlm:
    return load(str(checkpoint / "base"), adapter=str(checkpoint / "lora"), dtype="float64")


@pytest.fixture
def letters(idlm: Idlm, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Five tokens; from now on the law lets only one of them through, another at each position."""
    assert idlm.tokenizer is not None
    letters = torch.tensor(idlm.tokenizer.convert_tokens_to_ids(list("abcde")))
    scores = Law.scores

    def forced(self: Law, logits: Tensor, first: Tensor, ahead: Tensor | None = None) -> Tensor:
        given = scores(self, logits, first, ahead)
        only = letters[positions(first, logits.shape[1]) % 5]
        return torch.full_like(given, -torch.inf).scatter(2, only[..., None], 0.0)

    monkeypatch.setattr(Law, "scores", forced)
    return letters


def decode(
    idlm: Idlm, plan: tuple[int, str], requests: list[SamplingParams], record: bool = True
) -> list[Result]:
    """All of them side by side."""
    engine = build_engine(idlm, EngineConfig(*plan, record=record))
    limits = {"max_tokens": TOKENS, "ignore_eos": True}
    names = [engine.add(PROMPT, replace(one, **limits), one.seed or 0) for one in requests]
    results = {
        update.request_id: update.result for update in engine.run() if update.result is not None
    }
    return [results[name] for name in names]


def obeys(result: Result, letters: Tensor) -> bool:
    """Whether the output, and every draft of it, is what the law was told to let through."""
    wanted = letters[torch.arange(len(PROMPT), len(PROMPT) + TOKENS) % 5].tolist()
    return result.token_ids == wanted and result.accepted == result.reached


def check(results: list[Result], plan: tuple[int, str], letters: Tensor) -> None:
    for name, result in zip(REQUESTS, results, strict=True):
        assert obeys(result, letters), name
        assert plan[0] == 1 or sum(result.accepted) > 0, name
        if "logprobs" in name:
            assert result.logprobs is not None and result.prompt_logprobs is not None
            for token, entry in zip(result.token_ids, result.logprobs, strict=True):
                assert entry[token].logprob == 0 and entry[token].rank == 1
            for entry in result.prompt_logprobs[1:]:
                assert entry is not None and set(entry) & set(letters.tolist())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("record", [False, True])
def test_every_mode_obeys_the_law(
    idlm: Idlm, letters: Tensor, plan: tuple[int, str], record: bool
) -> None:
    check(decode(idlm, plan, list(REQUESTS.values()), record), plan, letters)


@pytest.mark.parametrize("name", REQUESTS)
def test_each_alone_obeys_the_law(idlm: Idlm, letters: Tensor, name: str) -> None:
    """A step runs only what its requests need, so each takes another path alone than with the
    others."""
    (result,) = decode(idlm, (4, "all"), [REQUESTS[name]])
    assert obeys(result, letters)


@pytest.mark.parametrize("plan", PLANS)
def test_the_kernel_obeys_the_law(
    idlm: Idlm, letters: Tensor, plan: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's choice in the engine; unrecorded, since its interpreter computes outside torch."""
    pytest.importorskip(
        "triton", reason="triton is not installed: only the PyTorch twin can be tested"
    )
    from idlm.kernels.choose_triton import choose_rows

    used = []

    def counted(*arguments: Any) -> Tensor:
        used.append(arguments)
        return choose_rows(*arguments)

    def never(*arguments: Any) -> Tensor:
        raise AssertionError("the PyTorch twin made noise")

    monkeypatch.setattr(law, "gumbel", never)
    monkeypatch.setattr(step, "rules", lambda device: (counted, law.filtered))
    check(decode(idlm, plan, list(REQUESTS.values()), record=False), plan, letters)
    assert used


def greedy_verify(law: Law, logits: Tensor, drafts: Any, first: Tensor) -> Verdicts:
    tokens = logits.argmax(dim=-1)
    nothing = torch.zeros_like(first)
    return Verdicts(nothing, tokens, None)


def greedy_draft(
    law: Law, logits: Tensor, first: Tensor, allow: Any = None, chain: Any = None
) -> tuple[Tensor, Tensor | None]:
    return logits.argmax(dim=-1), law.log_p(logits) if law.features.ratio else None


@pytest.mark.parametrize("name, bypass", [("verify", greedy_verify), ("draft", greedy_draft)])
def test_another_path_is_noticed(
    idlm: Idlm,
    letters: Tensor,
    name: str,
    bypass: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, or drafts, that are chosen from the logits themselves."""
    monkeypatch.setattr(step, name, bypass)
    unguided = [
        params for params in REQUESTS.values() if params.guide is None and params.logprobs is None
    ]
    assert not any(obeys(result, letters) for result in decode(idlm, (4, "all"), unguided))
