"""How a peer is asked: one JSON object a line on stdin, one a line on stdout; no package of ours is needed.

    first, unasked    {"engine": "vllm", "mode": "eager", "versions": {"vllm": "..."}}
    asked             {"concurrency": 8, "requests": [{"prompt_token_ids": [5, 6], "max_tokens": 40}, ...]}
    answered          {"seconds": 1.2, "cpu_seconds": 1.2, "peak_memory_mb": 900.0,
                       "requests": [{"token_ids": [...], "ttft": 0.1, "tpot": 0.01, "worst_gap": 0.02}, ...]}

Every request is greedy and ends at its `max_tokens`, not before: every engine does the same work. Times are in
seconds: `ttft` from arrival to the first token, `tpot` per token after it, `worst_gap` the longest wait between the
tokens of two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from time import perf_counter, process_time
from typing import TypedDict


class Request(TypedDict):
    """One line's entry of `requests`."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass
class Clock:
    """When the tokens of one request came; made when it arrives."""

    limit: int
    arrival: float = field(default_factory=perf_counter)
    token_ids: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    worst_gap: float = 0.0

    def extend(self, tokens: Sequence[int]) -> None:
        """Take a step's tokens, as far as the request wants them."""
        wanted = tokens[: self.limit - len(self.token_ids)]
        if not wanted:
            return
        now = perf_counter()
        if self.token_ids:
            self.worst_gap = max(self.worst_gap, now - self.last)
        else:
            self.first = now
        self.last = now
        self.token_ids += wanted

    def report(self) -> dict[str, object]:
        """The request's entry in the answer."""
        tpot = (self.last - self.first) / max(1, len(self.token_ids) - 1)
        ttft = self.first - self.arrival
        return {"token_ids": self.token_ids, "ttft": ttft, "tpot": tpot, "worst_gap": self.worst_gap}


Run = Callable[[list[Request], int], list[Clock]]


def parse(doc: str | None, *modes: str) -> argparse.Namespace:
    """The command line of every peer; the threads are set here, before anything that counts them is imported."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in Hugging Face form")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=modes, default=modes[0])
    parsed = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(parsed.threads)
    return parsed


def serve(engine: str, mode: str, packages: Sequence[str], load: Callable[[], Run]) -> None:
    """Load, introduce the engine, and answer until stdin ends; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = load()
    versions = {name: version(name) for name in packages}
    print(json.dumps({"engine": engine, "mode": mode, "versions": versions}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        started, cpu = perf_counter(), process_time()
        clocks = run(asked["requests"], asked["concurrency"])
        answer = {
            "seconds": perf_counter() - started,
            "cpu_seconds": process_time() - cpu,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "requests": [clock.report() for clock in clocks],
        }
        print(json.dumps(answer), file=answers)
