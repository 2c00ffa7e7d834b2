"""The closed loop serves all requests with a fixed number in flight; figures are those of the
runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from idlm import LLM, load
from idlm.evaluation.closed_loop import BenchEngine, Run, Served, bench_engines, closed_loop
from idlm.evaluation.serving_bench import bench, row
from idlm.evaluation.workload import Request, workload
from idlm.models.idlm_model import Idlm


@pytest.fixture(scope="module")
def idlm(checkpoint: Path) -> Idlm:
    return load(checkpoint / "base", adapter=str(checkpoint / "lora"), dtype="float64")


Book = list[tuple[str, list[Request], int]]
"""Mode, requests and concurrency of each call."""


class Scripted:
    """An engine with a known time for every token, which records its calls."""

    simulated = False

    def __init__(self, engine: str, mode: str, seconds: Sequence[float], book: Book) -> None:
        self.engine, self.mode, self.book = engine, mode, book
        self._seconds = iter(seconds)

    def run(self, requests: Sequence[Request], concurrency: int) -> Run:
        self.book.append((self.mode, list(requests), concurrency))
        second = next(self._seconds)
        served = [
            Served([7] * request.max_tokens, second, second / 10, second * 2)
            for request in requests
        ]
        return Run(
            second * sum(request.max_tokens for request in requests), 1.0, 100.0 * second, served
        )


def draw(count: int, seed: int) -> list[Request]:
    return [Request([seed, index], 2 + index) for index in range(count)]


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_the_loop_keeps_its_number_in_flight(idlm: Idlm, concurrency: int) -> None:
    requests = workload(idlm)(9, 1)
    results = closed_loop(
        LLM(idlm, stride=2, max_num_seqs=8, branches="all"), requests, concurrency
    )
    assert [result.prompt_token_ids for result in results] == [
        request.prompt_token_ids for request in requests
    ]
    assert [len(result.token_ids) for result in results] == [
        request.max_tokens for request in requests
    ]
    spans = [(result.timing.arrival, result.timing.finished or 0.0) for result in results]
    together = [sum(start <= arrival < end for start, end in spans) for arrival, _ in spans]
    assert max(together) == min(concurrency, 9)


def test_modes_do_the_same_work_and_ar_runs_one_row_a_token(idlm: Idlm) -> None:
    ours = bench_engines(idlm, ("ar", "chain", "all"), 3, 4)
    rows = {str(row["mode"]): row for row in bench(ours, workload(idlm), [2], 4, 1)}
    assert all(row["same_as_ar"] == 1.0 and row["simulated"] is False for row in rows.values())
    assert len({row["tokens"] for row in rows.values()}) == 1
    ar = rows["ar"]
    assert (ar["tpf"], ar["tpf_decode"], ar["tpf_expected"], ar["flops_per_token_over_ar"]) == (
        1,
        1,
        1,
        1,
    )
    assert rows["chain"]["plans"] == {"chain-3": rows["chain"]["plans"]["chain-3"]}  # type: ignore[index]
    assert 1 <= float(str(rows["all"]["tpf_decode"])) <= 3
    assert (
        float(str(rows["all"]["flops_per_token_over_ar"]))
        > float(str(rows["chain"]["flops_per_token_over_ar"]))
        > 1
    )


@pytest.mark.parametrize(("shares", "tpf"), [([1.0], 3.0), ([0.0], 1.0), ([1.0, 0.0], 2.0)])
def test_simulated_acceptance_is_labelled_and_gives_its_tpf(
    idlm: Idlm, shares: list[float], tpf: float
) -> None:
    ours = bench_engines(idlm, ("ar", "all"), 3, 4, shares)
    ar, simulated = bench(ours, workload(idlm), [2], 4, 1)
    assert (ar["simulated"], simulated["simulated"], simulated["same_as_ar"]) == (False, True, None)
    assert simulated["tpf_decode"] == simulated["tpf_expected"] == pytest.approx(tpf)
    assert simulated["tokens"] == ar["tokens"]


def test_engines_take_turns_on_new_requests_each_round() -> None:
    book: Book = []
    pair: list[BenchEngine] = [Scripted("idlm", mode, [1.0] * 6, book) for mode in ("ar", "all")]
    calls: list[None] = []
    bench(pair, draw, [2, 8], count=5, repeats=2, advance=lambda: calls.append(None))
    assert [mode for mode, _, _ in book] == ["ar", "all"] * 6 and len(calls) == 12
    rounds = list(zip(book[::2], book[1::2], strict=True))
    assert all(left[1] == right[1] for left, right in rounds)
    assert [(concurrency, len(asked)) for (_, asked, concurrency), _ in rounds] == [(2, 5)] * 3 + [
        (8, 16)
    ] * 3
    assert len({asked[0].prompt_token_ids[0] for (_, asked, _), _ in rounds[:3]}) == 3


def test_figures_are_medians_and_ratios_are_of_the_same_round() -> None:
    book: Book = []
    warm_up = 99.0
    ar = Scripted("idlm", "ar", [warm_up, 0.1, 0.2, 0.4], book)
    other = Scripted("vllm", "eager", [warm_up, 0.05, 0.05, 0.4], book)
    first, second = bench([ar, other], draw, [2], count=50, repeats=3)
    assert first["tokens_per_second"] == pytest.approx(5)
    assert first["tokens_per_second_range"] == pytest.approx([2.5, 10])
    assert (second["speedup_over_ar"], second["speedup_range"]) == (
        pytest.approx(2),
        pytest.approx([1, 4]),
    )
    assert first["speedup_over_ar"] == 1 and second["same_as_ar"] == 1.0
    assert (first["ttft_ms"], first["ttft_ms_p99"]) == (pytest.approx(200), pytest.approx(400))
    assert (second["tpot_ms"], second["worst_gap_ms"]) == (pytest.approx(5), pytest.approx(800))
    assert first["peak_memory_mb"] == pytest.approx(40) and first["requests"] == 150
    assert first["tpf"] is first["acceptance"] is first["flops_per_token_over_ar"] is None


def test_one_slow_request_in_a_hundred_is_not_the_99th_percentile_and_two_are() -> None:
    def served(slow: int) -> list[Served]:
        return [Served([1], 9.0 if index < slow else 1.0, 1.0, 1.0) for index in range(100)]

    one, two = (
        row(Scripted("idlm", "ar", [], []), 1, [Run(1.0, 1.0, 1.0, served(slow))], None)
        for slow in (1, 2)
    )
    assert (one["ttft_ms_p99"], two["ttft_ms_p99"]) == (pytest.approx(1e3), pytest.approx(9e3))
    assert one["speedup_over_ar"] is None


def test_a_token_that_differs_from_ar_shows() -> None:
    runs = [
        [Run(1.0, 1.0, 1.0, [Served([1, 2], 1, 1, 1), Served([end], 1, 1, 1)])] for end in (3, 4)
    ]
    found = row(Scripted("idlm", "all", [], []), 1, runs[0], runs[1])
    assert found["same_as_ar"] == 0.5
