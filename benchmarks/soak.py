"""A long run of one engine: many requests, random aborts, a small page pool.

    python -m benchmarks.soak [--requests 10000] [--seed 0] [--out FILE]

Memory, slots and pages must come back. Prints one JSON object: resident memory over the run,
pre-emptions, evictions, and whether every request was answered.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import psutil
import torch

from idlm import SamplingParams, load
from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.environment import environment

IN_FLIGHT = 48


def ask(engine: Engine, rng: random.Random) -> str:
    """Add a request with random settings; some share their first tokens."""
    prompt = [rng.randrange(4, 600) for _ in range(rng.choice([0, 3, 20, 90]))]
    params = SamplingParams(
        max_tokens=rng.randint(1, 60),
        temperature=rng.choice([0.0, 1.0]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        ignore_eos=True,
    )
    return engine.add([5, 6, 7] * rng.randint(1, 20) + prompt, params, rng.randrange(2**31))


def main() -> None:
    """Exit status 1 if a request or a page was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    engine = build_engine(load("nano"), EngineConfig(4, "chain", max_num_seqs=32, kv_memory="6MiB"))
    memory: list[float] = []
    added = answered = aborted = 0
    waiting: list[str] = []
    process, started = psutil.Process(), time.perf_counter()
    while added < options.requests or engine.busy:
        while added < options.requests and added - answered < IN_FLIGHT:
            waiting.append(ask(engine, rng))
            added += 1
        if rng.random() < 0.05:
            aborted += engine.abort(rng.choice(waiting[-IN_FLIGHT:]))
        for update in engine.step():
            answered += update.result is not None
        if added % 250 == 0 and len(memory) < added // 250:
            engine.check()
            memory.append(process.memory_info().rss / 2**20)
            print(f"{added} asked, {answered} answered, {memory[-1]:.0f} MiB", file=sys.stderr)
    engine.check()
    pool = engine.scheduler.pool
    late = memory[len(memory) // 4 :]
    report = {
        "requests": added,
        "answered": answered,
        "aborted": aborted,
        "pool_intact": pool.live == 0 and pool.free + pool.cached == pool.total,
        "memory_mb": {
            "after_warm_up": late[0],
            "end": late[-1],
            "highest": max(late),
            "samples": memory,
        },
        "preemptions": engine.metrics.preemptions,
        "evictions": pool.evictions,
        "steps": engine.metrics.steps,
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(0 if answered == added and report["pool_intact"] else 1)


if __name__ == "__main__":
    main()
