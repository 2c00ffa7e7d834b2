"""Engines under load, in turn, and the figures of each.

Contestants run A B A B ... within one call, so that what else the machine does hits them alike;
ratios are taken round by round. Every round has new requests, the same for all contestants: no
cache lives off the round before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from statistics import median

from idlm.decoding.plan import expected_tokens
from idlm.evaluation.closed_loop import Contestant, Decoding, Run
from idlm.evaluation.metrics import summary, tpf_decode
from idlm.evaluation.workload import Draw

Row = dict[str, object]


def bench(
    contestants: Sequence[Contestant],
    draw: Draw,
    concurrencies: Sequence[int],
    number: int,
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row for every concurrency and contestant.

    A round has `number` requests, but at least twice as many as are in flight. The first of
    `repeats` + 1 rounds warms up and is not counted. `advance` is called after each run.
    """
    rows: list[Row] = []
    for concurrency in concurrencies:
        runs: list[list[Run]] = [[] for _ in contestants]
        for seed in range(repeats + 1):
            requests = draw(max(number, 2 * concurrency), seed)
            for contestant, laps in zip(contestants, runs, strict=True):
                laps.append(contestant.run(requests, concurrency))
                advance()
        counted = [laps[1:] for laps in runs]
        ar = next(
            (laps for one, laps in zip(contestants, counted, strict=True) if _is_ar(one)), None
        )
        rows += [
            row(one, concurrency, laps, ar) for one, laps in zip(contestants, counted, strict=True)
        ]
    return rows


def _is_ar(contestant: Contestant) -> bool:
    return (contestant.engine, contestant.mode) == ("idlm", "ar")


def row(
    contestant: Contestant, concurrency: int, runs: Sequence[Run], ar: Sequence[Run] | None
) -> Row:
    """The figures of one contestant: medians over rounds, or over all requests of all rounds; None
    where unknown.

    `same_as_ar` is the share of requests with AR's tokens, which simulated acceptance cannot give.
    Ratios are of the same round.
    """
    rates = [run.tokens_per_second for run in runs]
    served = [one for run in runs for one in run.served]
    found: Row = {
        "engine": contestant.engine,
        "mode": contestant.mode,
        "simulated": contestant.simulated,
        "concurrency": concurrency,
        "tokens_per_second": median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        **_against(runs, ar),
        **({"same_as_ar": None} if contestant.simulated else {}),
        **_decoded([run.decoding for run in runs if run.decoding is not None]),
        **_latency("ttft_ms", [one.ttft for one in served]),
        **_latency("tpot_ms", [one.tpot for one in served]),
        "worst_gap_ms": 1e3 * max(one.worst_gap for one in served),
        "peak_memory_mb": max(run.peak_memory_mb for run in runs),
        "tokens_per_cpu_second": median(run.tokens / run.cpu_seconds for run in runs),
        "requests": len(served),
        "tokens": sum(run.tokens for run in runs),
    }
    return found


def _against(runs: Sequence[Run], ar: Sequence[Run] | None) -> Row:
    if ar is None:
        return {"speedup_over_ar": None, "speedup_range": None, "same_as_ar": None}
    ratios = [
        run.tokens_per_second / other.tokens_per_second for run, other in zip(runs, ar, strict=True)
    ]
    pairs = [
        pair
        for run, other in zip(runs, ar, strict=True)
        for pair in zip(run.served, other.served, strict=True)
    ]
    same = sum(mine.token_ids == theirs.token_ids for mine, theirs in pairs)
    return {
        "speedup_over_ar": median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "same_as_ar": same / len(pairs),
    }


def _decoded(runs: Sequence[Decoding]) -> Row:
    """What our engine tells.

    `tpf` counts prefills and windows cut short by a request's end; `tpf_decode` does not, and is
    what `tpf_expected` predicts from the acceptance. FLOPs per token are window rows run for each
    token: AR runs one.
    """
    if not runs:
        names = (
            "tpf",
            "tpf_decode",
            "tpf_expected",
            "acceptance",
            "flops_per_token_over_ar",
            "plans",
            "host_share",
            "reason",
        )
        return dict.fromkeys(names)
    results = [result for run in runs for result in run.results]
    totals, plan = summary(results), runs[0].plan
    known = [share for share in totals["acceptance"] if share is not None]
    return {
        "tpf": totals["tpf"],
        "tpf_decode": tpf_decode(results),
        "tpf_expected": None
        if plan is None or (plan.drafts and not known)
        else expected_tokens(plan, known),
        "acceptance": totals["acceptance"],
        "flops_per_token_over_ar": sum(run.rows for run in runs) / totals["tokens"],
        "plans": dict(sum((run.plans for run in runs), Counter())),
        "host_share": median(run.host_share for run in runs),
        "reason": runs[-1].reason,
    }


def _latency(name: str, seconds: Sequence[float]) -> Row:
    ordered = sorted(seconds)
    return {
        name: 1e3 * median(ordered),
        f"{name}_p99": 1e3 * ordered[ceil(0.99 * len(ordered)) - 1],
    }
