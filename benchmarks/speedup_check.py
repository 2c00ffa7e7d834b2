"""The speed-up model against `idlm bench`, for nano on one core of a CPU.

    python -m benchmarks.speedup_check [--strides 2 4] [--concurrency 1 8 32] [--requests 32]
                                       [--repeats 1] [--rounds 20] [--out FILE]

The model gets a machine's constants, each measured apart from what is predicted:

* bandwidth, FLOP/s, overlap: nano's matrix products alone, by the kernels that an engine chooses,
  at 1, 64 and 8 rows.
* fixed: an engine's AR step of one request, of a random model with nano's layers and vocabulary
  that is 16 wide, so that its products cost next to nothing.

`step`: seconds of a decode step, predicted over measured. `step_with_its_overhead` takes for
`fixed` the narrow model's own step of the same plan and requests: what is then left is the
products', what is gone was work for each row or request, which the model does not have. `rate`:
tokens per second of `idlm bench`'s closed loop, predicted over measured, at the acceptance and the
mean number of requests of that run; rows of prompts are counted as arithmetic. All times are CPU
seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.kernels import MODELS, best
from benchmarks.shapes import random_model
from idlm import LLM
from idlm.decoding.plan import AR, Plan
from idlm.environment import environment
from idlm.evaluation.closed_loop import bench_engines
from idlm.evaluation.serving_bench import bench
from idlm.evaluation.speedup import (
    Forward,
    Load,
    Machine,
    Method,
    Shape,
    autoregressive,
    forward_seconds,
    strided,
)
from idlm.evaluation.workload import Draw, workload
from idlm.kernels.choice import PARAMETERS, recorded
from idlm.kernels.choice import choose_linears as choose
from idlm.kernels.linears import Linears
from idlm.kernels.prefetch import choose_prefetch
from idlm.models.loading import load

FEW, SOME, MANY = 1, 8, 64
"""Rows of the products that give bandwidth, overlap and FLOP/s."""
BODY = sum(inputs * outputs * count for inputs, outputs, count in MODELS["nano"][:-1])
NANO = Shape(6, 192, 640, 6, 2, 32, BODY, weight_bytes=4.0, cache_bytes=4.0)
PREFIX = 64
"""Cached tokens of a request in a measured step."""


@torch.inference_mode()
def product_seconds(rounds: int) -> dict[int, float]:
    """The seconds of all of nano's products, by rows."""
    seconds = dict.fromkeys((FEW, SOME, MANY), 0.0)
    for inner, out, count in MODELS["nano"]:
        weights = [torch.randn(out, inner) for _ in range(count)]
        linears = Linears([[weight] for weight in weights], "float32")
        choose_prefetch(linears)
        choose(linears)
        products = [partial(layer.multiply, adapter=None) for layer in linears.layers]
        few = max(1, PARAMETERS // weights[0].numel())
        calls = [recorded(products[at : at + few], inner) for at in range(0, count, few)]
        for rows in seconds:
            seconds[rows] += best({"": calls}, torch.randn(rows, inner), rounds)[""]
    return seconds


def machine(seconds: dict[int, float], fixed: float) -> Machine:
    """The constants: reads at `FEW` rows, arithmetic at `MANY`, and what hides at `SOME`."""
    parameters = NANO.body + NANO.head
    memory, each = seconds[FEW], seconds[MANY] / MANY
    compute = SOME * each
    hidden = (memory + compute - seconds[SOME]) / min(memory, compute)
    return Machine(NANO.weights / memory, 2 * parameters / each, fixed, min(1.0, max(0.0, hidden)))


def step_seconds(llm: LLM, plans: Sequence[Plan], batch: int, rounds: int) -> dict[str, float]:
    """The fewest CPU seconds of each plan's step, as of the products; the plans take turns."""
    turns = [
        {plan.name: llm.engine.runner.measure(plan, batch, PREFIX) for plan in plans}
        for _ in range(rounds)
    ]
    return {plan.name: min(turn[plan.name] for turn in turns) for plan in plans}


def predicted_rate(row: dict[str, Any], method: Method, of: Machine, draw: Draw) -> float:
    """Tokens per second of a run of the bench; `row` gives its requests at once and its prompts."""
    steps = sum(row["plans"].values())
    batch = row["tokens"] / row["tpf"] / steps
    drawn = draw(64, 1)
    prompt = fmean(len(request.prompt_token_ids) for request in drawn)
    answer = row["tokens"] / row["requests"]
    window = forward_seconds(method.forwards[0], NANO, of, Load(batch, prompt + answer / 2))
    rows = row["requests"] * prompt / steps
    arithmetic = replace(of, bandwidth=float("inf"), fixed=0.0)
    prefill = forward_seconds(Forward(rows, 0, 0), NANO, arithmetic, Load(1, prompt / 2))
    return batch * method.tpf / (window + prefill)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = measure(options)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All points, and the constants behind them."""
    plans = [AR, *(Plan(stride, "all") for stride in options.strides)]
    seconds, most = product_seconds(options.rounds), max(options.concurrency)
    narrow = LLM(
        random_model("narrow", torch.float32, context=512),
        stride=max(options.strides), branches="all", max_num_seqs=most, threads=1,
    )  # fmt: skip
    overhead = {
        batch: step_seconds(narrow, plans, batch, options.rounds)
        for batch in sorted({1, *options.concurrency})
    }
    constants = machine(seconds, overhead[1]["ar"])
    idlm = load("nano")
    draw, points = workload(idlm), []
    for plan in plans:
        mode = "ar" if plan == AR else "all"
        (engine,) = bench_engines(idlm, [mode], plan.stride, most)
        rows = bench([engine], draw, options.concurrency, options.requests, options.repeats)
        for row in rows:
            batch: Any = row["concurrency"]
            step = step_seconds(engine.llm, [plan], batch, options.rounds)[plan.name]
            points.append(point(plan, row, step, overhead[batch][plan.name], constants, draw))
            print(points[-1], flush=True)
    settings = {"requests": options.requests, "repeats": options.repeats, "rounds": options.rounds}
    return {
        "points": points,
        "machine": asdict(constants),
        "product_ms": {rows: 1e3 * each for rows, each in seconds.items()},
        "narrow_step_ms": {
            batch: {name: 1e3 * each for name, each in found.items()}
            for batch, found in overhead.items()
        },
        "environment": environment() | settings,
    }


def point(
    plan: Plan, row: dict[str, Any], step: float, overhead: float, of: Machine, draw: Draw
) -> dict[str, Any]:
    """The ratios of one plan and number of requests; `step` and `overhead` are measured seconds."""
    acceptance = [share for share in row["acceptance"] if share is not None]
    method = autoregressive() if plan == AR else strided(acceptance, plan.stride)
    cached = Load(row["concurrency"], PREFIX)
    forward = method.forwards[0]
    own = replace(of, fixed=overhead)
    rate = row["tokens_per_cpu_second"]
    return {
        "plan": plan.name,
        "concurrency": row["concurrency"],
        "step_ms": 1e3 * step,
        "tokens_per_cpu_second": rate,
        "tpf": row["tpf"],
        "tpf_predicted": method.tpf,
        "step": forward_seconds(forward, NANO, of, cached) / step,
        "step_with_its_overhead": forward_seconds(forward, NANO, own, cached) / step,
        "rate": predicted_rate(row, method, of, draw) / rate,
        "rate_with_its_overhead": predicted_rate(row, method, own, draw) / rate,
    }


if __name__ == "__main__":
    main()
