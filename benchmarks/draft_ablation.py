"""What makes good drafts: the draft head, the layer at which MASK rows enter, and the loss.

    python -m benchmarks.draft_ablation configs/nano-lora.yaml [--prompts FILE] [--steps 150]
        [--seeds 0 1] [--only NAME ...] [--set key=value ...] [--strides 4 8] [--out FILE]

Every variant of the config has the same steps, and with a seed the same texts in the same order.
Its adapter decodes held-out prompts greedily: the bundled model's own problems, or a file of chat
prompts. TPF and acceptance by depth are those of the chain and of all outcomes; tokens a CPU second
are of one request after the other, with those of AR beside them. FILE is written after each
variant, and a run with the same FILE goes on after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import idlm.nano.source  # noqa: F401  # registers its data
from idlm import LLM, SamplingParams, load
from idlm.environment import environment
from idlm.evaluation.metrics import summary
from idlm.models.idlm_model import Idlm
from idlm.nano.problems import held_out_problems
from idlm.training.config import TrainConfig
from idlm.training.read_config import load_config
from idlm.training.run import train

Keys = dict[str, object]
MLP: Keys = {"head.kind": "mlp"}
TV_LATE: Keys = {"ce": [1, 0], "tv": [0, 1]}
VARIANTS: dict[str, tuple[Keys, Keys]] = {
    "head none": ({"head.kind": "none"}, {}),
    "head markov": ({"head.kind": "markov"}, {}),
    "head selector": ({"head.kind": "selector"}, {}),
    "head mlp": (MLP, {}),
    "head mlp, entry 1/4": (MLP | {"lora.entry": 1 / 4}, {}),
    "head mlp, entry 1/2": (MLP | {"lora.entry": 1 / 2}, {}),
    "head mlp, entry 2/3": (MLP | {"lora.entry": 2 / 3}, {}),
    "head mlp, CE": (MLP, {"tv": 0}),
    "head mlp, TV": (MLP, {"ce": 0}),
    "head mlp, CE to TV": (MLP, TV_LATE),
    "head mlp, LK": (MLP, {"ce": 0, "kl": 1, "tv": 1, "lk": 3}),
    "head mlp, exponential": (MLP, {"depth_weights": "exponential"}),
    "head mlp, D-PACE": (MLP, {"depth_weights": "dpace"}),
}
"""Keys of the config, where the entry is a share of the layers, and keys of its stage, which is
CE + TV in blocks of 7 otherwise."""


def configured(options: argparse.Namespace, name: str, seed: int, folder: str) -> TrainConfig:
    """The config of a variant."""
    keys, of_stage = VARIANTS[name]
    base = load_config(options.config, [f"--{each}" for each in options.set])
    layers = load(base.model.path, dtype="float32").model.config.num_hidden_layers
    share = keys.get("lora.entry", 0)
    assert isinstance(share, int | float)
    block = {"block_size": max(options.strides) - 1, "steps": options.steps, "ce": 1, "tv": 1}
    common: Keys = {
        "output_dir": folder,
        "seed": seed,
        "optimizer.warmup": max(options.steps // 10, 1),
        "eval_steps": options.steps,
        "eval_decode": 0,
        "save_steps": options.steps,
        "stages": json.dumps([block | of_stage]),
        "lora.entry": round(share * layers),
    }
    overrides = [f"--{key}={value}" for key, value in {**keys, **common}.items()]
    return load_config(options.config, [*(f"--{each}" for each in options.set), *overrides])


def chats(path: Path | None, count: int) -> list[list[dict[str, Any]]]:
    """Held-out prompts, as messages."""
    if path is None:
        problems = held_out_problems(count)
        return [[{"role": "user", "content": problem.question}] for problem in problems]
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["messages"] for line in lines]


def decoded(
    idlm: Idlm, plan: tuple[int, str], prompts: Sequence[Any], params: SamplingParams
) -> dict[str, Any]:
    """What an engine of a fixed plan does with the prompts."""
    stride, branches = plan
    llm = LLM(idlm, stride=stride, branches=branches, max_num_seqs=1, threads=1, kv_memory="256MiB")
    llm.chat(prompts[:1], params)  # its step is recorded
    began = time.process_time()
    results = llm.chat(prompts, params)
    seconds = time.process_time() - began
    totals: Mapping[str, Any] = summary(results)
    return {
        "tpf": totals["tpf"],
        "acceptance": totals["acceptance"],
        "tokens_per_cpu_second": totals["tokens"] / seconds,
    }


def run(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train a variant and decode with it."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(options, name, seed, folder)
        began = time.process_time()
        measured = train(config)
        seconds = time.process_time() - began
        idlm = load(config.model.path, adapter=str(Path(folder) / "final"), dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    prompts = chats(options.prompts, options.count)
    plans = [(1, "all")] + [(n, kind) for n in options.strides for kind in ("chain", "all")]
    rows = {
        "ar" if stride == 1 else f"{kind}-{stride}": decoded(idlm, (stride, kind), prompts, params)
        for stride, kind in plans
    }
    figures = {"train_cpu_seconds": seconds, "alpha": measured["alpha"], "decoding": rows}
    return {"seed": seed, **figures}


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The report that `--out` holds of an earlier run, or an empty one."""
    other = ("only", "seeds", "out")  # they say what is run, not how
    asked = {key: str(value) for key, value in vars(options).items() if key not in other}
    if options.out is None or not options.out.exists():
        return {"options": asked, "environment": environment(), "variants": {}}
    report: dict[str, Any] = json.loads(options.out.read_text())
    if report["options"] != asked:
        raise SystemExit(f"{options.out} has the options {report['options']}; name another --out")
    return report


def main() -> None:
    """Run the variants one after the other and print one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--count", type=int, default=20, help="prompts that are decoded")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--strides", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = begun(options)
    for seed in options.seeds:
        for name in options.only:
            rows = report["variants"].setdefault(name, [])
            if any(row["seed"] == seed for row in rows):
                continue
            row = run(options, name, seed)
            rows.append(row)
            print(f"{name}, seed {seed}: {json.dumps(row)}", file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
