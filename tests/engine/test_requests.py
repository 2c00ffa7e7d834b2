"""Samples, stops, logprobs, priorities, deadlines; and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from idlm import LLM, Idlm, InputError, SamplingParams, load
from idlm.config import EngineConfig, parse_memory
from idlm.decoding.plan import AR, Plan
from idlm.engine.build import build_engine
from idlm.engine.request import Terms
from idlm.evaluation.simulation import simulate_acceptance
from idlm.nano.problems import held_out_problems
from tests.decoding.laws import BOTH
from tests.engine.tiny import DEVICE, DTYPE, ROUNDING, tiny_idlm

ASKED = [[{"role": "user", "content": problem.question}] for problem in held_out_problems(6)]


@pytest.fixture(scope="module")
def nano() -> Idlm:
    return load("nano", dtype=DTYPE, device=DEVICE)


@pytest.fixture(scope="module")
def idlm() -> Idlm:
    return tiny_idlm("qwen3")


def test_a_batch_gives_what_each_prompt_gives_alone(nano: Idlm) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=40)
    together = LLM(nano, stride=4, max_num_seqs=3, branches="all").chat(ASKED, params)
    alone = [LLM(nano, stride=1, max_num_seqs=1).chat(one, params) for one in ASKED]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]


def test_samples_have_seeds_of_their_own(idlm: Idlm) -> None:
    llm = LLM(idlm, branches="all")
    first = llm.generate([[4, 2]], SamplingParams(n=3, seed=10, max_tokens=8))[0]
    assert [first.seed, *(one.seed for one in first.samples)] == [10, 11, 12]
    for one in (first, *first.samples):
        again = llm.generate([[4, 2]], SamplingParams(seed=one.seed, max_tokens=8))[0]
        assert again.token_ids == one.token_ids


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_nothing_after_a_stop_string_is_returned(nano: Idlm, stride: int) -> None:
    llm = LLM(nano, stride=stride, branches="all")
    free = llm.chat(ASKED[0], SamplingParams(temperature=0, max_tokens=60))
    stop = free.text[30:37]
    cut = llm.chat(ASKED[0], SamplingParams(temperature=0, max_tokens=60, stop=stop))
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop in nano.tokenizer.decode(cut.token_ids)  # type: ignore[union-attr]
    assert stop not in nano.tokenizer.decode(cut.token_ids[:-1])  # type: ignore[union-attr]
    kept = llm.chat(
        ASKED[0], SamplingParams(temperature=0, stop=stop, include_stop_str_in_output=True)
    )
    assert kept.text == cut.text + stop


def test_tokens_without_text(nano: Idlm) -> None:
    llm = LLM(nano, stride=4, branches="all")
    params = {"temperature": 0, "max_tokens": 20}
    bare = llm.chat(ASKED[0], SamplingParams(**params, detokenize=False))
    assert (
        bare.text == "" and bare.token_ids == llm.chat(ASKED[0], SamplingParams(**params)).token_ids
    )
    with pytest.raises(
        InputError, match="detokenize=False, which makes no text; use stop_token_ids"
    ):
        SamplingParams(stop="x", detokenize=False)


def test_min_tokens_hold_the_end_back(nano: Idlm) -> None:
    params = SamplingParams(temperature=0, max_tokens=200)
    end = len(LLM(nano, branches="all").chat(ASKED[0], params).token_ids)
    longer = LLM(nano, branches="all").chat(
        ASKED[0], SamplingParams(temperature=0, max_tokens=200, min_tokens=end + 5)
    )
    assert len(longer.token_ids) >= end + 5


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(seed=1, temperature=0.7, top_k=9)]
)
def test_logprobs_are_those_of_the_law_and_the_same_at_any_stride(
    idlm: Idlm, params: SamplingParams
) -> None:
    wanted = SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        seed=params.seed,
        max_tokens=9,
        logprobs=3,
        prompt_logprobs=2,
    )
    prompt = [4, 2, 9, 9]
    ar, isd = (
        LLM(idlm, stride=stride, branches="all").generate([prompt], wanted)[0] for stride in (1, 4)
    )
    text = torch.tensor(prompt + ar.token_ids)
    logits = idlm.forward(
        text, torch.arange(len(text)), torch.ones(len(text), len(text)).tril() > 0
    )
    soft = SamplingParams(temperature=params.temperature or 1.0, top_k=params.top_k)
    laws = [torch.stack([law(row.clone(), soft, idlm.mask_id) for row in logits]) for law in BOTH]
    for result, log_p in itertools.product((ar, isd), laws):
        assert result.token_ids == ar.token_ids
        assert result.logprobs is not None and result.prompt_logprobs is not None
        rows = [*result.prompt_logprobs[1:], *result.logprobs]
        assert result.prompt_logprobs[0] is None and len(rows) == len(text) - 1
        for row, entry in enumerate(rows):
            assert entry is not None and next(iter(entry)) == text[row + 1]
            for token, found in entry.items():
                assert found.logprob == pytest.approx(float(log_p[row, token]), abs=ROUNDING)
                assert found.rank == 1 + int((log_p[row] > log_p[row, token]).sum())


def test_special_tokens_can_be_kept(nano: Idlm) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, skip_special_tokens=False)
    assert LLM(nano, branches="all").chat(ASKED[0], params).text.endswith("<|im_end|>")


def test_a_stream_is_the_text_in_pieces(nano: Idlm) -> None:
    prompt = "Mia has 5 boxes."
    params = SamplingParams(temperature=0, max_tokens=30)
    updates = list(LLM(nano, branches="all").stream(prompt, params))
    (whole,) = LLM(nano, branches="all").generate(prompt, params)
    assert "".join(update.text for update in updates) == whole.text
    assert [token for update in updates for token in update.tokens] == whole.token_ids
    assert [update.result is None for update in updates] == [True] * (len(updates) - 1) + [False]


def test_a_stream_left_early_frees_what_it_held(idlm: Idlm) -> None:
    llm = LLM(idlm, branches="all")
    for _ in llm.stream([3, 4], SamplingParams(seed=0, max_tokens=20, ignore_eos=True)):
        break
    assert not llm.engine.scheduler.running and llm.engine.scheduler.pool.live == 0


def test_a_deadline_ends_a_request_and_no_other(idlm: Idlm) -> None:
    engine = LLM(idlm, stride=1).engine
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    late = engine.add([3], params, 0, Terms(timeout=0.0))
    fine = engine.add([3], params, 0, Terms(timeout=3600.0))
    results = {
        update.request_id: update.result for update in engine.run() if update.result is not None
    }
    assert results[late].finish_reason == "timeout" and results[late].token_ids == []
    assert results[fine].finish_reason == "length" and len(results[fine].token_ids) == 20


def test_the_lower_priority_number_goes_first(idlm: Idlm) -> None:
    engine = LLM(idlm, max_num_seqs=1, branches="all").engine
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    names = [engine.add([3], params, 0, Terms(priority=priority)) for priority in (2, 1, 0)]
    finished = [update.request_id for update in engine.run() if update.result is not None]
    assert finished == names[::-1]


def test_a_shared_prefix_is_computed_once(idlm: Idlm) -> None:
    llm = LLM(idlm, page_size=4, branches="all")
    prompt, params = [3, 4, 5, 6, 7, 8, 9, 10, 11], SamplingParams(temperature=0, max_tokens=6)
    first, again = (llm.generate([prompt], params)[0] for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 8)
    assert first.token_ids == again.token_ids
    name = llm.engine.add(prompt, params, 0, Terms(salt=b"another key"))
    (salted,) = (update.result for update in llm.engine.run() if update.result is not None)
    assert name and salted.cached_tokens == 0


def test_a_long_prompt_is_prefilled_in_pieces_between_the_steps_of_others(idlm: Idlm) -> None:
    engine = build_engine(idlm, EngineConfig(2, "all", prefill_tokens=4))
    running = engine.add([3, 4], SamplingParams(seed=0, max_tokens=30, ignore_eos=True), 0)
    engine.step()
    engine.add(list(range(3, 23)) * 2, SamplingParams(seed=0, max_tokens=2), 0)
    for _ in range(5):
        assert running in [update.request_id for update in engine.step()]
    assert engine.metrics.prefill_tokens <= 2 + 5 * 4 and engine.scheduler.prefilling


@pytest.mark.parametrize("stride", [1, 3])
def test_a_prompt_and_the_windows_of_others_are_one_forward(idlm: Idlm, stride: int) -> None:
    engine = build_engine(idlm, EngineConfig(stride, "all", lookahead=0))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.add([3, 4], params, 0)
    engine.step()
    late = engine.add([5, 6, 7, 8], params, 0)
    assert late in [update.request_id for update in engine.step()], (
        "its first token comes with its prefill"
    )
    assert (engine.metrics.decode_steps, engine.metrics.rows) == (2, 3)


def test_prompt_logprobs_survive_a_pre_emption_within_the_prefill(idlm: Idlm) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    engine, prompt = (
        build_engine(idlm, EngineConfig(2, "all", prefill_tokens=3, lookahead=0)),
        list(range(3, 14)),
    )
    engine.add([3], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), 0)
    engine.step()
    name = engine.add(prompt, params, 0)
    engine.step()
    assert engine.scheduler.victim().id == name and engine.scheduler.prefilling
    engine._preempt()
    results = {
        update.request_id: update.result for update in engine.run() if update.result is not None
    }
    assert engine.metrics.preemptions == 1
    (alone,) = LLM(idlm, branches="all").generate([prompt], params)
    assert results[name].token_ids == alone.token_ids and alone.prompt_logprobs is not None
    assert len(alone.prompt_logprobs) == len(prompt)
    for mine, theirs in zip(
        (results[name].prompt_logprobs or [])[1:], alone.prompt_logprobs[1:], strict=True
    ):
        assert mine is not None and theirs is not None and mine.keys() == theirs.keys()
        assert all(mine[token].logprob == pytest.approx(theirs[token].logprob) for token in mine)


def test_a_prompt_of_one_token_has_no_logprobs_to_report(idlm: Idlm) -> None:
    (result,) = LLM(idlm, branches="all").generate(
        [[3]], SamplingParams(max_tokens=2, seed=0, prompt_logprobs=0)
    )
    assert result.prompt_logprobs == [None]


def test_one_request_refused_leaves_the_others_alone(idlm: Idlm) -> None:
    page = 2 * 2 * 4 * 2 * 8 * DTYPE.itemsize
    llm = LLM(idlm, page_size=4, kv_memory=7 * page, branches="all")  # six pages: 24 tokens
    name = llm.engine.add([3, 4], SamplingParams(temperature=0, max_tokens=4), 0)
    with pytest.raises(InputError, match="12 pages of 6"):
        llm.engine.add([3] * 20, SamplingParams(max_tokens=100), 0)
    with pytest.raises(InputError, match="'nobody' is not loaded"):
        llm.engine.add([3], SamplingParams(max_tokens=2), 0, Terms("nobody"))
    with pytest.raises(InputError, match="needs a tokenizer"):
        llm.engine.add([3], SamplingParams(max_tokens=2, stop="x"), 0)
    assert [update.request_id for update in llm.engine.run() if update.result is not None] == [name]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"page_size": 1.5}, "page_size=1.5"),
        ({"prefill_tokens": -3}, "prefill_tokens=-3"),
        ({"kv_memory": "lots"}, "'lots' is no amount"),
        ({"kv_memory": 10}, "holds 0 pages"),
        ({"lookahead": 2}, "lookahead=2"),
        ({"stirde": 4}, "'stirde' is no option of an engine; use stride, branches"),
        ({"stride": 9, "branches": "all"}, "81 rows"),
        ({"branches": "most"}, "'most' is unknown"),
        ({"weights": "int4"}, "weights='int4' is unknown"),
        ({"threads": 0}, "threads=0"),
        ({"threads": "two"}, "threads='two'"),
    ],
)
def test_wrong_engine_options_are_refused(
    idlm: Idlm, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        LLM(idlm, **options)  # type: ignore[arg-type]


def test_memory_is_read_with_its_unit() -> None:
    assert [parse_memory(value) for value in (4096, "4096", "2KiB", "1.5 MiB", "1GiB")] == [
        4096,
        4096,
        2048,
        3 * 2**19,
        2**30,
    ]


@pytest.mark.parametrize("shares", [[0.9, 1.2], []])
def test_what_is_no_share_is_refused(idlm: Idlm, shares: list[float]) -> None:
    with pytest.raises(InputError, match="shares from 0 to 1"):
        simulate_acceptance(LLM(idlm, stride=2, branches="all").engine, shares)


def test_simulated_acceptance_is_what_was_asked_for(idlm: Idlm) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, seed=seed)
        for seed in range(64)
    ]
    llm = LLM(idlm, stride=4, branches="all")
    simulate_acceptance(llm.engine, [0.9, 0.5])
    results = llm.generate([[3, 4]] * 64, params)
    reached, accepted = (
        sum(getattr(one, name)[0] for one in results) for name in ("reached", "accepted")
    )
    assert accepted / reached == pytest.approx(0.9, abs=0.05)
    second = [sum(getattr(one, name)[1] for one in results) for name in ("accepted", "reached")]
    assert second[0] / second[1] == pytest.approx(0.5, abs=0.06)


def test_the_planner_chooses_among_plans_and_keeps_the_bytes(
    nano: Idlm, tmp_path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = SamplingParams(temperature=0.8, seed=2, max_tokens=40)
    llm = LLM(nano, stride=4, max_num_seqs=2)
    expected = LLM(nano, stride=1).chat(ASKED[:4], params)
    assert [one.token_ids for one in llm.chat(ASKED[:4], params)] == [
        one.token_ids for one in expected
    ]
    assert "tok/s" in llm.engine.planner.reason and sum(llm.engine.metrics.plans.values()) > 0


def test_the_first_to_decode_does_not_hold_up_the_many_that_came_with_it(
    nano: Idlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the times of a machine that does nothing else: how many prompt tokens a step takes
    follows from them."""
    engine = LLM(nano, max_num_seqs=32, branches="all").engine
    observe = engine.budget.observe

    def timed(plan: Plan, batch: int, prompt_tokens: int, seconds: float) -> None:
        seconds = 2e-3 * bool(batch) + 5e-4 * batch + 5e-5 * prompt_tokens
        observe(plan, batch, prompt_tokens, seconds)

    monkeypatch.setattr(engine.budget, "observe", timed)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    engine.add([5] * 12, params, 0)
    while not engine.scheduler.decoding:
        engine.step()
    engine.step()
    for number in range(20):
        engine.add([6 + number] * 12, params, 0)
    steps = 0
    while engine.scheduler.prefilling or not steps:
        engine.step()
        steps += 1
    assert steps <= 8 and len(engine.scheduler.decoding) == 21  # not one a step


def test_where_nobody_wants_drafts_every_step_is_ar(nano: Idlm) -> None:
    engine = LLM(nano, stride=4, branches="all").engine
    for drafting, plans in ((False, {"ar"}), (True, {"ar", "all-4"})):
        engine.add(
            [5] * 12, SamplingParams(max_tokens=12, ignore_eos=True), 0, Terms(drafting=drafting)
        )
        assert all(update.result is None or update.result.token_ids for update in engine.run())
        assert set(engine.metrics.plans) == plans


def test_the_planner_learns_from_requests_that_draft_and_tries_plans_beside_no_prompt(
    nano: Idlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LLM(nano, stride=4, max_num_seqs=8).engine
    planner, scheduler = engine.planner, engine.scheduler
    choose, asked, windows = planner.choose, [], set()

    def chosen(batch: int, drafting: int, ready: Callable[[Plan], bool]) -> Plan:
        asked.append((batch, drafting, bool(scheduler.prefilling), ready(AR)))
        choose(batch, drafting, ready)
        return Plan(4, "all")

    monkeypatch.setattr(planner, "choose", chosen)
    monkeypatch.setattr(planner, "observe_tokens", lambda plan, count, tokens: windows.add(count))
    monkeypatch.setattr(engine.runner, "ready", lambda key: True)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    for drafting in (True, False, False):
        engine.add([5] * 12, params, 0, Terms(drafting=drafting))
    for _ in engine.run():
        pass
    assert (3, 1, False, True) in asked and all(before != ready for *_, before, ready in asked)
    assert windows == {0, 1}  # 0 once the request that drafts has ended
