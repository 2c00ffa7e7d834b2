"""Loss by CPU time with 1, 2 and 4 phases of MASK rows over one clean half.

    python -m benchmarks.phases [--budget 120] [--seeds 0 1] [--phases 1 2 4] [--config FILE]
        [--out FILE] [--block_size 7] [-- --a.b=c ...]

Each run gets `--budget` CPU seconds of training steps: the cost of a step is measured first, and
the schedule is laid over as many steps as fit. What follows `--` are keys of the config. The loss
is CE + TV, so `tv` is that of held-out texts, 1 - alpha over all depths, and `ce` is that of the
last tenth of the steps, whose texts no step had before. Each run is a process of its own, and the
arms take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import idlm.nano.source  # noqa: F401  # registers its data
from benchmarks.memory import alone
from benchmarks.training_step import Clock
from idlm.environment import environment
from idlm.training.log import METRICS, read_entries
from idlm.training.loop import Trainer
from idlm.training.read_config import load_config
from idlm.training.run import train

CONFIG = Path(__file__).parent.parent / "configs" / "nano-lora.yaml"
TRIAL = 5
"""Steps that tell what a step costs."""


def run(options: argparse.Namespace, phases: int, seed: int, steps: int) -> dict[str, Any]:
    """Train; returns CPU seconds, texts, and the loss at the end."""
    torch.set_num_threads(1)
    clock, step = Clock(), Trainer.train_step

    def timed(trainer: Trainer) -> dict[str, float]:
        clock.begin()
        figures = step(trainer)
        clock.end()
        return figures

    Trainer.train_step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        stage = {"steps": steps, "block_size": options.block_size, "ce": 1, "tv": 1}
        keys = {
            "output_dir": folder,
            "stages": json.dumps([stage]),
            "phases": phases,
            "seed": seed,
            "data.seed": 2 + seed,
            "threads": 1,
            "log_steps": max(steps // 10, 1),
            "eval_steps": steps,
            "save_steps": steps,
        }
        given = [f"--{key}={value}" for key, value in keys.items()]
        measured = train(load_config(options.config, given + options.keys))
        last = [entry for entry in read_entries(Path(folder) / METRICS) if "loss" in entry][-1]
    cpu = [seconds for _, seconds in clock.steps]
    return {
        "steps": steps,
        "cpu_seconds": sum(cpu),
        "step_seconds": mean(cpu[1:]),
        "tokens": last["tokens"],
        "ce": last["ce_noisy"],
        "tv": 1 - mean(measured["alpha"]),
        "alpha": measured["alpha"],
        "tpf": measured["tpf"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=120.0, help="CPU seconds of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--phases", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--block_size", type=int, default=7)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path)
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        for phases in options.phases:
            cost = alone(run, options, phases, seed, TRIAL)["step_seconds"]
            found = alone(run, options, phases, seed, max(round(options.budget / cost), TRIAL))
            rows.append({"phases": phases, "seed": seed, **found})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    settings = {"budget": options.budget, "block_size": options.block_size}
    settings |= {"config": options.config.name, "keys": options.keys}
    text = json.dumps({"environment": environment(), "settings": settings, "runs": rows}, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
