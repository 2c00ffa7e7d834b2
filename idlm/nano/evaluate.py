"""Held-out accuracy and TPF of the bundled models, one JSON object: `python -m idlm.nano.evaluate`.

The AR base is asked first, greedily; every other run reports beside its own figures whether it gave the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from idlm.cli.common import progress
from idlm.decoding.params import SamplingParams
from idlm.engine.llm import LLM
from idlm.evaluation.accuracy import Accuracy, evaluate
from idlm.evaluation.metrics import summary
from idlm.evaluation.speed import same_tokens
from idlm.models.loading import load
from idlm.nano.problems import held_out_problems

RUNS: tuple[tuple[str, int, str], ...] = (
    ("nano-base", 1, "all"),
    ("nano", 4, "all"),
    ("nano", 4, "chain"),
    ("nano", 8, "all"),
    ("nano", 8, "chain"),
    ("nano-full", 1, "all"),
    ("nano-full", 4, "all"),
    ("nano-full", 4, "chain"),
    ("nano-full", 8, "all"),
    ("nano-full", 8, "chain"),
)
"""Model, stride, branches."""
PARAMS = SamplingParams(max_tokens=256, temperature=0.0)


def figures(run: tuple[str, int, str], found: Accuracy, base: Accuracy | None) -> dict[str, object]:
    """One entry of the report."""
    model, stride, branches = run
    return {
        "model": model,
        "stride": stride,
        "branches": branches,
        "accuracy": found.share,
        "correct": found.correct,
        "same_tokens_as_base": None if base is None else same_tokens(found.results, base.results),
        **summary(found.results),
        "seconds": found.seconds,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--models", nargs="+", default=["nano-base", "nano", "nano-full"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    problems = held_out_problems(options.problems)
    base: Accuracy | None = None
    report = []
    for run in (run for run in RUNS if run[0] in options.models):
        llm = LLM(load(run[0]), stride=run[1], branches=run[2])
        with progress(f"{run[0]} N={run[1]} {run[2]}", len(problems)) as advance:
            found = evaluate(llm, problems, PARAMS, advance)
        base = found if run[0] == "nano-base" else base
        report.append(figures(run, found, base))
        print(json.dumps(report[-1]), file=sys.stderr)
    print(json.dumps({"problems": len(problems), "runs": report}))


if __name__ == "__main__":
    main()
