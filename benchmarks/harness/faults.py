"""Killed engines, clients that disconnect, and shutdowns; see `benchmarks.server_faults`."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import Counter
from collections.abc import Coroutine, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.harness.client import Answer, Connection, ask_all
from benchmarks.harness.process import HANG_SECONDS, ServerProcess
from benchmarks.harness.workload import COMPLETIONS, ROUTES, Asked, bodies, routed, text

MOST_SECONDS_TO_ERROR = 2.0
MOST_SECONDS_TO_IDLE = 5.0


async def kill(
    server: ServerProcess,
    model: str,
    rounds: int,
    streams: int,
    most_seconds: float = MOST_SECONDS_TO_ERROR,
) -> dict[str, Any]:
    """Kill the engine while `streams` requests to all routes stream, again and again.

    Each client must get an error, as its route has it, within `most_seconds`.
    """
    reference = await _reference(server, model)
    laps = [await _kill_once(server, model, streams) for _ in range(rounds)]
    same = [lap.pop("texts") == reference for lap in laps]
    latest, recovery = (
        [lap["latest_error_seconds"] for lap in laps],
        [lap["recovery_seconds"] for lap in laps],
    )
    restarts = int(server.metrics()["idlm_engine_restarts_total"])
    told = {route: sum(lap["told"][route] for lap in laps) for route in ROUTES}
    informed = sum(told.values())
    holds = (
        informed == rounds * streams
        and all(same)
        and max(latest) < most_seconds
        and restarts == rounds
        and all(lap["not_ready_at_once"] for lap in laps)
    )
    return {
        "holds": holds,
        "rounds": rounds,
        "streams": streams,
        "told": informed,
        "told_by_route": told,
        "latest_error_seconds": {"median": median(latest), "max": max(latest)},
        "recovery_seconds": {"median": median(recovery), "max": max(recovery)},
        "same_answers_after": sum(same),
        "restarts": restarts,
        "laps": laps,
    }


async def _reference(server: ServerProcess, model: str) -> list[str]:
    """The answers to a few requests, which must be the same from every engine process."""
    answers = await ask_all(server.port, COMPLETIONS, bodies(model, 4, 24, seed=1), 1)
    return [text(answer.events()) if answer.finished else str(answer.error) for answer in answers]


async def _kill_once(server: ServerProcess, model: str, streams: int) -> dict[str, Any]:
    connections = [Connection(server.port) for _ in range(streams)]
    tasks = [
        asyncio.create_task(connection.ask(*asked))
        for connection, asked in zip(connections, routed(bodies(model, streams, 450)), strict=True)
    ]
    while not all(connection.answer.pieces for connection in connections):
        await asyncio.sleep(0.005)
    server.engine().kill()
    killed = perf_counter()
    answers = await _answered(tasks)
    ready = (await asyncio.to_thread(server.get, "/ready"))[0]
    await asyncio.to_thread(server.wait_ready)
    return {
        "told": {
            route: sum(answer.error is not None for answer in answers[place :: len(ROUTES)])
            for place, route in enumerate(ROUTES)
        },
        "latest_error_seconds": max(answer.last for answer in answers) - killed,
        "not_ready_at_once": ready == 503,
        "recovery_seconds": perf_counter() - killed,
        "texts": await _reference(server, model),
    }


async def _answered(tasks: Sequence[asyncio.Task[Answer]]) -> list[Answer]:
    """All answers.

    Raises:
        RuntimeError: some did not come.
    """
    _, hanging = await asyncio.wait(tasks, timeout=HANG_SECONDS)
    if hanging:
        raise RuntimeError(f"{len(hanging)} of {len(tasks)} requests hang")
    return [task.result() for task in tasks]


async def disconnect(
    server: ServerProcess,
    model: str,
    clients: int,
    concurrency: int,
    most_seconds: float = MOST_SECONDS_TO_IDLE,
) -> dict[str, Any]:
    """`clients` clients of all routes that disconnect during their request.

    Nothing may be left of them after `most_seconds`.
    """
    rng = random.Random(0)
    # all drawn before the first request, so that the clients do the same on every machine
    waiting = iter(
        [_visit(server.port, asked, rng) for asked in routed(bodies(model, clients, 300))]
    )
    left: Counter[str] = Counter()

    async def visitor() -> None:
        for visit in waiting:
            left[await visit] += 1

    await asyncio.gather(*[visitor() for _ in range(concurrency)])
    seconds, remains = await asyncio.to_thread(server.wait_idle, most_seconds)
    after = await ask_all(server.port, COMPLETIONS, bodies(model, 8), 8)
    return {
        "holds": not remains and all(answer.finished for answer in after),
        "clients": clients,
        "left": dict(left),
        "seconds_to_zero": seconds,
        "remains": remains,
        "statuses": _statuses(server),
    }


def _visit(port: int, asked: Asked, rng: random.Random) -> Coroutine[Any, Any, str]:
    """Ask and disconnect: with half a request sent, after some time, or after some of the response.

    Returns where that was.
    """
    asked = asked[0], asked[1] | {"stream": rng.random() < 0.5}
    if rng.random() < 0.1:
        return _leave_after(port, asked, send=rng.randint(1, 250), seconds=0.1 * rng.random())
    if rng.random() < 0.5:
        return _leave_after(port, asked, seconds=rng.choice((0.1, 2.0)) * rng.random())
    return _leave_after(port, asked, pieces=rng.choice((1, rng.randint(2, 30))))


async def _leave_after(
    port: int,
    asked: Asked,
    send: int | None = None,
    seconds: float = HANG_SECONDS,
    pieces: int = sys.maxsize,
) -> str:
    connection = Connection(port)
    task = asyncio.create_task(connection.ask(*asked, send))
    end = perf_counter() + seconds
    while perf_counter() < end and len(connection.answer.pieces) < pieces and not task.done():
        await asyncio.sleep(0.005)
    answer = connection.answer
    connection.close()
    await task
    if send is not None:
        return "in the request"
    if answer.complete:
        return f"after the end ({answer.status})"
    return "in the answer" if answer.pieces else "before the answer"


def _statuses(server: ServerProcess) -> dict[str, dict[str, int]]:
    """Requests by route and status, as the server counts them."""
    counts = {route: Counter[str]() for route in ROUTES}
    for line in server.get("/metrics")[1].splitlines():
        for route in ROUTES:
            if line.startswith("idlm_http_requests_total{") and f'"{route}"' in line:
                status = line.partition('status="')[2].partition('"')[0]
                counts[route][status] += int(float(line.split()[-1]))
    return {route: dict(count) for route, count in counts.items()}


async def drain(command: Sequence[str], streams: int, seconds: float) -> dict[str, Any]:
    """SIGTERM with `streams` requests in flight, half of them streamed, and `seconds` to finish
    them."""
    with ServerProcess([*command, "--drain-seconds", str(seconds)]) as server:
        model = command[2]
        tasks = [
            asyncio.create_task(
                # of each route every other one
                Connection(server.port).ask(route, body | {"stream": index // len(ROUTES) % 2 == 1})
            )
            for index, (route, body) in enumerate(routed(bodies(model, streams, 400)))
        ]
        # the server's own count; the engine's metrics are up to a second old
        while server.metrics()["idlm_queue_samples"] < streams:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        ended = perf_counter()
        answers = await _answered(tasks)
        status = await asyncio.to_thread(server.process.wait, HANG_SECONDS)
    finished = sum(answer.finished and answer.error is None for answer in answers)
    reported = [answer.error for answer in answers]
    expected = (
        finished == streams if seconds > 1 else finished + sum(map(bool, reported)) == streams
    )
    return {
        "holds": expected and status == 0,
        "drain_seconds": seconds,
        "in_flight": streams,
        "finished": finished,
        "told_with_an_error": sum(map(bool, reported)),
        "messages": sorted({error["message"] for error in reported if error}),
        "seconds_to_exit": perf_counter() - ended,
        "exit_status": status,
    }
