"""overhead(W), the time of a W-row step over that of a 1-row step, and the planner's choice.

    python -m benchmarks.cost_curve [--models nano 0.1B 0.6B] [--batches 1 8] [--acceptance 0.9]
                                    [--threads 1] ...

0.1B, 0.6B and 8B are random models of those sizes: the cost of a step does not depend on the
weights. Steps are the engine's own, on slots with 256 cached tokens. Plans take turns; figures are
medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.shapes import SHAPES, random_model
from idlm import LLM
from idlm.decoding.plan import AR, Plan, choose, expected_tokens
from idlm.environment import environment
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load

RESULTS = Path(__file__).parent / "results" / "cost_curve.json"
PLANS = (AR, Plan(2, "all"), Plan(4, "chain"), Plan(4, "all"), Plan(8, "chain"), Plan(8, "all"))
"""Windows of 1, 4, 7, 16, 15 and 64 rows."""


def step_costs(
    llm: LLM, batch: int, repeats: int, plans: Sequence[Plan] = PLANS
) -> dict[Plan, float]:
    """Median seconds of each plan's step; the plans take turns."""
    turns = [
        {plan: llm.engine.runner.measure(plan, batch) for plan in plans} for _ in range(repeats)
    ]
    return {plan: median(turn[plan] for turn in turns) for plan in plans}


def curve(costs: dict[Plan, float], acceptance: list[float]) -> dict[str, object]:
    """A row of the report, for one batch size."""
    choice = choose(PLANS, costs, acceptance)
    rates = {plan: expected_tokens(plan, acceptance) / cost for plan, cost in costs.items()}
    return {
        "ar_step_ms": 1e3 * costs[AR],
        "overhead": {
            f"{plan.width} ({plan.name})": cost / costs[AR] for plan, cost in costs.items()
        },
        "expected_speedup": {plan.name: rate / rates[AR] for plan, rate in rates.items()},
        "planner": choice.plan.name,
        "reason": choice.reason,
    }


def subject(name: str, dtype: torch.dtype, device: str) -> Idlm:
    """A random model if `name` is a shape, else a checkpoint."""
    return (
        random_model(name, dtype, device)
        if name in SHAPES
        else load(name, dtype=dtype, device=device)
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["nano", "0.1B", "0.6B"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--acceptance", type=float, nargs="+", default=[0.9], help="by depth; the last one goes on"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    models: dict[str, object] = {}
    for name in options.models:
        idlm = subject(name, getattr(torch, options.dtype), options.device)
        llm = LLM(idlm, stride=8, branches="all", max_num_seqs=max(options.batches))
        rows = {
            batch: curve(step_costs(llm, batch, options.repeats), options.acceptance)
            for batch in options.batches
        }
        models[name] = {"parameters": idlm.model.num_parameters(), "batches": rows}
        for batch, row in rows.items():
            over = ", ".join(f"{width}: {ratio:.2f}" for width, ratio in row["overhead"].items())  # type: ignore[attr-defined]
            print(f"{name}, batch {batch}: AR step {row['ar_step_ms']:.2f} ms; overhead {over}")
            print(f"    {row['reason']}")
    report = {
        "models": models,
        "acceptance": options.acceptance,
        "dtype": options.dtype,
        "device": options.device,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
