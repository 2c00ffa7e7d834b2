"""Lookup drafts in the engine against the oracle: same tokens, same forwards, same drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from idlm import LLM, Idlm, InputError, SamplingParams
from idlm.config import EngineConfig
from idlm.decoding import reference
from idlm.decoding.costs import CostTable, RunningCosts
from idlm.decoding.lookup import LONGEST, PRIOR, RunningMatches
from idlm.decoding.plan import AR, LOOKUPS, Plan, RunningAcceptance
from idlm.engine.build import build_engine
from idlm.engine.lookup import LONG
from idlm.engine.lookup_planner import LookupPlanner
from idlm.engine.planner import LOOK_SHARE
from idlm.engine.request import Request, Result, Terms
from idlm.engine.results import SlotResult
from tests.engine.test_decoder import PARAMS
from tests.engine.test_guide import GUIDES, with_guide
from tests.engine.test_guide import PARAMS as GUIDED
from tests.engine.test_guide import PROMPT as LETTERS
from tests.engine.test_guide import idlm as lettered  # noqa: F401
from tests.engine.test_guide import oracle as guide_oracle
from tests.engine.tiny import tiny_idlm, with_lookups

PROMPT = [1, 2, 3, 5, 8, 2, 3, 5, 9, 2, 3]


@pytest.fixture(scope="module")
def bare() -> Idlm:
    """A model without a MASK row."""
    return tiny_idlm("qwen3", adapter=False)


@pytest.fixture(scope="module")
def adapted() -> Idlm:
    return tiny_idlm("qwen3")


def request(idlm: Idlm, params: SamplingParams) -> reference.Request:
    return reference.Request(PROMPT, params, idlm.mask_id, idlm.eos_ids, params.seed or 0)


def same(result: Result, expected: reference.Decoded) -> None:
    assert result.token_ids == expected.tokens
    assert result.forwards == expected.forwards
    assert (result.reached, result.accepted) == (expected.reached, expected.accepted)
    assert len(result.sources) == len(result.token_ids)
    assert result.sources.count("accepted") == sum(result.accepted)


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
@pytest.mark.parametrize("stride", [2, 5])
def test_equals_the_oracle(bare: Idlm, params: SamplingParams, stride: int) -> None:
    params = replace(params, max_tokens=24)
    (result,) = LLM(bare, stride=stride, branches="lookup").generate([PROMPT], params)
    same(result, reference.isd(bare.forward, request(bare, params), stride, "lookup", long=1))
    if params.verification == "coupled":
        assert result.token_ids == reference.ar(bare.forward, request(bare, params)).tokens


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
@pytest.mark.parametrize(("stride", "branches"), [(3, "chain"), (4, "all")])
def test_a_long_match_takes_the_place_of_masks(
    adapted: Idlm, params: SamplingParams, stride: int, branches: str
) -> None:
    params = replace(params, max_tokens=24)
    llm = LLM(adapted, stride=stride, branches=branches)
    with_lookups(llm.engine)
    (result,) = llm.generate([PROMPT], params)
    asked = request(adapted, params)
    same(result, reference.isd(adapted.forward, asked, stride, branches, long=LONG))


def test_long_matches_are_there_for_that_test(adapted: Idlm) -> None:
    params = replace(PARAMS[0], max_tokens=36)
    asked = request(adapted, params)
    with_lookup = reference.isd(adapted.forward, asked, 4, "all", long=LONG)
    assert with_lookup.accepted != reference.isd(adapted.forward, asked, 4, "all").accepted


@pytest.mark.parametrize("guide", GUIDES[:3], ids=range(3))
@pytest.mark.parametrize("params", GUIDED, ids=range(len(GUIDED)))
def test_a_guide_judges_lookup_drafts(
    lettered: Idlm,  # noqa: F811
    params: SamplingParams,
    guide: object,
) -> None:
    params, prompt = with_guide(params, guide), LETTERS * 3  # type: ignore[arg-type]
    allowed, seed = guide_oracle(lettered, guide), params.seed or 0  # type: ignore[arg-type]
    asked = reference.Request(prompt, params, lettered.mask_id, lettered.eos_ids, seed, allowed)
    expected = reference.isd(lettered.forward, asked, 4, "lookup", long=1)
    (result,) = LLM(lettered, stride=4, branches="lookup").generate([prompt], params)
    same(result, expected)


def test_stops_and_limits_within_accepted_drafts(bare: Idlm) -> None:
    llm = LLM(bare, stride=5, branches="lookup")
    plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (whole,) = llm.generate([PROMPT], plain)
    assert sum(whole.accepted) > 5
    accepted = [at for at, source in enumerate(whole.sources) if source == "accepted"]
    for params in (
        *(replace(plain, max_tokens=at + 1) for at in accepted[:6]),
        *(replace(plain, stop_token_ids=(whole.token_ids[at],)) for at in accepted[:6]),
        replace(plain, stop_token_ids=(whole.token_ids[accepted[0]],), min_tokens=12),
    ):
        (result,) = llm.generate([PROMPT], params)
        same(result, reference.isd(bare.forward, asked(bare, params), 5, "lookup", long=1))


def asked(idlm: Idlm, params: SamplingParams) -> reference.Request:
    """As `request`, with the ends that the settings name."""
    return reference.Request(PROMPT, params, idlm.mask_id, frozenset(params.stop_token_ids))


def test_no_drafts_for_who_wants_none(bare: Idlm) -> None:
    engine = build_engine(bare, EngineConfig(5, "lookup"))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for drafting in (True, False):
        name = engine.add(PROMPT, params, 0, Terms(drafting=drafting))
        (result,) = [each.result for each in engine.run() if each.result is not None]
        assert result.token_ids == reference.ar(bare.forward, asked(bare, params)).tokens, name
        assert (result.forwards < 20) == drafting and (result.drafted > 0) == drafting


def test_an_engine_without_a_mask_row_looks_up(bare: Idlm, adapted: Idlm) -> None:
    lookup = {"max_num_seqs": 1, "drafts": "lookup"}
    for idlm, options in ((bare, {"max_num_seqs": 1}), (adapted, lookup)):
        engine = LLM(idlm, **options).engine
        assert engine.planner.plans == [AR] and engine.lookups is not None
    for options in ({"drafts": "masks", "stride": 2}, {"stride": 1}, {"branches": "all"}):
        assert LLM(adapted, max_num_seqs=1, **options).engine.lookups is None
    with pytest.raises(InputError, match="branches='all'"):
        EngineConfig(4, "all", drafts="lookup")
    with pytest.raises(InputError, match="drafts='masks'"):
        EngineConfig(4, "lookup", drafts="masks")
    with pytest.raises(InputError, match="drafts='none'"):
        EngineConfig(drafts="none")


def test_the_planner_keeps_the_bytes_with_lookups_and_masks(adapted: Idlm) -> None:
    """Matches of the random model's loops are long, so lookup plans run beside those of MASK
    rows."""
    prompts = [PROMPT[:n] for n in (3, 7, 10)]
    params = [replace(each, max_tokens=30) for each in PARAMS[:5]]
    ar, auto = LLM(adapted, stride=1), LLM(adapted, stride=2, max_num_seqs=2)
    for one in params:
        for mine, its in zip(auto.generate(prompts, one), ar.generate(prompts, one), strict=True):
            assert mine.token_ids == its.token_ids
    assert any(name.startswith("lookup") for name in auto.engine.metrics.plans)


ACCEPTANCE = RunningAcceptance(3)
replaced: list[int] = []


def planner(ar: float, lookup: Sequence[float]) -> LookupPlanner:
    table = CostTable()
    for plan, seconds in zip((AR, *LOOKUPS), (ar, *lookup), strict=True):
        table.put(1, plan, seconds)
    return LookupPlanner(LOOKUPS, RunningCosts(table), ACCEPTANCE, replaced.append)


def matched(*lengths: int) -> list[Request]:
    requests = [SimpleNamespace(matched=length, guess=7) for length in lengths]
    return cast(list[Request], requests)


def slot(drafted: int, accepted: int, token: int = 7) -> SlotResult:
    return SlotResult([token], 1, drafted, accepted, 0, 0)


def test_lookup_plans_run_where_a_match_is_worth_their_time() -> None:
    lookups = planner(1.0, [1.4, 1.6, 2.0])
    assert lookups.choose(AR, matched(0)) == AR
    assert lookups.choose(AR, matched(1)) == AR
    assert lookups.choose(AR, matched(8)) == LOOKUPS[2]
    assert planner(1.0, [1.2, 9.0, 9.0]).choose(AR, matched(8)) == LOOKUPS[0]
    assert planner(1.0, [9.0, 9.0, 9.0]).choose(AR, matched(8)) == AR


def test_plans_of_mask_rows_run_on_where_they_are_better() -> None:
    masks = Plan(4, "all")
    lookups = planner(1.0, [1.2, 1.5, 2.0])
    lookups.costs.table.put(1, masks, 1.6)
    assert lookups.choose(masks, matched(8)) == LOOKUPS[2]
    assert lookups.choose(masks, matched(3)) == masks
    lookups.costs.table.put(4, masks, 2.0)
    for plan, cost in zip(LOOKUPS, (2.0, 2.5, 3.5), strict=True):
        lookups.costs.table.put(4, plan, cost)
    assert lookups.choose(masks, matched(8, 0, 0, 0)) == masks, "three requests would lose drafts"


@pytest.mark.parametrize(("share", "long"), [(0.1, 1), (0.58, 3), (0.75, 4), (0.99, LONGEST + 1)])
def test_lookup_drafts_take_the_place_of_worse_ones(share: float, long: int) -> None:
    """By the priors; a draft of a MASK row is accepted with the chance `share`."""
    lookups = planner(1.0, [1.2, 1.5, 2.0])
    lookups.acceptance = RunningAcceptance(3, prior=share)
    lookups.costs.table.put(1, Plan(4, "all"), 1.1)
    replaced.clear()
    lookups.choose(Plan(4, "all"), [])
    assert replaced == [long]


def test_what_is_not_tried_is_forgotten() -> None:
    running = RunningMatches()
    for _ in range(200):
        running.update(LONGEST, 1, 0)
    assert running.values[-1] < 0.3
    for _ in range(400):
        running.forget()
    assert running.values == pytest.approx(PRIOR, abs=0.01)


def test_steps_of_ar_teach_what_drafts_are_worth() -> None:
    lookups = planner(1.0, [1.2, 1.5, 2.0])
    (one,) = matched(8)
    for _ in range(300):
        lookups.observe(one, slot(0, 0, token=1))
    assert lookups.choose(AR, [one]) == AR
    for _ in range(300):
        lookups.observe(one, slot(0, 0))
    assert lookups.choose(AR, [one]) == LOOKUPS[2]
    for _ in range(300):
        lookups.observe(one, slot(8, 0))
    assert lookups.choose(AR, [one]) == AR


def test_a_plan_that_seems_too_slow_is_tried_for_a_small_share_of_the_time() -> None:
    """The table has ten times the real cost of lookup plans; AR's steps alone would never tell."""
    lookups, real = (
        planner(1.0, [12.0, 15.0, 20.0]),
        dict(zip(LOOKUPS, (1.2, 1.5, 2.0), strict=True)),
    )
    plans = []
    for _ in range(int(40 / LOOK_SHARE)):
        plan = lookups.choose(AR, matched(8))
        plans.append(plan)
        lookups.observe_cost(1, plan, real.get(plan, 1.0))
    first = next(at for at, plan in enumerate(plans) if plan != AR)
    assert first >= 5 / LOOK_SHARE, "not before its price has been saved"
    assert plans[-100:].count(AR) == 0
