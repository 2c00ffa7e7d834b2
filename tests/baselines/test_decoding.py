"""SDAR, LLaDA and LLaDA-2.1 against slow loops without a cache, in float64."""

from __future__ import annotations

import pytest
import torch

from idlm.baselines import llada, sdar
from idlm.baselines.llada import Llada
from idlm.baselines.sdar import Sdar, TwoThresholds
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams
from tests.baselines import slow
from tests.training import tiny

PROMPTS = [[3], [4, 5, 6, 7], [8, 9, 10, 11, 12, 13], [5, 4]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


@pytest.fixture(scope="module")
def idlm() -> Idlm:
    model = tiny.model(window=None)
    model.model.eval()
    return model


RULES = [
    *(Sdar(4, 4, one, 0.3) for one in ("sequential", "static", "dynamic")),
    Sdar(4, 4, "entropy", 4.0),
    Sdar(3, 2, "dynamic", 0.4),
    Sdar(4, 2, "static"),
    TwoThresholds(4, 0.3, 0.25, 3),
    TwoThresholds(6, 0.2, 1.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_blocks_are_those_of_the_loops(idlm: Idlm, rule: Sdar | TwoThresholds) -> None:
    found = sdar.decode(idlm, PROMPTS, GREEDY, rule, keep_laws=True)
    for prompt, one in zip(PROMPTS, found, strict=True):
        tokens, forwards, laws = slow.sdar(idlm, prompt, GREEDY.max_tokens, rule)
        assert one.token_ids == tokens
        assert (one.forwards, one.rows) == (forwards, forwards * rule.block)
        assert one.log_q is not None
        for at, law in enumerate(one.log_q):
            slowly = laws[len(prompt) + at]
            torch.testing.assert_close(law.exp().double(), slowly, atol=1e-6, rtol=0)


def test_the_loops_see_edits(idlm: Idlm) -> None:
    """So that the test above is of editing too."""
    kept = sdar.decode(idlm, PROMPTS, GREEDY, TwoThresholds(4, 0.3, 1.0, 3))
    changed = sdar.decode(idlm, PROMPTS, GREEDY, TwoThresholds(4, 0.3, 0.25, 3))
    assert [one.token_ids for one in kept] != [one.token_ids for one in changed]


@pytest.mark.parametrize("rule", [Llada(4, 4), Llada(5, 2), Llada(10, 3)], ids=str)
def test_llada_is_that_of_the_loops(idlm: Idlm, rule: Llada) -> None:
    for prompt, one in zip(PROMPTS, llada.decode(idlm, PROMPTS, GREEDY, rule), strict=True):
        tokens, forwards = slow.llada(idlm, prompt, GREEDY.max_tokens, rule)
        assert one.token_ids == tokens
        width = len(prompt) + -(-10 // rule.block) * rule.block
        assert (one.forwards, one.rows) == (forwards, forwards * width)


@pytest.mark.parametrize("decode", [sdar.decode, llada.decode])
def test_samples_repeat_with_their_seed_and_follow_their_law(idlm: Idlm, decode) -> None:
    params = SamplingParams(temperature=0.9, top_k=5, seed=3, max_tokens=8)
    one, other = (decode(idlm, PROMPTS, params, keep_laws=True) for _ in range(2))
    assert [w.token_ids for w in one] == [w.token_ids for w in other]
    assert [w.token_ids for w in one] != [
        w.token_ids for w in decode(idlm, PROMPTS, SamplingParams(seed=4, max_tokens=8))
    ]
    for written in one:
        laws = written.log_q.exp()
        assert torch.allclose(laws.sum(1), torch.ones(len(laws)))
        assert ((laws > 0).sum(1) <= 5).all()
        assert (laws.gather(1, torch.tensor(written.token_ids)[:, None]) > 0).all()
        assert laws[:, tiny.MASK].eq(0).all()


def test_first_token_of_sdar_is_a_sample_of_its_law(idlm: Idlm) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=1, seed=1)
    many = sdar.decode(idlm, [[3, 4, 5, 6]] * 4000, params, Sdar(1, 1), keep_laws=True)
    law = many[0].log_q[0].exp().double()
    counts = torch.bincount(torch.tensor([w.token_ids[0] for w in many]), minlength=len(law))
    assert (counts / 4000 - law).abs().sum() / 2 < 0.05


@pytest.mark.parametrize(
    ("params", "prompts", "named"),
    [
        (SamplingParams(max_tokens=60), [[3]], "context"),
        (SamplingParams(presence_penalty=0.5, max_tokens=4), [[3]], "baselines take"),
        (SamplingParams(max_tokens=4), [[3], []], "no tokens"),
    ],
)
@pytest.mark.parametrize("decode", [sdar.decode, llada.decode])
def test_what_cannot_be_decoded_is_refused(idlm, decode, params, prompts, named: str) -> None:
    with pytest.raises(InputError, match=named):
        decode(idlm, prompts, params)


def test_adapters_and_too_many_steps_are_refused() -> None:
    with pytest.raises(InputError, match="adapter"):
        sdar.decode(tiny.model("lora"), [[3]], GREEDY)
    for rule in (Sdar, Llada):
        with pytest.raises(InputError, match="9 steps"):
            rule(4, 9)
