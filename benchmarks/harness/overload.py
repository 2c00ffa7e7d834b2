"""More requests than a server can answer; see `benchmarks.server_faults`."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.harness.client import Answer, Connection, ask_all
from benchmarks.harness.process import HANG_SECONDS, ServerProcess
from benchmarks.harness.results import percentile
from benchmarks.harness.workload import COMPLETIONS, bodies

FACTOR = 4.0
MOST_RATIO = 1.5
MOST_REFUSAL_MS = 5.0
"""The median time of a refusal."""
LEAST_PER_SLOT = 4
"""The least number of requests of each part for each slot, however long they take: on a slow
machine none may finish within the seconds."""
Body = dict[str, Any]


async def overload(server: ServerProcess, model: str, slots: int, seconds: float) -> dict[str, Any]:
    """As many clients as slots for `seconds`; then for as long `FACTOR` times the requests
    answered."""
    # thousands of answers are kept: a garbage collection would count as the server's time
    gc.disable()
    try:
        started, least = perf_counter(), LEAST_PER_SLOT * slots
        alone = await ask_all(
            server.port, COMPLETIONS, _until(started + seconds, least, model), slots
        )
        rate = len(alone) / (perf_counter() - started)
        await asyncio.to_thread(server.wait_idle)
        answers, hanging = await open_loop(server.port, FACTOR * rate, seconds, least, model)
    finally:
        gc.enable()
    accepted = [answer for answer in answers if answer.finished and answer.error is None]
    # without the first ones, which fill the slots
    quiet, loaded = latencies(alone[slots:]), latencies(accepted[slots:])
    if not quiet["ttft"] or not loaded["ttft"]:
        raise RuntimeError(
            f"{len(accepted)} requests of {len(answers)} were answered, too few for {slots} slots"
        )
    ratios = {name: loaded[name]["p99"] / quiet[name]["p99"] for name in quiet}
    refused = [answer for answer in answers if answer.status == 429]
    span = max(seconds, answers[-1].asked - answers[0].asked)
    expected = len(accepted) + len(refused) == len(answers) and all(
        "retry-after" in answer.headers for answer in refused
    )
    refusals = _spread([answer.last - answer.asked for answer in refused])
    quick = refusals.get("p50", 0.0) <= MOST_REFUSAL_MS
    return {
        "holds": expected and not hanging and quick and max(ratios.values()) <= MOST_RATIO,
        "slots": slots,
        "seconds": seconds,
        "without_overload": {"requests_per_second": rate, "latency_ms": quiet},
        "overload": {
            "offered_per_second": len(answers) / span,
            "accepted_per_second": len(accepted) / span,
            "statuses": Counter(str(answer.status) for answer in answers),
            "refusal_ms": refusals,
            "hanging": hanging,
            "latency_ms": loaded,
        },
        "p99_ratio": ratios,
        "most_p99_ratio": MOST_RATIO,
        "most_refusal_ms": MOST_REFUSAL_MS,
    }


def _requests(model: str, seed: int) -> Iterator[Body]:
    while True:
        yield from bodies(model, 256, seed=seed)
        seed += 1


def _until(end: float, least: int, model: str) -> Iterator[Body]:
    for count, body in enumerate(_requests(model, 1000)):
        if perf_counter() > end and count >= least:
            return
        yield body


async def open_loop(
    port: int, rate: float, seconds: float, least: int, model: str
) -> tuple[list[Answer], int]:
    """Requests at random times, `rate` a second, for `seconds` and until there are `least`.

    Returns the answers, and how many never came.
    """
    rng, free, tasks = random.Random(0), list[Connection](), list[asyncio.Task[Answer]]()
    due, end = perf_counter(), perf_counter() + seconds
    for body in _requests(model, 2000):
        due += rng.expovariate(rate)
        if due > end and len(tasks) >= least:
            break
        await asyncio.sleep(max(0.0, due - perf_counter()))
        connection = free.pop() if free else Connection(port)
        tasks.append(asyncio.create_task(_borrowed(connection, body, free.append)))
    done, hanging = await asyncio.wait(tasks, timeout=HANG_SECONDS)
    for connection in free:
        connection.close()
    return sorted((task.result() for task in done), key=lambda answer: answer.asked), len(hanging)


async def _borrowed(
    connection: Connection, body: Body, give_back: Callable[[Connection], None]
) -> Answer:
    answer = await connection.ask(COMPLETIONS, body)
    give_back(connection)
    return answer


def latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Milliseconds to the first token, per token after it, and in all per token."""
    return {
        "ttft": _spread([a.first - a.asked for a in answers]),
        "tpot": _spread([(a.last - a.first) / (a.tokens - 1) for a in answers]),
        "total_per_token": _spread([(a.last - a.asked) / a.tokens for a in answers]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        "p50": 1e3 * median(seconds),
        "p99": 1e3 * percentile(seconds, 0.99),
        "max": 1e3 * max(seconds),
    }
