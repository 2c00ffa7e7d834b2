"""How long running requests wait for their next tokens while a prompt of context length is
admitted.

    python -m benchmarks.worst_gap [--running 1 8] [--stride 4] [--branches chain] [--rounds 7]
                                   [--out FILE]

In each round `running` requests decode, and after twenty steps a prompt of nearly the whole context
joins. The result is the worst gap between two steps until the prompt is in, over the median gap
before it; and the same with the whole prompt in one chunk.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from idlm import SamplingParams, load
from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.engine.request import Terms
from idlm.environment import environment
from idlm.models.idlm_model import Idlm


def measure_round(
    idlm: Idlm, options: argparse.Namespace, running: int, whole: bool
) -> tuple[list[float], list[float]]:
    """Seconds between steps before the long prompt came, and while it was prefilled."""
    engine = ENGINES.setdefault(
        (running, whole),
        build_engine(
            idlm,
            EngineConfig(
                options.stride,
                options.branches,
                max_num_seqs=running + 1,
                prefill_tokens=4096 if whole else None,
            ),
        ),
    )
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    names = [
        engine.add([5 + i, 6, 7, 8], params, 0, Terms(salt=str(perf_counter()).encode()))
        for i in range(running)
    ]
    for _ in range(8):
        engine.step()
    before = _gaps(engine, 20)
    long = [5 + i % 600 for i in range(idlm.context - 8)]
    names.append(
        engine.add(
            long,
            SamplingParams(temperature=0, max_tokens=1),
            0,
            Terms(salt=str(perf_counter()).encode()),
        )
    )
    during = _gaps(engine, 1)
    while engine.scheduler.prefilling:
        during += _gaps(engine, 1)
    for name in names:
        engine.abort(name)
    while engine.busy:
        engine.step()
    return before, during


ENGINES: dict[tuple[int, bool], Engine] = {}


def _gaps(engine: Engine, steps: int) -> list[float]:
    gaps = []
    for _ in range(steps):
        started = perf_counter()
        engine.step()
        gaps.append(perf_counter() - started)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--branches", default="chain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    idlm, rows = load("nano"), []
    for running in options.running:
        for whole in (False, True):
            laps = [
                measure_round(idlm, options, running, whole) for _ in range(options.rounds + 6)
            ][6:]
            ratios = [max(during) / median(before) for before, during in laps]
            row = {
                "running": running,
                "prefill": "in one piece" if whole else "in pieces",
                "median_step_ms": 1e3 * median(gap for before, _ in laps for gap in before),
                "worst_gap_over_median_step": {
                    "median": median(ratios),
                    "min": min(ratios),
                    "max": max(ratios),
                },
                "pieces": median(len(during) for _, during in laps),
            }
            rows.append(row)
            print(json.dumps(row))
    if options.out:
        report = {
            "stride": options.stride,
            "branches": options.branches,
            "rows": rows,
            "environment": environment(),
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
