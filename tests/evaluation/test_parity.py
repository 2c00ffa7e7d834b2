"""The proofs accept equal outputs and reject different ones."""

import math
from typing import Any

import pytest
import torch

from idlm import SamplingParams
from idlm.engine import step
from idlm.evaluation.parity import (
    check_law,
    compare,
    first_difference,
    kolmogorov_smirnov,
    transform,
)
from tests.engine.tiny import tiny_idlm

PROMPTS = [[1, 2, 3], [7], [4, 4, 9, 9]]


def test_coupled_isd_is_identical() -> None:
    parity = compare(tiny_idlm("qwen3"), PROMPTS, SamplingParams(seed=1, max_tokens=12), stride=3)
    assert parity.identical and parity.prompts == 3
    assert parity.compared_tokens == sum(len(result.token_ids) for result in parity.results)


def test_relaxed_differs_and_the_difference_is_described() -> None:
    """`relaxed` is approximate: with tau near 0 it takes drafts that AR would not."""
    params = SamplingParams(seed=1, max_tokens=12, verification="relaxed", tau=1e-6)
    parity = compare(tiny_idlm("llama"), PROMPTS, params, stride=4)
    assert not parity.identical
    first = parity.differences[0]
    assert first.ar_token != first.isd_token
    assert (
        first.ar_margin is not None
        and first.isd_margin is not None
        and first.isd_margin < 0 < first.ar_margin
    )


@pytest.mark.parametrize(
    "left, right, expected",
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)],
)
def test_first_difference(left: list[int], right: list[int], expected: int | None) -> None:
    assert first_difference(left, right) == expected


def test_the_ratio_rule_passes_the_law_test() -> None:
    params = SamplingParams(seed=3, max_tokens=40, verification="ratio", temperature=0.9, top_p=0.9)
    test, results = check_law(tiny_idlm("qwen2"), PROMPTS * 4, params, stride=4)
    assert (
        test.passed
        and test.tokens == 12 * 40
        and test.bound == pytest.approx(math.sqrt(math.log(2e6) / 2))
    )
    assert sum(sum(result.accepted) for result in results) > 0


def test_argmax_drafts_under_the_ratio_rule_fail_the_law_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts by argmax, verified as if they were sampled from q: the law test must fail."""
    draft = step.draft

    def argmax(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, log_q = draft(*args)
        assert log_q is not None
        return log_q.argmax(dim=-1), log_q

    monkeypatch.setattr(step, "draft", argmax)
    params = SamplingParams(seed=3, max_tokens=40, verification="ratio", temperature=1.0)
    test, _ = check_law(tiny_idlm("qwen2"), PROMPTS * 10, params, stride=4)
    assert not test.passed


def test_the_transform_of_right_tokens_is_uniform_and_of_wrong_ones_is_not() -> None:
    torch.manual_seed(0)
    log_p = torch.randn(4000, 7, dtype=torch.float64).log_softmax(dim=-1)
    uniform = torch.rand(4000, dtype=torch.float64)
    right = torch.distributions.Categorical(logits=log_p).sample()
    assert kolmogorov_smirnov(transform(log_p, right, uniform)).passed
    flat = torch.distributions.Categorical(logits=0.5 * log_p).sample()
    assert not kolmogorov_smirnov(transform(log_p, flat, uniform)).passed
