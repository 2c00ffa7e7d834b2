"""The protocol of a peer: one JSON object a line on stdin, one a line on stdout. It needs no idlm.

    at first  {"engine": "vllm", "mode": "eager", "versions": {"vllm": "..."}}
    stdin     {"concurrency": 8, "requests": [{"prompt_token_ids": [5, 6], "max_tokens": 40}, ...]}
    stdout    {"seconds": 1.2, "cpu_seconds": 1.2, "peak_memory_mb": 900.0, "requests": [
                {"token_ids": [...], "ttft": 0.1, "tpot": 0.01, "worst_gap": 0.02}, ...]}

Every request is greedy and ends at its `max_tokens`, so that all engines do the same work. Times
are in seconds: `ttft` from arrival to the first token, `tpot` per token after it, `worst_gap` the
longest wait between the tokens of two steps; NaN if the engine does not report it.
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
from typing import Protocol, TypedDict


class Request(TypedDict):
    """An entry of `requests` on stdin."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass
class Clock:
    """When the tokens of one request came; create it when the request arrives."""

    limit: int
    arrival: float = field(default_factory=perf_counter)
    token_ids: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    worst_gap: float = 0.0

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the tokens of a step, up to the request's limit."""
        added = tokens[: self.limit - len(self.token_ids)]
        if not added:
            return
        now = perf_counter()
        if self.token_ids:
            self.worst_gap = max(self.worst_gap, now - self.last)
        else:
            self.first = now
        self.last = now
        self.token_ids += added

    def report(self) -> dict[str, object]:
        tpot = (self.last - self.first) / max(1, len(self.token_ids) - 1)
        ttft = self.first - self.arrival
        return {
            "token_ids": self.token_ids,
            "ttft": ttft,
            "tpot": tpot,
            "worst_gap": self.worst_gap,
        }


class Report(Protocol):
    """The service of one request: a `Clock`, or the engine's own times."""

    def report(self) -> dict[str, object]:
        """The entry of this request in the line on stdout."""
        ...


Run = Callable[[list[Request], int], Sequence[Report]]
"""(requests, concurrency) -> reports in the order of the requests."""


def own_peak_memory() -> float:
    """The high-water mark of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Engine:
    """A loaded engine, in this process unless the functions measure another one."""

    run: Run
    cpu_seconds: Callable[[], float] = process_time
    peak_memory_mb: Callable[[], float] = own_peak_memory
    close: Callable[[], None] = lambda: None


def installed(*packages: str) -> dict[str, str]:
    return {name: version(name) for name in packages}


def parse(doc: str | None, *modes: str) -> argparse.Namespace:
    """The command line of every peer.

    The number of threads is set here, before libraries that read it are imported.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a folder in Hugging Face form; llama.cpp: a GGUF file"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", choices=modes, default=modes[0])
    parser.add_argument("--slots", type=int, default=64, help="the most requests in flight")
    parsed = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(parsed.threads)
    return parsed


def serve(name: str, mode: str, versions: dict[str, str], load: Callable[[], Engine]) -> None:
    """Load the engine, introduce it, and answer until stdin ends; what libraries print goes to
    stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = load()
    try:
        print(json.dumps({"engine": name, "mode": mode, "versions": versions}), file=answers)
        for line in sys.stdin:
            print(json.dumps(answer(engine, json.loads(line))), file=answers)
    finally:
        engine.close()


def answer(engine: Engine, line: dict[str, object]) -> dict[str, object]:
    """Run the requests of a line."""
    started, cpu = perf_counter(), engine.cpu_seconds()
    served = engine.run(line["requests"], line["concurrency"])  # type: ignore[arg-type]
    return {
        "seconds": perf_counter() - started,
        "cpu_seconds": engine.cpu_seconds() - cpu,
        "peak_memory_mb": engine.peak_memory_mb(),
        "requests": [request.report() for request in served],
    }
