"""What a router brings: `python -m benchmarks.router_speed [cache] [replicas] [--model nano]
                                                          [--smg FILE] [--out FILE]`

    cache     chats of several turns behind two replicas, once with `cache_aware` and once with
              `round_robin`: the share of the prompts' tokens that a replica had in its prefix cache
    replicas  tokens per second of one replica and of two, each with a thread and a core of its own,
              through the same router, in turn

Needs two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import uvloop

from benchmarks.harness.client import Connection
from benchmarks.harness.fleet import SMG, Fleet, requests, said
from benchmarks.harness.results import RESULTS, report
from benchmarks.harness.workload import CHAT
from benchmarks.router_faults import ask

PARTS = ("cache", "replicas")
POLICIES = ("cache_aware", "round_robin")
PLANS = ("--branches", "all")
TURNS, ANSWER = 5, 24
"""Of a chat, and the tokens of an answer: they fit the context of the bundled model."""


async def chat(port: int, model: str, name: int) -> list[tuple[int, int]]:
    """Talk for some turns; for each the prompt's tokens, and those that were cached."""
    rng, counts, connection = random.Random(name), [], Connection(port)
    messages: list[dict[str, str]] = []
    for _ in range(TURNS):
        numbers = " and ".join(str(rng.randint(10, 99)) for _ in range(4))
        messages.append({"role": "user", "content": f"{numbers}: what is the sum?"})
        body = {"model": model, "messages": messages, "max_tokens": ANSWER, "seed": name}
        answer = await connection.ask(CHAT, body)
        if not answer.finished:
            raise RuntimeError(f"status {answer.status}: {answer.error}")
        usage = answer.json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counts.append((usage["prompt_tokens"], cached))
        messages.append({"role": "assistant", "content": said(answer)})
    connection.close()
    return counts


async def chats(port: int, model: str, count: int, at_once: int, seed: int) -> dict[str, Any]:
    """Many chats, and what of their prompts was cached after the first turn."""
    names = iter(range(seed, seed + count))
    turns: list[tuple[int, int]] = []

    async def client() -> None:
        for name in names:
            turns.extend((await chat(port, model, name))[1:])

    await asyncio.gather(*(client() for _ in range(at_once)))
    prompts, cached = (sum(column) for column in zip(*turns, strict=True))
    return {"prompt_tokens": prompts, "cached_tokens": cached, "share": cached / prompts}


def cache(options: argparse.Namespace) -> dict[str, Any]:
    """The share of cached tokens by policy; each policy has new replicas."""
    rows = {}
    for policy in POLICIES:
        with (
            Fleet(options.smg, options.model, 2, PLANS, policy) as fleet,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            port = fleet.router.port
            rows[policy] = runner.run(chats(port, options.model, options.chats, 8, 0))
    return {"chats": options.chats, "turns": TURNS, "policies": rows}


def pin(fleet: Fleet) -> None:
    """Give each replica's engine a core of its own."""
    cores = sorted(psutil.Process().cpu_affinity())
    for place, replica in enumerate(fleet.replicas):
        replica.engine().cpu_affinity([cores[place % len(cores)]])


async def throughput(port: int, model: str, count: int, seed: int) -> float:
    """Tokens per second of `count` whole answers, 64 at once."""
    asked = requests(model, count, 128, seed, stream=False)
    started = perf_counter()
    answers = await ask(port, asked, 64)
    if not all(answer.finished for answer in answers):
        raise RuntimeError("some were not answered")
    tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    return tokens / (perf_counter() - started)


def replicas(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by the number of replicas, in turn, after a warm-up of each."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with (
        Fleet(options.smg, options.model, 1, PLANS, "round_robin") as one,
        Fleet(options.smg, options.model, 2, PLANS, "round_robin") as two,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        fleets = {1: one, 2: two}
        for fleet in fleets.values():
            pin(fleet)
        for lap in range(options.laps + 1):
            for number, fleet in fleets.items():
                port = fleet.router.port
                run = throughput(port, options.model, options.requests, lap)
                rates[number].append(runner.run(run))
    kept = {number: lap[1:] for number, lap in rates.items()}
    ratios = [two / one for one, two in zip(kept[1], kept[2], strict=True)]
    return {"tokens_per_second": kept, "ratio": {"median": median(ratios), "all": ratios}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of a lap")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--smg", type=Path, default=SMG, help="the router's program")
    parser.add_argument("--out", type=Path, default=RESULTS / "router_speed.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    parts = {"cache": cache, "replicas": replicas}
    found = {part: parts[part](options) for part in options.parts}
    report(found | {"model": options.model, "router": "smg"}, options.out)


if __name__ == "__main__":
    main()
