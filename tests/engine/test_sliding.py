"""Sliding windows, soft caps and sinks: ISD is AR is transformers, to the end of the context."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from idlm import LLM, Idlm, SamplingParams
from idlm.decoding import reference
from idlm.decoding.window import Window
from idlm.models import attention
from tests.engine.tiny import SLIDING, sliding_idlm

PROMPTS = [[5], [4 + i % 19 for i in range(21)]]
PLANS = [(1, "all"), (2, "chain"), (4, "all"), (8, "all")]
WINDOWS = {"mistral": (1, 2, 3, 8), "gemma2": (5,), "gpt_oss": (3, 17)}
CASES = [(family, window) for family in SLIDING for window in WINDOWS.get(family, (4,))]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=48, ignore_eos=True, seed=3)


@lru_cache(maxsize=1)
def model(family: str, window: int) -> Idlm:
    return sliding_idlm(family, window)


def by_transformers(idlm: Idlm, prompt: list[int]) -> list[int]:
    """Greedy, with eager attention, and the whole text in each forward."""
    stock = idlm.model
    stock.set_attn_implementation("eager")
    try:
        tokens = torch.tensor([prompt], device=idlm.device)
        limit = {"max_new_tokens": idlm.context - len(prompt), "eos_token_id": None}
        found = stock.generate(
            *(tokens, None), do_sample=False, use_cache=False, pad_token_id=0, **limit
        )
    finally:
        stock.set_attn_implementation(attention.NAME)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("family", "window"), CASES)
def test_isd_is_ar_is_transformers(family: str, window: int) -> None:
    idlm = model(family, window)
    expected = [[by_reference(idlm, prompt, one) for prompt in PROMPTS] for one in (GREEDY, SEEDED)]
    assert [by_transformers(idlm, prompt) for prompt in PROMPTS] == expected[0]
    for stride, branches in PLANS if family == "mistral" else PLANS[-2:]:
        options = {"page_size": 4, "max_num_seqs": 2, "record": stride == 4}
        llm = LLM(idlm, stride=stride, branches=branches, **options)
        for params, tokens in zip((GREEDY, SEEDED), expected, strict=True):
            found = [result.token_ids for result in llm.generate(PROMPTS, params)]
            assert found == tokens, (stride, branches)


def by_reference(idlm: Idlm, prompt: list[int], params: SamplingParams) -> list[int]:
    seed, one = params.seed or 0, replace(params, max_tokens=idlm.context - len(prompt))
    request = reference.Request(prompt, one, idlm.mask_id, seed=seed)
    return reference.ar(idlm.forward, request).tokens


@pytest.mark.parametrize(("family", "window"), [("mistral", 2), ("gemma2", 5), ("gpt_oss", 3)])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_drafts_are_the_references(family: str, window: int, prompt: list[int]) -> None:
    """AR's tokens come with any drafts, so what MASK rows see is told by the drafts alone."""
    idlm, depth = model(family, window), 7
    llm = LLM(idlm, stride=depth + 1, branches="all", page_size=4, record=False)
    (result,) = llm.generate([prompt], replace(GREEDY, max_tokens=1))
    _, logits = reference._window(idlm.forward, idlm.mask_id, prompt, [], {0: depth})
    request = reference.Request(prompt, GREEDY, idlm.mask_id)
    expected, _ = request.draft(result.token_ids, logits[0])
    assert llm.engine.runner.slots.state.drafts[0].tolist() == expected


@pytest.mark.parametrize("options", [{"deterministic": True}, {"record": False}, {}])
def test_every_way_to_run_gives_the_same(options: dict[str, bool]) -> None:
    """The last is the planner."""
    idlm = model("gpt_oss", 3)
    plan = {} if not options else {"stride": 4, "branches": "all"}
    for prompt in PROMPTS:
        llm = LLM(idlm, page_size=4, max_num_seqs=2, **plan, **options)
        assert llm.generate([prompt], SEEDED)[0].token_ids == by_reference(idlm, prompt, SEEDED)


@pytest.mark.parametrize("branches", ["all", "chain", (0, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_what_a_row_sees_is_every_position_up_to_its_own(
    stride: int, branches: str | tuple[int, ...]
) -> None:
    """So the last w rows that it sees are those that a sliding window w leaves it: the back-ends
    count rows where the reference compares positions."""
    window = Window(stride, branches if stride > 2 else "all")
    for offsets, words in zip(window.offsets.tolist(), window.visible.tolist(), strict=True):
        for offset, word in zip(offsets, words, strict=True):
            seen = [offsets[s] for s in range(window.width) if word >> s & 1]
            assert seen == list(range(offset + 1))


@pytest.mark.parametrize(("family", "held", "trimmed"), [("mistral", 6, 10), ("qwen2", 12, 0)])
def test_pages_before_every_window_are_freed(family: str, held: int, trimmed: int) -> None:
    """Mistral's layers all slide; Qwen2's first layer sees everything."""
    engine = LLM(model(family, 4), stride=4, branches="all", page_size=4, record=False).engine
    engine.add(list(range(3, 20)), replace(GREEDY, max_tokens=31), seed=0)
    most, freed = 0, 0
    while engine.busy:
        engine.step()
        engine.check()
        if engine.scheduler.decoding:
            (request,) = engine.scheduler.decoding
            most, freed = max(most, engine.scheduler.pool.live), request.trimmed
    assert (most, freed) == (held, trimmed)
    again = engine.add(list(range(3, 20)), replace(GREEDY, max_tokens=2), seed=0)
    engine.step()
    assert engine.result(again).cached_tokens == 16  # what was freed is still found by its tokens
