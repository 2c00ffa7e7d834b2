"""Thoughts before an answer: their budget and the guide after them are the oracle's, for AR and ISD
alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idlm import LLM, Guide, Idlm, InputError, SamplingParams, load
from idlm.decoding import reference
from idlm.params import Thinking
from tests.engine.test_guide import oracle
from tests.engine.tiny import DEVICE, DTYPE

PROMPT = [40, 41, 70, 99, 300]
START, END = 60, 61
GUIDE = Guide("regex", "(ja|nein)(, [a-c]{3})*")


@pytest.fixture(scope="module")
def idlm(checkpoint: Path) -> Idlm:
    return load(
        str(checkpoint / "base"), adapter=str(checkpoint / "lora"), dtype=DTYPE, device=DEVICE
    )


def after_thoughts(
    idlm: Idlm, thinking: Thinking, guide: Guide | None, inside: bool
) -> reference.Allowed:
    """What may follow an output, written down anew: the whole output is looked at every time.

    Args:
        inside: the output begins within thoughts.
    """
    everything = torch.ones(idlm.vocab_size, dtype=torch.bool)
    answer = None if guide is None else oracle(idlm, guide)

    def only(token: int) -> Tensor:
        return torch.arange(idlm.vocab_size) == token

    def allowed(output: Sequence[int]) -> Tensor:
        output = list(output)
        if not inside and output[:1] != [START]:
            may = everything if answer is None else answer(output)
            return may if output else may | only(START)
        thoughts = output if inside else output[1:]
        if END in thoughts:
            rest = thoughts[thoughts.index(END) + 1 :]
            return everything if answer is None else answer(rest)
        if thinking.budget is not None and len(thoughts) >= thinking.budget:
            return only(END)
        may = everything.clone()
        may[[] if guide is None else sorted(idlm.eos_ids)] = False
        return may

    return allowed


PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(seed=3, max_tokens=14, logit_bias={END: 2.0}),
    SamplingParams(seed=7, max_tokens=14, repetition_penalty=1.3, logit_bias={START: 9.0}),
    SamplingParams(seed=8, max_tokens=14, verification="ratio", presence_penalty=0.7, top_k=50),
]


@pytest.mark.parametrize("guide", [None, GUIDE], ids=["free", "guided"])
@pytest.mark.parametrize("budget", [None, 0, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_equals_the_reference(
    idlm: Idlm, inside: bool, budget: int | None, guide: Guide | None
) -> None:
    thinking = Thinking(START, END, inside, budget)
    allowed = after_thoughts(idlm, thinking, guide, inside)
    wishes = [
        SamplingParams(**{**vars(one), "guide": guide, "thinking": thinking}) for one in PARAMS
    ]
    for stride, branches in ((4, "all"), (3, "chain")):
        results = LLM(idlm, stride=stride, branches=branches).generate([PROMPT] * 4, wishes)
        for params, result in zip(wishes, results, strict=True):
            seed, ends = params.seed or 0, idlm.eos_ids
            request = reference.Request(PROMPT, params, idlm.mask_id, ends, seed, allowed)
            expected = reference.isd(idlm.forward, request, stride, branches).tokens
            assert result.token_ids == expected
            if params.verification == "coupled" and branches == "all":
                assert expected == reference.ar(idlm.forward, request).tokens
            if guide is not None and result.finish_reason == "stop":
                _, found, answer = result.text.rpartition(idlm.tokenizer.decode([END]))  # type: ignore[union-attr]
                assert re.fullmatch(GUIDE.text, answer) and (found or not inside)


@pytest.mark.parametrize("late", [0, 1])
def test_a_budget_costs_the_steps_near_its_end_alone(idlm: Idlm, late: int) -> None:
    """Far from it, and after it, a request without a guide takes the steps of any request."""
    budget, most = 24, 60
    params = SamplingParams(
        seed=1, max_tokens=most, thinking=Thinking(START, END, True, budget), ignore_eos=True
    )
    engine = LLM(idlm, branches="all", lookahead=late).engine
    engine.add(PROMPT, params, 1)
    (request,) = engine._requests.values()
    restricted = []
    while engine.busy:
        engine.step()
        restricted += [len(request.result.token_ids)] if engine._constraint(request) else []
    tokens = request.result.token_ids
    assert tokens.index(END) == budget and len(tokens) == most
    assert restricted and budget - 16 <= min(restricted) and max(restricted) <= budget
    assert tokens == LLM(idlm, stride=1).generate([PROMPT], params)[0].token_ids
    free = SamplingParams(**{**vars(params), "thinking": Thinking(START, END, True)})
    assert tokens[:budget] == LLM(idlm, stride=1).generate([PROMPT], free)[0].token_ids[:budget]


def test_what_thoughts_do_not_go_with(idlm: Idlm) -> None:
    with pytest.raises(InputError, match=r"banned_tokens has 61"):
        LLM(idlm, branches="all").generate(
            [PROMPT], SamplingParams(banned_tokens=(END,), thinking=Thinking(START, END, budget=3))
        )
    with pytest.raises(InputError, match="thinking names token"):
        LLM(idlm, branches="all").generate(
            [PROMPT], SamplingParams(thinking=Thinking(START, 10**6, budget=3))
        )
    with pytest.raises(InputError, match="thinking.budget=-1"):
        Thinking(START, END, budget=-1)
    with pytest.raises(InputError, match="is not a Thinking"):
        SamplingParams(thinking=7)  # type: ignore[arg-type]
