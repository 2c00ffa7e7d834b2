"""Which implementation is used: what is made of timings, where they are kept, and what the log
says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from idlm.config import EngineConfig
from idlm.engine import products
from idlm.engine.build import build_engine
from idlm.kernels import choice, fused, native
from idlm.kernels.choice import ROWS, Timing, choose_linears, drafts_pay, fastest
from idlm.kernels.linears import ALWAYS, Linears
from idlm.params import SamplingParams
from tests.engine.tiny import tiny_idlm

pytestmark = pytest.mark.skipif(
    not native.loaded(), reason="no C compiler: there is nothing to test"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for what is found."""
    native.loaded()  # from where it always lies
    monkeypatch.setattr(native, "user_cache", lambda name: tmp_path / name)
    return tmp_path / "choices"


def timings(*wins: tuple[int, bool]) -> list[Timing]:
    return [Timing(rows, 1.0 if win else 2.0, 1.5) for rows, win in wins]


def clock(monkeypatch: pytest.MonkeyPatch, *ours: float) -> list[int]:
    """Fake timings: ours takes these seconds, in turn and again from the first, and PyTorch 1;
    counts the calls."""
    calls: list[int] = []

    def timed(candidates: Sequence[object], rounds: int = 0, products: int = 1) -> list[float]:
        calls.append(len(candidates))
        return [ours[(len(calls) - 1) % len(ours)], 1.0]

    monkeypatch.setattr(choice, "fastest", timed)
    return calls


def test_the_least_of_all_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    durations, now, order = {"a": [9, 3, 2, 5], "b": [1, 7, 4, 6]}, [0.0], list[str]()

    def call(name: str) -> Callable[[], object]:
        def run() -> None:
            now[0] += durations[name][order.count(name)]
            order.append(name)

        return run

    monkeypatch.setattr(choice, "perf_counter", lambda: now[0])
    assert fastest([call("a"), call("b")], rounds=3) == [2, 1]
    assert "".join(order) == "abababab"


def test_a_tie_and_noise_are_ours() -> None:
    assert Timing(1, 1.0, 1.0).wins
    assert Timing(1, 1.02, 1.0).wins
    assert not Timing(1, 1.05, 1.0).wins


@pytest.mark.parametrize(
    ("wins", "rows"),
    [
        ([True] * 8, range(1, 2000)),
        ([False] * 8, ()),
        ([True, True, True, False, False, False, False, False], range(1, 5)),
        ([False, False, True, True, False, False, False, True], [*range(3, 9), *range(65, 2000)]),
        ([True, False], [1]),  # the time was up: what was measured last stands for more rows
        ([False, True], range(2, 2000)),
    ],
)
def test_a_choice_by_row_counts(wins: list[bool], rows: Sequence[int]) -> None:
    bits = choice._bits(timings(*zip(ROWS, wins, strict=False)))
    assert [count for count in range(1, 2000) if bits >> (count - 1).bit_length() & 1] == list(rows)
    assert -(2**63) <= bits < 2**63
    assert (bits == ALWAYS) == all(wins)


def test_the_log_has_ranges_of_rows() -> None:
    name = native.instruction_set()
    assert name is not None
    ours = f"C/{name.name}"
    found = choice._line("linear 8x40", timings((1, True), (2, True), (4, False), (8, True)))
    assert found == (
        f"linear 8x40: 1+ rows {ours} 1000.000 ms (torch 1500.000), "
        f"4+ rows torch 1500.000 ms ({ours} 2000.000), "
        f"8+ rows {ours} 1000.000 ms (torch 1500.000)"
    )


def three(format: str = "float32") -> Linears:
    """Three layers of two shapes."""
    return Linears([[torch.randn(40, 8)], [torch.randn(40, 8)], [torch.randn(8, 40)]], format)


def test_layers_of_one_shape_get_one_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linears, slow_from_64 = three(), (0.5,) * 6 + (2.0,) * 2
    clock(monkeypatch, *slow_from_64)
    with caplog.at_level("INFO", "idlm"):
        choose_linears(linears)
    assert [layer.choice for layer in linears.layers] == [0b111111] * 3
    assert (
        caplog.text.count("linear 8x40: 1+ rows C/")
        == caplog.text.count("linear 40x8: 1+ rows C/")
        == 1
    )
    assert "64+ rows torch 1000.000 ms (C/" in caplog.text


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    calls = clock(monkeypatch, 0.5, 2.0)
    first, second = three(), three()
    choose_linears(first)
    assert len(calls) == 2 * len(ROWS)
    choose_linears(second)
    assert len(calls) == 2 * len(ROWS)
    assert [layer.choice for layer in first.layers] == [layer.choice for layer in second.layers]
    choose_linears(Linears([[torch.randn(16, 16)]], "float32"))  # another model
    assert len(calls) == 3 * len(ROWS)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "7",
        "null",
        '{"8x40": 5}',
        '{"8x40": [[1, 2]]}',
        '{"8x40": [[1, "a", 2]]}',
        '{"8x40": []}',
    ],
)
def test_a_file_that_holds_something_else_is_measured_anew(
    content: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    calls = clock(monkeypatch, 0.5)
    choose_linears(three())
    (path,) = cache.iterdir()
    valid = json.loads(path.read_text())
    path.write_text(content)
    linears = three()
    choose_linears(linears)
    assert len(calls) == 4 * len(ROWS)
    assert all(layer.choice == ALWAYS for layer in linears.layers)
    assert json.loads(path.read_text()) == valid


def test_without_a_place_to_write_it_is_measured_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "choices").write_text("a file where the folder should be")
    calls = clock(monkeypatch, 0.5)
    for start in (1, 2):
        choose_linears(three())
        assert len(calls) == 2 * start * len(ROWS)


def test_timing_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = clock(monkeypatch, 0.5)
    choose_linears(three(), seconds=0.0)
    assert len(calls) == 2  # one row count for each shape


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_other_formats_have_no_alternative(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, linears = clock(monkeypatch, 2.0), three(format)
    choose_linears(linears)
    assert not calls
    assert all(layer.choice == ALWAYS for layer in linears.layers)


def test_timing_draws_nothing_from_torchs_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    linears = Linears([weights := [torch.ones(40, 8)]], "float32")
    choose_linears(linears)
    drafts_pay(linears, {id(weights[0]): 4})
    fused.faster_operators(8, 16, 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("ours", "better"), [(0.5, "int8 weights of their own"), (2.0, "the model's weights and the")]
)
def test_weights_of_mask_rows_are_timed(
    ours: float, better: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock(monkeypatch, ours)
    model = tiny_idlm("qwen3")
    model.model.float()
    with caplog.at_level("INFO", "idlm"):
        linears = build_engine(
            model, EngineConfig(4, "all", max_num_seqs=2)
        ).runner.model_step.products.linears
    assert linears is not None
    assert linears.drafts == (ours < 1)
    assert f"MASK rows: {better}" in caplog.text


def test_only_faster_operators_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock(monkeypatch, 0.5, 2.0, 1.0)
    with caplog.at_level("INFO", "idlm"):
        assert fused.faster_operators(8, 16, 2, 4) == {"rms_norm", "swiglu"}
    assert "rms_norm: C; C 500.000 ms, torch 1000.000" in caplog.text
    assert "rotate: torch; C 2000.000 ms, torch 1000.000" in caplog.text


@pytest.mark.parametrize(
    "used",
    [set(), {"rms_norm"}, {"rotate"}, {"swiglu"}, set(fused.OPERATORS)],
    ids=["none", "norm", "rotate", "swiglu", "all"],
)
def test_a_recording_has_the_operators_that_were_chosen(
    used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "faster_operators", lambda *shape: frozenset(used))
    found, fuse = set[str](), fused.fuse

    def kept_graph(graph: torch.Graph, *arguments: Any) -> None:
        fuse(graph, *arguments)
        found.update(node.kind() for node in graph.nodes())

    monkeypatch.setattr("idlm.engine.record.fuse", kept_graph)
    model = tiny_idlm("qwen3")
    model.model.float()
    engine = build_engine(model, EngineConfig(4, "all", max_num_seqs=2))
    engine.add([5, 6, 7], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True), 0)
    list(engine.run())
    assert "aten::softmax" in found or "idlm::window_attention" in found
    assert {name for name in fused.OPERATORS if f"idlm::{name}" in found} == used
