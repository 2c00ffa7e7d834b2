"""All outcomes against the chain: tokens per forward, measured and by the formulas of the planner.

    python -m benchmarks.outcomes [--model nano] [--adapter A] [--strides 4 8] [--temperature 0]
                                  [--requests 256]

The formulas of `idlm.decoding.plan` describe the long run, at the measured acceptance. A request's
first forward has no drafts to verify and its last one is cut at its end, so `tpf_decode` leaves
both out; `tpf` counts them, as everywhere else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from idlm.config import EngineConfig
from idlm.decoding.plan import Plan, expected_tokens
from idlm.engine.build import build_engine
from idlm.engine.request import Result
from idlm.environment import environment
from idlm.evaluation.metrics import summary, tpf_decode
from idlm.evaluation.workload import Request, workload
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

RESULTS = Path(__file__).parent / "results"


def decode(idlm: Idlm, plan: Plan, requests: Sequence[Request], temperature: float) -> list[Result]:
    """Decode all requests, 32 at once; request i has seed i."""
    engine = build_engine(idlm, EngineConfig(plan.stride, plan.branches, max_num_seqs=32))
    for seed, request in enumerate(requests):
        engine.add(request.prompt_token_ids, replace(request.params, temperature=temperature), seed)
    return [update.result for update in engine.run() if update.result is not None]


def figures(plan: Plan, results: Sequence[Result]) -> dict[str, Any]:
    totals, tpf = summary(results), tpf_decode(results)
    acceptance = [share for share in totals["acceptance"][: plan.drafts] if share is not None]
    expected = expected_tokens(plan, acceptance)
    off = None if tpf is None else tpf / expected - 1
    return {"plan": plan.name, "tpf_decode": tpf, "tpf_expected": expected, "off": off, **totals}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--adapter")
    parser.add_argument("--strides", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "outcomes.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    idlm = load(options.model, adapter=options.adapter)
    requests, rows = workload(idlm)(options.requests, 5), []
    for stride in options.strides:
        pair = [
            figures(plan, decode(idlm, plan, requests, options.temperature))
            for plan in _pair(stride)
        ]
        rows.append(
            {
                "stride": stride,
                "all_over_chain": pair[1]["tpf_decode"] / pair[0]["tpf_decode"],
                "plans": pair,
            }
        )
        print(json.dumps(rows[-1]))
    settings = {key: str(value) for key, value in vars(options).items() if key != "output"}
    options.output.write_text(
        json.dumps({"rows": rows, "environment": environment() | settings}, indent=1) + "\n"
    )


def _pair(stride: int) -> tuple[Plan, Plan]:
    return Plan(stride, "chain"), Plan(stride, "all")


if __name__ == "__main__":
    main()
