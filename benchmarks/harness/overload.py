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
from benchmarks.harness.process import ServerProcess
from benchmarks.harness.results import percentile
from benchmarks.harness.workload import COMPLETIONS, bodies

FACTOR = 4.0
MOST_RATIO = 1.5
HANG_SECONDS = 60.0
Body = dict[str, Any]


async def overload(server: ServerProcess, model: str, slots: int, seconds: float) -> dict[str, Any]:
    """As many clients as there are slots, for so long; then as long four times the requests that were answered."""
    gc.disable()  # thousands of answers are kept: a pause to look through them would count as the server's
    started = perf_counter()
    alone = await ask_all(server.port, COMPLETIONS, _until(started + seconds, model), slots)
    rate = len(alone) / (perf_counter() - started)
    await asyncio.to_thread(server.wait_idle, 5.0)
    answers, hanging = await _open_loop(server.port, FACTOR * rate, seconds, model)
    accepted = [one for one in answers if one.finished and one.error is None]
    # without those that filled the slots, one or all at once: what counts is how it goes on
    quiet, loaded = latencies(alone[slots:]), latencies(accepted[slots:])
    if not quiet["ttft"] or not loaded["ttft"]:
        raise RuntimeError(f"{seconds:g} s are too short for {slots} slots; give more")
    ratios = {name: loaded[name]["p99"] / quiet[name]["p99"] for name in quiet}
    refused = [one for one in answers if one.status == 429]
    as_told = len(accepted) + len(refused) == len(answers) and all("retry-after" in one.headers for one in refused)
    return {
        "holds": as_told and not hanging and max(ratios.values()) <= MOST_RATIO,
        "slots": slots,
        "seconds": seconds,
        "without_overload": {"requests_per_second": rate, "latency_ms": quiet},
        "overload": {
            "offered_per_second": len(answers) / seconds,
            "accepted_per_second": len(accepted) / seconds,
            "statuses": Counter(str(one.status) for one in answers),
            "refusal_ms": _spread([one.last - one.asked for one in refused]),
            "hanging": hanging,
            "latency_ms": loaded,
        },
        "p99_ratio": ratios,
        "most_p99_ratio": MOST_RATIO,
    }


def _requests(model: str, seed: int) -> Iterator[Body]:
    """No end of requests."""
    while True:
        yield from bodies(model, 256, seed=seed)
        seed += 1


def _until(end: float, model: str) -> Iterator[Body]:
    for body in _requests(model, 1000):
        if perf_counter() > end:
            return
        yield body


async def _open_loop(port: int, rate: float, seconds: float, model: str) -> tuple[list[Answer], int]:
    """Requests at random times, `rate` a second, whatever becomes of those before; answers, and how many never came."""
    rng, free, asked = random.Random(0), list[Connection](), list[asyncio.Task[Answer]]()
    due, end = perf_counter(), perf_counter() + seconds
    for body in _requests(model, 2000):
        due += rng.expovariate(rate)
        if due > end:
            break
        await asyncio.sleep(max(0.0, due - perf_counter()))
        connection = free.pop() if free else Connection(port)
        asked.append(asyncio.create_task(_borrowed(connection, body, free.append)))
    done, hanging = await asyncio.wait(asked, timeout=HANG_SECONDS)
    for one in free:
        one.close()
    return sorted((one.result() for one in done), key=lambda answer: answer.asked), len(hanging)


async def _borrowed(connection: Connection, body: Body, give_back: Callable[[Connection], None]) -> Answer:
    answer = await connection.ask(COMPLETIONS, body)
    give_back(connection)
    return answer


def latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Time to the first token, per token after it, and from first to last; in milliseconds."""
    return {
        "ttft": _spread([one.first - one.asked for one in answers]),
        "tpot": _spread([(one.last - one.first) / (one.tokens - 1) for one in answers]),
        "total_per_token": _spread([(one.last - one.asked) / one.tokens for one in answers]),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {"p50": 1e3 * median(seconds), "p99": 1e3 * percentile(seconds, 0.99), "max": 1e3 * max(seconds)}
