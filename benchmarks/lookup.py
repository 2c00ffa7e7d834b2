"""Lookup drafts on a model that was not trained to draft: TPF and speed-up over AR.

    python -m benchmarks.lookup --data DATA [--model FOLDER] [--prompts 16] [--tokens 100]
                                [--concurrency 8 1] [--output FILE]

Three kinds of prompts (`benchmarks.lookup_prompts`): edits of code and summaries repeat text that
the prompt gives, answers to chat questions hardly do. Greedy. AR and lookup drafts run in turn on
the same prompts, `concurrency` at a time, on one thread; times are CPU times of the process, since
other jobs may run beside it. The file is written anew after every eight prompts of a kind, so a run
that is stopped leaves what it has measured.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import process_time
from typing import Any

import torch

from benchmarks.lookup_prompts import prompts
from idlm import LLM, SamplingParams, load
from idlm.cli.common import keep_what_is_loaded
from idlm.environment import environment
from idlm.models.idlm_model import Idlm

ROOT = Path(__file__).parent
MODEL = ROOT.parent / "build" / "models" / "SmolLM2-135M-Instruct"
LOOKUP = {"drafts": "lookup"}
CONTEXT = 2048
"""Tokens of the longest request: prompts have up to about 600."""
ROUND = 8
"""Prompts of a kind that are measured before the next kind has its turn."""


@dataclass
class Tally:
    """What the runs of one kind of prompts at one number of requests have given so far."""

    ar: list[float] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)
    tokens: int = 0
    forwards: int = 0
    same: int = 0
    prompts: int = 0
    reached: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    plans: Counter[str] = field(default_factory=Counter)

    def run(self, ar: LLM, lookup: LLM, ids: list[list[int]], params: SamplingParams) -> None:
        """Decode the prompts at once, by AR and then with lookup drafts."""
        before = Counter(lookup.engine.metrics.plans)
        started = process_time()
        plain = ar.generate(ids, params)
        middle = process_time()
        results = lookup.generate(ids, params)
        self.ar.append(middle - started)
        self.lookup.append(process_time() - middle)
        self.plans += lookup.engine.metrics.plans - before
        self.prompts += len(ids)
        for one, other in zip(results, plain, strict=True):
            self.tokens += len(one.token_ids)
            self.forwards += one.forwards
            self.same += one.token_ids == other.token_ids
            self.reached += Counter(dict(enumerate(one.reached)))
            self.accepted += Counter(dict(enumerate(one.accepted)))

    def row(self, kind: str, concurrency: int) -> dict[str, Any]:
        """Speed-up: the ratio of all CPU times; its range is over runs."""
        ratios = [ar / lookup for ar, lookup in zip(self.ar, self.lookup, strict=True)]
        depths = range(len(self.reached))
        return {
            "kind": kind,
            "concurrency": concurrency,
            "prompts": self.prompts,
            "same": self.same,
            "tokens": self.tokens,
            "tpf": self.tokens / self.forwards,
            "acceptance": [self.accepted[k] / self.reached[k] for k in depths],
            "speedup": sum(self.ar) / sum(self.lookup),
            "speedup_range": [min(ratios), max(ratios)],
            "cpu_ms_per_token_ar": 1e3 * sum(self.ar) / self.tokens,
            "plans": dict(self.plans),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of mbpp, gsm8k, mt_bench")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompts", type=int, default=16, help="of each kind")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "lookup.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = prompts(options.data, options.prompts)
    slots = max(options.concurrency)
    model = load(options.model, dtype="float32")  # once: engines of one model share its weights
    ar, lookup = (engine(model, slots, **kind) for kind in ({"stride": 1}, LOOKUP))
    keep_what_is_loaded()
    params = SamplingParams(temperature=0, max_tokens=options.tokens)
    tallies: dict[tuple[str, int], Tally] = {}
    for first in range(0, options.prompts, ROUND):
        for size, kind in product(options.concurrency, given):
            messages = [[{"role": "user", "content": text}] for text in given[kind]]
            ids = [ar.encode_chat(one) for one in messages[first : first + ROUND]]
            tally = tallies.setdefault((kind, size), Tally())
            for at in range(0, len(ids), size):
                tally.run(ar, lookup, ids[at : at + size], params)
            write(tallies, options)


def write(tallies: dict[tuple[str, int], Tally], options: argparse.Namespace) -> None:
    rows = [tally.row(*key) for key, tally in tallies.items()]
    peak = round(getrusage(RUSAGE_SELF).ru_maxrss / 2**20, 2)
    settings = {"threads": 1, "dtype": "float32", "max_tokens": options.tokens, "peak_gib": peak}
    report = {"rows": rows, "environment": environment() | settings}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def engine(model: Idlm, slots: int, **settings: Any) -> LLM:
    """An engine whose steps are recorded before it is measured. Its pages hold 8 requests of 700
    tokens."""
    memory = {"max_num_seqs": slots, "max_model_len": CONTEXT, "kv_memory": "256MiB"}
    llm = LLM(model, threads=1, **memory, **settings)
    llm.engine.warm_up(600)
    return llm


if __name__ == "__main__":
    main()
