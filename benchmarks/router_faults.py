"""Replicas behind a router, and one of them lost: `make integrations`.

    python -m benchmarks.router_faults [kill] [restart] [--replicas 2] [--kills 3] [--streams 64]
                                       [--tokens 240] [--model nano] [--smg FILE] [--out FILE]

    kill     one replica gets kill -9 under streams, again and again, each in turn. Its streams end
             at once with an error event, or are cut off; all others finish; new requests go
             to the rest; the replica comes back and takes load
    restart  every replica in turn gets SIGTERM and is started again while clients ask without a
             pause: no request is refused or lost

The router is smg, the SGLang Model Gateway; replicas decode in float64. Every text is compared with
that of AR, which a replica writes before the faults. No answer may hold two. Exit status 1 if a
part does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import uvloop

from benchmarks.harness.client import Answer, Connection
from benchmarks.harness.fleet import SMG, Fleet, doubled, requests, said
from benchmarks.harness.process import HANG_SECONDS, ServerProcess
from benchmarks.harness.results import RESULTS, report
from benchmarks.harness.workload import Asked
from idlm.serving.config import AR_SUFFIX

PARTS = ("kill", "restart")
MOST_SECONDS_TO_ERROR = 2.0
CLIENTS = 16
EXACT = ("--dtype", "float64", "--branches", "all")
SECONDS_OF_STATS = 10.0
"""Within these a replica's gauges have followed its engine."""


async def timed(connection: Connection, asked: Asked) -> tuple[Answer, float]:
    """An answer and when it ended; one of status 0 if nothing listens."""
    try:
        answer = await connection.ask(*asked)
    except ConnectionError:
        answer = Answer(perf_counter())
    return answer, perf_counter()


async def ask(port: int, asked: Sequence[Asked], clients: int = CLIENTS) -> list[Answer]:
    """All answers, in order."""
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(asked))

    async def client() -> None:
        connection = Connection(port)
        for index, one in waiting:
            answers[index] = (await timed(connection, one))[0]
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answers[index] for index in sorted(answers)]


async def by_ar(replica: ServerProcess, asked: Sequence[Asked]) -> list[str]:
    """The texts of AR, from a replica itself."""
    plain = [(path, body | {"model": body["model"] + AR_SUFFIX}) for path, body in asked]
    answers = await ask(replica.port, plain, 64)
    if not all(answer.finished for answer in answers):
        raise RuntimeError(f"AR did not answer: {[a.status for a in answers if not a.finished]}")
    return [said(answer) for answer in answers]


def verdict(answer: Answer, text: str) -> str:
    """What became of a request whose AR text is known."""
    if doubled(answer):
        return "two answers in one"
    if answer.finished and answer.error is None:
        return "as AR" if said(answer) == text else "other bytes"
    if answer.status == 200 and answer.streamed and not text.startswith(said(answer)):
        return "other bytes"
    if answer.status != 200:
        return f"status {answer.status}"
    return "error event" if answer.error else "cut off"


class Kill:
    """The part `kill`.

    Args:
        streams, tokens: how many run when a replica is killed, and how long they are.
    """

    def __init__(self, fleet: Fleet, model: str, streams: int, tokens: int) -> None:
        self._fleet = fleet
        self._streams = requests(model, streams, tokens, seed=1)
        self._whole = requests(model, streams // 8, tokens, seed=2, stream=False)
        self._new = requests(model, CLIENTS, 16, seed=3)
        self._all = [*self._streams, *self._whole, *self._new]

    async def run(self, kills: int) -> dict[str, Any]:
        """All laps; each kills the next replica."""
        self._texts = dict(
            zip(map(str, self._all), await by_ar(self._fleet.replicas[0], self._all), strict=True)
        )
        victims = cycle(self._fleet.replicas)
        laps = [await self._lap(next(victims)) for _ in range(kills)]
        latest = [lap["latest_error_seconds"] for lap in laps]
        seen = Counter[str]()
        for lap in laps:
            seen.update(lap["streams"])
        return {
            "holds": all(lap["holds"] for lap in laps) and max(latest) < MOST_SECONDS_TO_ERROR,
            "kills": kills,
            "streams_at_each": len(self._streams),
            "streams": seen,
            "whole": sum((Counter(lap["whole"]) for lap in laps), Counter()),
            "new_requests": sum((Counter(lap["new"]) for lap in laps), Counter()),
            "latest_error_seconds": {"median": median(latest), "max": max(latest)},
            "back_seconds": median(lap["back_seconds"] for lap in laps),
            "laps": laps,
        }

    async def _lap(self, victim: ServerProcess) -> dict[str, Any]:
        port = self._fleet.router.port
        connections = [Connection(port) for _ in (*self._streams, *self._whole)]
        tasks = [
            asyncio.create_task(timed(connection, asked))
            for connection, asked in zip(connections, [*self._streams, *self._whole], strict=True)
        ]
        streaming = connections[: len(self._streams)]
        while not all(connection.answer.pieces for connection in streaming):
            await asyncio.sleep(0.005)
        open_still = sum(not task.done() for task in tasks[: len(streaming)])
        running = await asyncio.to_thread(running_on, victim)
        victim.kill()
        killed = perf_counter()
        new = self._verdicts(self._new, await ask(port, self._new))
        ended = await asyncio.wait_for(asyncio.gather(*tasks), HANG_SECONDS)
        answers = [answer for answer, _ in ended]
        streams = self._verdicts(self._streams, answers[: len(streaming)])
        lost = len(streaming) - streams["as AR"]
        late = [at - killed for (answer, at) in ended[: len(streaming)] if not answer.finished]
        print(f"killed with {running} samples: streams {streams}, new {new}", file=sys.stderr)
        back = await self._back(victim)
        return {
            "holds": 0 < lost <= running
            and set(streams) <= {"as AR", "error event", "cut off"}
            and set(new) == set(back["verdicts"]) == {"as AR"}
            and back["tokens"] > 0,
            "open_at_the_kill": open_still,
            "on_the_victim": running,
            "streams": streams,
            "whole": self._verdicts(self._whole, answers[len(streaming) :]),
            "new": new,
            "latest_error_seconds": max(late, default=0.0),
            "back_seconds": back["seconds"],
            "tokens_after_it_came_back": back["tokens"],
        }

    async def _back(self, victim: ServerProcess) -> dict[str, Any]:
        """Start it again, and give the router as many streams as before."""
        started = perf_counter()
        await asyncio.to_thread(victim.__enter__)
        await asyncio.to_thread(self._fleet.wait_seen, victim)
        seconds = perf_counter() - started
        answers = await ask(self._fleet.router.port, self._streams, len(self._streams))
        until, tokens = perf_counter() + SECONDS_OF_STATS, 0.0
        while not tokens and perf_counter() < until:
            tokens = (await asyncio.to_thread(victim.metrics))["idlm_generated_tokens_total"]
            await asyncio.sleep(0.2)
        verdicts = self._verdicts(self._streams, answers)
        return {"seconds": seconds, "tokens": tokens, "verdicts": verdicts}

    def _verdicts(self, asked: Sequence[Asked], answers: Sequence[Answer]) -> Counter[str]:
        return Counter(
            verdict(answer, self._texts[str(one)])
            for one, answer in zip(asked, answers, strict=True)
        )


def running_on(replica: ServerProcess) -> int:
    """Samples with a replica now, by its own count."""
    return int(replica.metrics()["idlm_queue_samples"])


async def restart(fleet: Fleet, model: str) -> dict[str, Any]:
    """Every replica in turn ends by SIGTERM and is started again, under requests."""
    asked = [
        *requests(model, CLIENTS * 2, 48, seed=4),
        *requests(model, CLIENTS * 2, 48, seed=5, stream=False),
    ]
    texts = await by_ar(fleet.replicas[0], asked)
    over = asyncio.Event()
    verdicts = Counter[str]()

    async def client(waiting: Iterator[tuple[Asked, str]]) -> None:
        connection = Connection(fleet.router.port)
        while not over.is_set():
            one, text = next(waiting)
            answer = (await timed(connection, one))[0]
            verdicts[verdict(answer, text)] += 1
        connection.close()

    waiting = cycle(zip(asked, texts, strict=True))
    clients = [asyncio.create_task(client(waiting)) for _ in range(CLIENTS)]
    started, statuses = perf_counter(), []
    for replica in fleet.replicas:
        statuses.append(await asyncio.to_thread(replica.stop, HANG_SECONDS))
        await asyncio.to_thread(replica.__enter__)
        await asyncio.to_thread(fleet.wait_seen, replica)
    over.set()
    await asyncio.wait_for(asyncio.gather(*clients), HANG_SECONDS)
    return {
        "holds": set(verdicts) == {"as AR"} and set(statuses) == {0},
        "replicas": len(fleet.replicas),
        "exit_statuses": statuses,
        "requests": verdicts,
        "seconds": perf_counter() - started,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--streams", type=int, default=64, help="when a replica is killed")
    parser.add_argument("--tokens", type=int, default=240, help="of each of them")
    parser.add_argument("--smg", type=Path, default=SMG, help="the router's program")
    parser.add_argument("--out", type=Path, default=RESULTS / "router_faults.json")
    return parser.parse_args()


async def run(options: argparse.Namespace, fleet: Fleet) -> dict[str, Any]:
    """The parts that are asked for."""
    parts: dict[str, Any] = {}
    for part in options.parts:
        if part == "kill":
            laps = Kill(fleet, options.model, options.streams, options.tokens)
            parts[part] = await laps.run(options.kills)
        else:
            parts[part] = await restart(fleet, options.model)
        print(f"{part}: {'holds' if parts[part]['holds'] else 'DOES NOT HOLD'}", file=sys.stderr)
    return parts


def main() -> int:
    """Exit status 1 if a part does not hold."""
    options = arguments()
    with (
        Fleet(options.smg, options.model, options.replicas, EXACT) as fleet,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        parts = runner.run(run(options, fleet))
    served = {"model": options.model, "dtype": "float64", "replicas": options.replicas}
    report(parts | served | {"router": "smg"}, options.out)
    return 0 if all(part["holds"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
