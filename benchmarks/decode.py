"""AR against ISD on the bundled model, both through the cached decoder, in turn: `make bench`.

Writes medians, every round, versions and hardware to benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from idlm.decoding.params import SamplingParams
from idlm.engine.llm import LLM, Result
from idlm.evaluation.metrics import summary
from idlm.evaluation.speed import Lap, race, same_tokens
from idlm.models.loading import load
from idlm.nano.problems import held_out_problems

RESULTS = Path(__file__).parent / "results" / "decode.json"
PLANS: dict[str, tuple[int, str]] = {
    "AR": (1, "all"),
    "chain N=4": (4, "chain"),
    "all N=4": (4, "all"),
    "chain N=8": (8, "chain"),
    "all N=8": (8, "all"),
}


def machine() -> dict[str, object]:
    """The hardware and the versions a figure depends on."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "idlm")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def contestant(llm: LLM, questions: list[str]) -> Callable[[], list[Result]]:
    """A run over all questions, greedy."""
    params = SamplingParams(max_tokens=256, temperature=0.0)
    return lambda: [llm.chat([{"role": "user", "content": question}], params) for question in questions]


def row(lap: Lap, ar: Lap) -> dict[str, object]:
    """One line of the table; the speed-up's spread is over rounds, each against AR in the same round."""
    against = [mine / theirs for mine, theirs in zip(lap.rates, ar.rates, strict=True)]
    return {
        "identical": same_tokens(lap.results, ar.results),
        **summary(lap.results),
        "tokens_per_second": lap.tokens_per_second,
        "rounds": lap.rates,
        "speedup": median(against),
        "speedup_range": [min(against), max(against)],
    }


def main() -> None:
    """Run, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    idlm = load(options.model)
    questions = [problem.question for problem in held_out_problems(options.questions)]
    plans = {name: LLM(idlm, stride=stride, branches=branches) for name, (stride, branches) in PLANS.items()}
    laps = race({name: contestant(llm, questions) for name, llm in plans.items()}, options.rounds)
    rows = {name: row(lap, laps["AR"]) for name, lap in laps.items()}

    for name, figures in rows.items():
        line = "{tpf:5.2f} TPF  {tokens_per_second:7.0f} tokens/s  {speedup:5.2f}x  identical={identical}".format(
            **figures
        )
        print(f"{name:10} {line}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model": options.model, "questions": options.questions, "threads": options.threads}
    options.output.write_text(json.dumps({**machine(), **settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
