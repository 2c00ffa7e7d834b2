"""Top-k, top-p and min-p without a sort keep the tokens that the sort keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm import SamplingParams
from idlm.config import EngineConfig
from idlm.decoding.law import filtered
from idlm.decoding.settings import Features, Settings
from idlm.engine.build import build_engine
from idlm.kernels import keep
from tests.attention.oracle import DEVICE
from tests.engine.tiny import tiny_idlm

REQUESTS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=50),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=1.8, top_p=0.95),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.999, min_p=0.2),
    SamplingParams(top_p=1e-4),
    SamplingParams(top_p=1 - 1e-12),
]
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "many ties": lambda x: x.round(),
    "two values": lambda x: (x > 4).to(x.dtype),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "float64": lambda x: x.to(torch.float64) + 1e-12 * x.to(torch.float64).round(),
    "few allowed": lambda x: x.index_fill(
        2, torch.arange(30, x.shape[2], device=x.device), -torch.inf
    ),
    "none allowed": lambda x: torch.full_like(x, -torch.inf),
    "one far above": lambda x: x.index_fill(2, torch.tensor([7], device=x.device), 1e30),
    "steep": lambda x: 300 * x,
}


def table(requests: list[SamplingParams], vocab: int, device: torch.device) -> Settings:
    rows = Settings.empty(len(requests), vocab, vocab, device)
    for slot, params in enumerate(requests):
        rows.put(slot, params, seed=slot, prompt=[0])
    return rows


def by_candidates(scores: Tensor, rows: Settings) -> Tensor:
    return keep.keep(scores, rows.temperature, rows.top_k, rows.top_p, rows.min_p)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_and_kernel_keep_what_the_sort_keeps(kind: str) -> None:
    random = torch.Generator().manual_seed(len(kind))
    logits = 3 * torch.randn(len(REQUESTS), 2, 300, generator=random)
    scores, rows = KINDS[kind](logits), table(REQUESTS, 300, torch.device("cpu"))
    expected = filtered(scores, rows, rows.features)
    assert torch.equal(by_candidates(scores, rows), expected)
    pytest.importorskip("triton", reason="triton is not installed: there is no kernel to test")
    from idlm.kernels.keep_triton import keep_rows

    rows = table(REQUESTS, 300, DEVICE)
    assert torch.equal(keep_rows(scores.to(DEVICE), rows, rows.features).cpu(), expected)


@settings(max_examples=150, deadline=None)
@given(
    equal=st.integers(1, 60),
    share=st.integers(1, 60),
    others=st.lists(st.sampled_from([-1.0, -0.5, -3.0, -800.0, -torch.inf]), max_size=20),
    k=st.sampled_from([0, 1, 7, 30]),
    nudge=st.sampled_from([0.0, 1e-17, 1e-16, -1e-16, 1e-13, -1e-13]),
)
def test_a_mass_that_rounding_decides_is_decided_as_by_the_sort(
    equal: int, share: int, others: list[float], k: int, nudge: float
) -> None:
    """top_p is a share of equal tokens: sums in another order may fall on the other side of it."""
    scores = torch.tensor([0.0] * equal + others)[torch.randperm(equal + len(others))]
    top_p = min(max(share / equal + nudge, 1e-9), 1.0)
    rows = table([SamplingParams(top_p=top_p, top_k=k)], len(scores), torch.device("cpu"))
    every = Features(sampled=True, filtered=True, ranked=True)
    assert torch.equal(
        by_candidates(scores[None, None], rows), filtered(scores[None, None], rows, every)
    )


def test_only_rows_that_rounding_decides_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_rows: list[int] = []
    by_sort = keep._by_sort
    monkeypatch.setattr(keep, "_by_sort", lambda *of: sorted_rows.append(1) or by_sort(*of))
    rows = table(REQUESTS, 20_000, torch.device("cpu"))
    by_candidates(3 * torch.randn(len(REQUESTS), 1, 20_000), rows)
    assert len(sorted_rows) == 1, "that of top_p 1 - 1e-12"
    by_candidates(torch.zeros(len(REQUESTS), 1, 20_000), rows)
    assert len(sorted_rows) > 2, "0.9 of 20,000 equal tokens is a whole number of them"


def test_slots_without_a_filter_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "dropped_of", None)
    rows, scores = table(REQUESTS[:2], 50, torch.device("cpu")), torch.randn(2, 3, 50)
    kept = by_candidates(scores, rows)
    assert torch.equal(kept, scores) and kept.data_ptr() != scores.data_ptr()


def test_recorded_steps_filter_as_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "SMALL", 1)
    idlm, called = tiny_idlm("qwen3"), []
    original = keep.dropped_of
    monkeypatch.setattr(keep, "dropped_of", lambda *of: called.append(1) or original(*of))
    outputs = []
    for record, small in ((True, 1), (False, 1), (False, 10**6)):
        monkeypatch.setattr(keep, "SMALL", small)
        engine = build_engine(idlm, EngineConfig(3, "all", record=record))
        for number, params in enumerate(REQUESTS):
            engine.add([3, 4, 5 + number], replace(params, max_tokens=24, ignore_eos=True), 0)
        outputs.append(
            {
                update.request_id: update.result.token_ids
                for update in engine.run()
                if update.result is not None
            }
        )
        assert bool(called) == (small == 1)
        called.clear()
    assert list(outputs[0].values()) == list(outputs[1].values()) == list(outputs[2].values())


def test_the_filter_is_chosen_for_the_device() -> None:
    pytest.importorskip("triton", reason="triton is not installed: a GPU would sort")
    from idlm.kernels.keep_triton import keep_rows

    assert keep.rules(torch.device("cpu"))[1] is keep.keep_on_cpu
    assert keep.rules(torch.device("cuda"))[1] is keep_rows
    assert keep.rules(torch.device("meta"))[1] is filtered
