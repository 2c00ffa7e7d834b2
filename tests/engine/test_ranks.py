"""Engines whose model is split over two ranks: the tokens of one process, in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from idlm import LLM, InputError, SamplingParams, load
from idlm.engine.ranks import RankError
from tests.engine.split import REQUESTS, answers, checkpoint, engine, settings, with_an_abort
from tests.models.tiny import write

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="ranks on a CPU need CUDA_VISIBLE_DEVICES set to nothing"
)
WIDE = bool(os.environ.get("IDLM_TEST_RANKS"))
CASES: dict[str, tuple[str, int, str | None, dict[str, Any]]] = {
    "all outcomes, late entry, head": ("llama", 1, "mlp", {"stride": 3, "branches": "all"}),
    "chain": ("qwen3", 0, None, {"stride": 4, "branches": "chain", "record": False}),
}
if WIDE:
    CASES |= {
        "two branches": ("qwen2", 0, "markov", {"stride": 4, "branches": (0, 3)}),
        "stride 8, late": ("mistral", 1, "selector", {"stride": 8, "branches": "all"}),
        "results a step late": ("qwen3", 0, None, {"branches": "all", "lookahead": 1}),
        "lookup": ("llama", 0, None, {"stride": 4, "branches": "lookup"}),
        "AR": ("qwen3", 0, None, {"stride": 1}),
    }
SHOWN = [
    pytest.param(case, REQUESTS[name], id=f"{case}-{name}")
    for case in CASES
    for name in (REQUESTS if WIDE or case == "chain" else ("greedy", "sampled"))
]
ROUNDING = 1e-10


def test_a_rank_that_dies_ends_the_engine(tmp_path: Path) -> None:
    llm = LLM(str(write(tmp_path, "llama")), tensor_parallel_size=2, stride=1, kv_memory="1MiB")
    for child in psutil.Process().children():
        if "idlm.engine.rank" in child.cmdline():
            child.kill()
    with pytest.raises(RankError, match=r"rank 1 has ended \(its process ended with status -9\)"):
        llm.generate([[5, 9]] * 2, settings())
    with pytest.raises(RankError, match="rank 1 has ended"):
        llm.generate([[5, 9]], settings())
    llm.close()


@pytest.mark.parametrize(
    ("family", "keys", "options", "problem"),
    [
        ("llama", {}, {"tensor_parallel_size": 4}, "=4 does not divide the 2 KV heads .* 1, 2$"),
        ("llama", {"intermediate_size": 49}, {}, "=2 does not divide the 49 outputs .*gate_proj"),
        ("llama", {}, {"weights": "int8"}, "=2 does not go with weights='int8'"),
        ("llama", {}, {"device": "cpu:0"}, "=2 does not go with device 'cpu:0'; use 'cuda' "),
        ("llama", {}, {"deterministic": True}, "=2 does not go with deterministic=True"),
        ("llama", {}, {"changing": True}, "=2 does not go with adapters that change"),
        ("gpt2", {}, {}, "no tensor-parallel plan for 'gpt2'"),
        ("qwen3_moe", {}, {}, "splits .*experts.* by the rule '.*', which is not supported"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, family: str, keys: dict[str, Any], options: dict[str, Any], problem: str
) -> None:
    folder = str(write(tmp_path, family, **keys))
    with pytest.raises(InputError, match=problem):
        LLM(folder, **({"tensor_parallel_size": 2} | options))


def test_a_loaded_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="=2 does not go with a loaded model; give its folder"):
        LLM(load(write(tmp_path)), tensor_parallel_size=2)


@pytest.mark.skipif(not WIDE, reason="the wider sweep, IDLM_TEST_RANKS=1, has it")
def test_a_planner_chooses_for_all_ranks(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3")
    one, two = engine(folder, stride=4), engine(folder, ranks=2, stride=4)
    for params in (settings(), settings(temperature=1.0, seed=3)):
        pairs = zip(answers(one, params), answers(two, params), strict=True)
        assert all(b.token_ids == a.token_ids for a, b in pairs)
    two.close()


@dataclass
class Pair:
    """The same engine in one process and over two ranks."""

    one: LLM
    two: LLM


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    family, entry, head, options = CASES[request.param]
    folder = checkpoint(tmp_path_factory.mktemp("split"), family, entry, head)
    both = Pair(engine(folder, **options), engine(folder, ranks=2, **options))
    yield both
    both.two.close()


@pytest.mark.parametrize(("pair", "params"), SHOWN, indirect=["pair"])
def test_two_ranks_give_the_tokens_of_one_process(pair: Pair, params: SamplingParams) -> None:
    for one, two in zip(answers(pair.one, params), answers(pair.two, params), strict=True):
        assert two.token_ids == one.token_ids
        assert (two.reached, two.accepted) == (one.reached, one.accepted)
        assert two.cached_tokens == one.cached_tokens
        for own, other in zip(two.logprobs or [], one.logprobs or [], strict=True):
            assert own.keys() == other.keys()
            for token, entry in own.items():
                assert entry.logprob == pytest.approx(other[token].logprob, abs=ROUNDING)
    pair.two.engine.check()


def test_abort_pre_emption_and_prefix_cache(pair: Pair) -> None:
    before = pair.two.engine.metrics.preemptions
    for _ in range(2):
        one, two = with_an_abort(pair.one), with_an_abort(pair.two)
        assert [each.token_ids for each in two] == [each.token_ids for each in one]
        assert [each.cached_tokens for each in two] == [each.cached_tokens for each in one]
    assert any(each.cached_tokens for each in two)
    assert pair.two.engine.metrics.preemptions > before
    assert pair.two.engine.metrics.preemptions == pair.one.engine.metrics.preemptions


def test_each_rank_has_half_of_the_heads_and_layers(pair: Pair) -> None:
    whole, part = pair.one.idlm.model, pair.two.idlm.model
    assert part.num_parameters() < 0.75 * whole.num_parameters()
    own, all_heads = (llm.engine.runner.model_step.cache.pages[0] for llm in (pair.two, pair.one))
    assert own.shape[3] * 2 == all_heads.shape[3]
    assert own.shape[1] == all_heads.shape[1]
