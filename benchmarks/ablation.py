"""Variants of the training recipe, judged by decoding.

    python -m benchmarks.ablation [--steps 150] [--batch 8] [--problems 40] [--seeds 0]
                                  [--only NAME ...] [--out FILE]

Every variant starts from the bundled base and has the same steps and the same texts in the same
order. Acceptance by depth and TPF come from greedy decoding of held-out problems with all outcomes,
at strides 4 and 8; `seconds` is the training time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

import idlm.nano.source  # noqa: F401  # registers its data
from idlm import LLM, SamplingParams, load
from idlm.environment import environment
from idlm.evaluation.accuracy import evaluate
from idlm.evaluation.metrics import summary
from idlm.nano.problems import held_out_problems
from idlm.training.read_config import load_config
from idlm.training.run import train

CONFIGS = Path(__file__).parent.parent / "configs"
LORA, FULL = "nano-lora.yaml", "nano-full.yaml"
DIRECT = {"stages.0.block_size": 7}
KL = {"stages.0.tv": 0, "stages.0.kl": 1, "stages.1.tv": 0, "stages.1.kl": 1}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "lora: CE + TV, random phase, direct b=7": (LORA, DIRECT),
    "lora: fixed phase": (LORA, DIRECT | {"random_phase": False}),
    "lora: CE only": (LORA, DIRECT | {"stages.0.tv": 0, "stages.1.tv": 0}),
    "lora: CE + KL": (LORA, DIRECT | KL),
    "lora: TV only": (LORA, DIRECT | {"stages.0.ce": 0, "stages.1.ce": 0}),
    "lora: curriculum b=3, 7": (LORA, {}),
    "full: lambda 0.2": (FULL, DIRECT | {"stages.0.lambda": 0.2, "stages.1.lambda": 0.2}),
    "full: lambda auto": (FULL, DIRECT | {"stages.0.lambda": "auto", "stages.1.lambda": "auto"}),
}


def run(
    config: str, overrides: dict[str, object], seed: int, steps: int, batch: int, problems: int
) -> dict[str, object]:
    """Train one variant and decode with it."""
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, object] = {
            "output_dir": folder,
            "seed": seed,
            "data.seed": 2 + seed,
            "batch_size": batch,
            "stages.0.steps": steps // 3,
            "stages.1.steps": steps - steps // 3,
            "optimizer.warmup": 10,
            "eval_steps": steps,
            "save_steps": steps,
        }
        started = time.perf_counter()
        train(
            load_config(
                CONFIGS / config,
                [f"--{key}={value}" for key, value in {**common, **overrides}.items()],
            )
        )
        seconds = time.perf_counter() - started
        final = str(Path(folder) / "final")
        idlm = load("nano-base", adapter=final) if config == LORA else load(final)
    row: dict[str, object] = {"seconds": seconds}
    for stride in (4, 8):
        llm = LLM(idlm, stride=stride, branches="all")
        accuracy = evaluate(
            llm, held_out_problems(problems), SamplingParams(temperature=0, max_tokens=256)
        )
        totals = summary(accuracy.results)
        row[f"N={stride}"] = {
            "tpf": totals["tpf"],
            "acceptance": totals["acceptance"],
            "accuracy": accuracy.share,
        }
    return row


def main() -> None:
    """Run the variants one after the other and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {
        "steps": args.steps,
        "batch": args.batch,
        "problems": args.problems,
        "seeds": args.seeds,
        "environment": environment(),
    }
    variants: dict[str, list[object]] = {name: [] for name in args.only}
    for seed in args.seeds:
        for name in args.only:
            variants[name].append(run(*VARIANTS[name], seed, args.steps, args.batch, args.problems))
            print(name, f"seed {seed}", json.dumps(variants[name][-1]), file=sys.stderr)
    text = json.dumps(report | {"variants": variants}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
