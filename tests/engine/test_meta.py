"""What a GPU would run in a step, seen on the `meta` device: no operator that waits for it or
leaves it, few launches, and memory that the plan has room for."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest

from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features
from idlm.engine.budget import PREFILL_ALONE
from idlm.engine.memory import GRAPHS_MEMORY, gpu_share
from idlm.engine.prefill import Chunk
from idlm.models.idlm_model import Idlm
from tests.engine.on_meta import qwen, watch

pytest.importorskip("triton", reason="triton is not installed: a GPU would run other kernels")
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LARGE = {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
ALL_4, CHAIN_4 = Plan(4, "all"), Plan(4, "chain")
GIB = 2**30
KINDS = {"greedy": Features()}
KINDS |= {one.name: Features(**{"sampled": True, one.name: True}) for one in fields(Features)}


@cache
def small(layers: int = 2, adapters: int = 0) -> Idlm:
    return qwen(SMALL, layers, adapters)


@pytest.mark.parametrize("plan", [AR, CHAIN_4, ALL_4], ids=lambda plan: plan.name)
@pytest.mark.parametrize("features", KINDS.values(), ids=KINDS)
def test_no_step_waits_for_the_device_or_leaves_it(features: Features, plan: Plan) -> None:
    assert watch(small(adapters=1), plan, 3, features).launches


@pytest.mark.parametrize("plan", [AR, ALL_4], ids=lambda plan: plan.name)
def test_nor_does_one_with_logprobs_or_several_adapters_or_a_prefill(plan: Plan) -> None:
    assert watch(small(adapters=3), plan, 3, KINDS["sampled"], logprobs=5).launches
    assert watch(small(), plan, 3, chunks=[Chunk(0, [1, 2, 3], 0), Chunk(1, [1, 2], 0)]).launches


def launches_of_a_layer(plan: Plan, adapters: int, few: bool) -> float:
    counts = [watch(small(n, adapters), plan, 2, few=few).launches.total() for n in (2, 4)]
    return (counts[1] - counts[0]) / 2


@pytest.mark.parametrize(
    "plan, adapters, most",
    [(AR, 0, 10), (CHAIN_4, 0, 10), (ALL_4, 0, 10), (AR, 1, 10), (ALL_4, 1, 18), (ALL_4, 3, 18)],
)
def test_launches_of_a_layer_stay_within_their_budget(plan: Plan, adapters: int, most: int) -> None:
    assert launches_of_a_layer(plan, adapters, few=True) <= most


@pytest.mark.parametrize(
    "plan, adapters, most",
    [(AR, 0, 31), (CHAIN_4, 0, 34), (ALL_4, 0, 34), (ALL_4, 1, 48), (ALL_4, 3, 55)],
)
def test_so_do_those_of_any_layer(plan: Plan, adapters: int, most: int) -> None:
    """Of a layer that is not of the usual kind."""
    assert launches_of_a_layer(plan, adapters, few=False) <= most


@pytest.mark.parametrize("few", [True, False])
def test_launches_of_a_layer_do_not_grow_with_the_adapters(few: bool) -> None:
    assert launches_of_a_layer(ALL_4, 2, few) == launches_of_a_layer(ALL_4, 3, few)


@pytest.mark.parametrize("card", [24, 80])
def test_graphs_and_the_largest_prefill_fit_beside_the_cache(card: int) -> None:
    """Of Qwen3-8B in bf16 for 64 requests. A graph's memory is what lives at once in its step; the
    graphs share it. A layer's results do not outlive it, so two layers show what 36 take."""
    idlm = qwen(LARGE, 2, 0)
    graphs = max(
        watch(idlm, plan, 64, features).peak
        for plan in (AR, CHAIN_4, ALL_4)
        for features in (Features(), Features(sampled=True, filtered=True, ranked=True))
    )
    assert graphs <= 1.5 * GIB
    prefill = watch(idlm, AR, 64, chunks=[Chunk(0, [1] * PREFILL_ALONE, 0)]).peak
    free = int(0.98 * card * GIB) - 2 * 8_190_735_360  # the weights
    share = gpu_share(free, prefill)
    assert share >= GIB and share + prefill + graphs + GRAPHS_MEMORY // 4 <= free
