"""CPU time of a step by the layer that MASK rows enter at, with random adapters.

    python -m benchmarks.entry_cost MODEL [--entries 0 8 15 20] [--rounds 3] [--int8] [--out FILE]

A round has a process for each entry, one after the other: entries in turn. A figure is the median
of the rounds, of the fastest third of a round's steps; `ar` is that of a window of one row. With
--int8 MASK rows have int8 weights of their own, without it none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median

import torch

from idlm import LLM, load
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features
from idlm.engine import products
from idlm.engine.step import StepKey
from idlm.environment import environment
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach

PREFIX = 256


def costs(model: str, entry: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of CPU time of a step, with AR and with all outcomes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    products.drafts_pay = lambda *_: options.int8  # the same for all, whatever is measured
    idlm = load(model, dtype="float32")
    spec = LoraSpec(options.rank, 1.0, all_linear(idlm.model, entry), entry=entry)
    idlm.gate, idlm.block_size = attach(idlm.model, spec, idlm.mask_id), options.stride - 1
    for parameter in adapter_parameters(idlm.model).values():
        torch.nn.init.normal_(parameter, std=0.01)
    settings = {"kv_memory": "64MiB", "max_num_seqs": options.batch, "threads": 1}
    llm = LLM(idlm, stride=options.stride, branches="all", **settings)
    plans = {"ar": AR, "all": Plan(options.stride, "all")}
    return {name: _milliseconds(llm, plan, options) for name, plan in plans.items()}


@torch.inference_mode()
def _milliseconds(llm: LLM, plan: Plan, options: argparse.Namespace) -> float:
    runner, key = llm.engine.runner, StepKey(plan, Features())
    runner.slots.state.length[runner.slots.spare] = PREFIX
    runner._steps.prepare(key)
    times = []
    for _ in range(options.steps + 2):
        began = time.process_time()
        runner.step(key, [runner.slots.spare] * options.batch, PREFIX + runner.depth).read()
        times.append(1e3 * (time.process_time() - began))
    return mean(sorted(times[2:])[: options.steps // 3])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--entries", type=int, nargs="+", default=[0, 8, 15, 20])
    for name, value in (("rounds", 3), ("steps", 30), ("batch", 1), ("stride", 4), ("rank", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds: list[dict[int, dict[str, float]]] = []
    for _ in range(options.rounds):
        rounds.append({})
        for entry in options.entries:
            with get_context("spawn").Pool(1) as process:
                rounds[-1][entry] = process.apply(costs, (options.model, entry, options))
            print(entry, rounds[-1][entry], file=sys.stderr, flush=True)
    figures = {
        entry: {name: median(each[entry][name] for each in rounds) for name in ("ar", "all")}
        for entry in options.entries
    }
    report = {"environment": environment(), "figures": figures, "rounds": rounds}
    text = json.dumps(report, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
