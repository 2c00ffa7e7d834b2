"""A converted model against itself without drafts: tokens per forward, speed and the same tokens.

    python -m benchmarks.converted MODEL ADAPTER --prompts gsm8k=FILE [chat=FILE ...]
                                   [--number 200] [--tokens 128] [--concurrency 1 8]
                                   [--dtype float32] [--output FILE]

Each FILE has a prompt in a row (text, or messages). Greedy. Every eight prompts are decoded by AR,
with drafts for all outcomes at stride 4, and as the planner decides, in turn, `concurrency` at a
time, on one thread; times are CPU times of the process, since other jobs may run beside it. The
file is written anew after every eight prompts of each source, so a run that is stopped leaves what
it has measured. Where tokens differ, the gap between AR's two likeliest tokens is given.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks.lookup import engine
from idlm import LLM, SamplingParams, load
from idlm.cli import prompts
from idlm.cli.common import keep_what_is_loaded
from idlm.engine.llm import Result
from idlm.environment import environment

RESULTS = Path(__file__).parent / "results"
MODES: dict[str, dict[str, Any]] = {
    "ar": {"stride": 1},
    "all": {"stride": 4, "branches": "all"},
    "planner": {"stride": 4, "branches": "planner"},
}
ROUND = 8
"""Prompts of a source that are measured before the next source has its turn."""


@dataclass
class Tally:
    """What one mode has given for one source at one number of requests."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0
    reached: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float, results: list[Result]) -> None:
        self.seconds.append(seconds)
        for one in results:
            self.tokens += len(one.token_ids)
            self.forwards += one.forwards
            self.reached += Counter(dict(enumerate(one.reached)))
            self.accepted += Counter(dict(enumerate(one.accepted)))

    def figures(self, ar: Tally) -> dict[str, Any]:
        """The speed-up is the ratio of all CPU times; its range is over runs."""
        ratios = [a / b for a, b in zip(ar.seconds, self.seconds, strict=True)]
        return {
            "tokens": self.tokens,
            "tpf": self.tokens / self.forwards,
            "acceptance": [self.accepted[k] / n for k, n in sorted(self.reached.items()) if n],
            "speedup": sum(ar.seconds) / sum(self.seconds),
            "speedup_range": [min(ratios), max(ratios)],
            "cpu_ms_per_token": 1e3 * sum(self.seconds) / self.tokens,
        }


@dataclass
class Source:
    """Prompts of one source at one number of requests."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {mode: Tally() for mode in MODES})
    prompts: int = 0
    gaps: list[float] = field(default_factory=list)

    def run(self, engines: dict[str, LLM], ids: list[list[int]], params: SamplingParams) -> None:
        """Decode the prompts at once by each mode."""
        results = {}
        for mode, llm in engines.items():
            started = process_time()
            results[mode] = llm.generate(ids, params)
            self.tallies[mode].add(process_time() - started, results[mode])
        self.prompts += len(ids)
        for at, plain in enumerate(results["ar"]):
            others = [results[mode][at].token_ids for mode in MODES]
            if any(other != plain.token_ids for other in others):
                self.gaps.append(gap(engines["ar"], ids[at], params, plain.token_ids, others))

    def row(self, source: str, concurrency: int) -> dict[str, Any]:
        ar = self.tallies["ar"]
        modes = {mode: tally.figures(ar) for mode, tally in self.tallies.items()}
        counts = {"prompts": self.prompts, "same": self.prompts - len(self.gaps)}
        return (
            {"source": source, "concurrency": concurrency}
            | counts
            | {
                "gaps": self.gaps,
                "modes": modes,
            }
        )


def gap(
    ar: LLM, ids: list[int], params: SamplingParams, tokens: list[int], others: list[list[int]]
) -> float:
    """By how much AR prefers its token to the next likeliest, in nats, at the first difference."""
    first = min(_first_difference(tokens, other) for other in others if other != tokens)
    asked = SamplingParams(temperature=0, max_tokens=params.max_tokens, logprobs=2)
    (result,) = ar.generate([ids], asked)
    assert result.logprobs is not None
    logprobs = (one.logprob for one in result.logprobs[first].values())
    best, second = sorted(logprobs, reverse=True)[:2]
    return best - second


def _first_difference(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="SOURCE=FILE")
    parser.add_argument("--number", type=int, default=200, help="prompts of a source")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "converted.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    idlm = load(options.model, str(options.adapter), dtype=options.dtype)
    slots = max(options.concurrency)
    engines = {mode: engine(idlm, slots, **settings) for mode, settings in MODES.items()}
    keep_what_is_loaded()
    given = {}
    for pair in options.prompts:
        source, file = pair.split("=", 1)
        rows = prompts.read(Path(file))[: options.number]
        given[source] = [row.encode(idlm, chat=True) for row in rows]
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    done = {key: Source() for key in product(given, options.concurrency)}
    for first in range(0, options.number, ROUND):
        for (source, size), tally in done.items():
            ids = given[source][first : first + ROUND]
            for at in range(0, len(ids), size):
                tally.run(engines, ids[at : at + size], params)
        write(done, options)


def write(done: dict[tuple[str, int], Source], options: argparse.Namespace) -> None:
    rows = [tally.row(*key) for key, tally in done.items()]
    settings = {"threads": 1, "dtype": options.dtype, "max_tokens": options.tokens}
    report = {"rows": rows, "environment": environment() | settings}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
