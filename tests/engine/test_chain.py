"""Chained drafts in the engine against the oracle: same tokens, same forwards, same drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from idlm import LLM, Idlm, SamplingParams, load
from idlm.decoding import reference
from idlm.engine.request import Terms
from idlm.models.heads import KINDS, HeadSpec
from tests.engine.test_decoder import PARAMS
from tests.engine.test_guide import GUIDES, with_guide
from tests.engine.test_guide import PARAMS as GUIDED
from tests.engine.test_guide import PROMPT as LETTERS
from tests.engine.test_guide import oracle as guide_oracle
from tests.engine.tiny import DEVICE, DTYPE, VOCAB, tiny_idlm, with_second_adapter
from tests.heads import forward_of, random_head, slow_head

PLANS: list[tuple[int, str | tuple[int, ...]]] = [
    (1, "all"),
    (2, "all"),
    (3, "chain"),
    (4, "all"),
    (4, (0, 2)),
]
PROMPT = [1, 2, 3, 5, 8]


def chained(kind: str, top: int = 7, family: str = "qwen3") -> Idlm:
    idlm = tiny_idlm(family)
    idlm.draft_heads[0] = random_head(idlm.model, HeadSpec(kind, 6, top))
    return idlm


@pytest.fixture(scope="module", params=KINDS)
def idlm(request: pytest.FixtureRequest) -> Idlm:
    """A random model with a random adapter and a random head of each kind."""
    return chained(request.param)


def oracle(
    idlm: Idlm, prompt: list[int], params: SamplingParams, plan: tuple[int, str | tuple[int, ...]]
) -> reference.Decoded:
    request = reference.Request(
        prompt, params, idlm.mask_id, idlm.eos_ids, params.seed or 0, head=slow_head(idlm)
    )
    return reference.isd(forward_of(idlm), request, *plan)


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_oracle(
    idlm: Idlm, params: SamplingParams, plan: tuple[int, str | tuple[int, ...]]
) -> None:
    expected = oracle(idlm, PROMPT, params, plan)
    (result,) = LLM(idlm, stride=plan[0], branches=plan[1]).generate([PROMPT], params)
    assert result.token_ids == expected.tokens
    assert result.forwards == expected.forwards
    assert (result.reached, result.accepted) == (expected.reached, expected.accepted)
    if params.verification == "coupled":
        request = reference.Request(PROMPT, params, idlm.mask_id, idlm.eos_ids, params.seed or 0)
        ar = reference.ar(idlm.forward, request)
        assert result.token_ids == ar.tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("top", [1, VOCAB, 1000])
def test_families_and_numbers_of_candidates(family: str, top: int) -> None:
    """Tied and untied heads; one candidate, all tokens, more than there are."""
    idlm = chained("mlp", top, family)
    params = SamplingParams(seed=3, max_tokens=14, temperature=0.8)
    expected = oracle(idlm, PROMPT, params, (4, "all"))
    (result,) = LLM(idlm, stride=4, branches="all").generate([PROMPT], params)
    assert (result.token_ids, result.accepted) == (expected.tokens, expected.accepted)


@pytest.mark.parametrize("record", [False, True])
def test_a_batch_with_heads_of_two_kinds_equals_each_alone(record: bool) -> None:
    """Two adapters with heads of different kinds and sizes, and requests under other laws."""
    idlm = with_second_adapter(chained("selector", 5))
    idlm.draft_heads[1] = random_head(idlm.model, HeadSpec("markov", 3, 9), seed=8)
    llm = LLM(idlm, stride=4, branches="all", record=record, max_num_seqs=8)
    engine = llm.engine
    engine.adapters._numbers = {"first": 0, "second": 1}
    wishes = [replace(one, max_tokens=12) for one in PARAMS[:8]]
    for adapter in (0, 1):  # the second round replays what the first recorded
        names = [
            engine.add(
                PROMPT[: 1 + number % 5], one, one.seed or 0, Terms(("first", "second")[mixed])
            )
            for number, one in enumerate(wishes)
            for mixed in [(number + adapter) % 2]
        ]
        results = {u.request_id: u.result for u in engine.run() if u.result is not None}
        for number, (name, one) in enumerate(zip(names, wishes, strict=True)):
            mixed = (number + adapter) % 2
            request = reference.Request(
                PROMPT[: 1 + number % 5],
                one,
                idlm.mask_id,
                idlm.eos_ids,
                one.seed or 0,
                head=slow_head(idlm, mixed),
            )
            alone = reference.isd(adapted(idlm, mixed), request, 4)
            assert results[name].token_ids == alone.tokens
            assert results[name].accepted == alone.accepted


def adapted(idlm: Idlm, adapter: int) -> reference.Forward:
    """The oracle's forward with this adapter."""
    forward, gate = forward_of(idlm), idlm.gate

    def with_adapter(
        tokens: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        assert gate is not None
        gate.adapter = torch.full((int((tokens == idlm.mask_id).sum()),), adapter)
        return forward(tokens, positions, visible)

    return with_adapter


def test_an_adapter_without_a_head_keeps_its_drafts_beside_one_that_has_one() -> None:
    drafts = []
    for heads in (False, True):
        idlm = with_second_adapter(tiny_idlm("qwen3"))
        if heads:
            idlm.draft_heads[1] = random_head(idlm.model, HeadSpec("mlp", 4, 6))
        engine = LLM(idlm, stride=4, branches="all", record=False).engine
        params = SamplingParams(seed=4, max_tokens=20, ignore_eos=True)
        engine.add(PROMPT, params, 4)
        seen = []
        while engine.busy:
            engine.step()
            seen.append(engine.runner.slots.state.drafts[0].tolist())
        drafts.append(seen)
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("params", GUIDED, ids=range(len(GUIDED)))
@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_restricts_chained_drafts(
    checkpoint: Path, kind: str, params: SamplingParams
) -> None:
    """Where it forbids all candidates too: other tokens keep their scores."""
    idlm = load(
        str(checkpoint / "base"), adapter=str(checkpoint / "lora"), dtype=DTYPE, device=DEVICE
    )
    idlm.draft_heads[0] = random_head(idlm.model, HeadSpec(kind, 6, 16))
    guide = GUIDES[1]
    params = with_guide(params, guide)
    request = reference.Request(
        LETTERS, params, idlm.mask_id, idlm.eos_ids, params.seed or 0, guide_oracle(idlm, guide)
    )
    expected = reference.isd(forward_of(idlm), replace(request, head=slow_head(idlm)), 4)
    (result,) = LLM(idlm, stride=4, branches="all").generate([LETTERS], params)
    assert (result.token_ids, result.accepted) == (expected.tokens, expected.accepted)
    if params.verification == "coupled":
        ar = reference.ar(idlm.forward, request)
        assert result.token_ids == ar.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_float32_step_drafts_as_an_eager_one(kind: str) -> None:
    """With fused operators; also where the head changes the drafts of the adapter alone."""
    seen = []
    for record, heads in ((False, True), (True, True), (False, False)):
        idlm = load("nano", dtype="float32")
        if heads:
            idlm.draft_heads[0] = random_head(idlm.model, HeadSpec(kind, 6, 16))
        llm = LLM(idlm, stride=4, branches="all", kv_memory="16MiB", max_num_seqs=2, record=record)
        llm.engine.warm_up(60)
        results = llm.generate(["Mia has 14 apples."] * 2, SamplingParams(temperature=0))
        seen.append([(one.token_ids, one.accepted) for one in results])
    eager, recorded, headless = seen
    assert eager == recorded
    assert [tokens for tokens, _ in headless] == [tokens for tokens, _ in eager]
    assert headless != eager
