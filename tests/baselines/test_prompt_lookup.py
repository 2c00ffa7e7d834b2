"""Prompt lookup: what it finds, and that its output is AR's."""

from __future__ import annotations

import pytest

from idlm import LLM, SamplingParams
from idlm.baselines.prompt_lookup import PromptLookup, decode
from idlm.errors import InputError
from tests.training import tiny


def test_what_followed_the_last_time() -> None:
    rule = PromptLookup(ngram=2, drafts=3)
    assert rule.find([1, 2, 3, 4, 1, 2]) == [3, 4, 1]
    assert rule.find([1, 2, 3, 1, 2, 4, 1, 2]) == [4, 1, 2]  # the last time
    assert rule.find([5, 2, 7, 1, 2]) == [7, 1, 2]  # by one token
    assert rule.find([1, 2, 3]) == [] and rule.find([1]) == []
    assert PromptLookup(1, 2).find([4, 4]) == [4]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_output_is_that_of_ar(temperature: float) -> None:
    idlm = tiny.model()
    idlm.model.eval()
    prompts = [[3, 4, 5, 3, 4], [6], [7, 8, 7, 8, 7, 8, 7]]
    params = SamplingParams(temperature=temperature, max_tokens=16, seed=5, top_p=0.9)
    found = decode(idlm, prompts, params, PromptLookup(2, 4))
    llm = LLM(idlm, stride=1, generation_config="none")
    for row, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        seeded = SamplingParams(temperature=temperature, max_tokens=16, seed=5 + row, top_p=0.9)
        assert one.token_ids == llm.generate([prompt], seeded)[0].token_ids
        assert one.forwards <= len(one.token_ids) <= one.rows <= 5 * one.forwards
    if not temperature:
        assert sum(one.forwards for one in found) < sum(len(one.token_ids) for one in found)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="drafts"):
        decode(tiny.model(), [[3]], SamplingParams(max_tokens=60))
    with pytest.raises(InputError, match="ngram 0"):
        PromptLookup(ngram=0)
