"""A step that converts a model against a step of plain supervised fine-tuning.

    python -m benchmarks.training_step MODEL gsm8k/train.jsonl [--rows 4] [--steps 5]
        [--threads 1] [--rank 64] [--rounds 3] [--out FILE]

Both train a LoRA of the same rank on the same linear layers, on the same rows: idlm by CE + TV with
blocks of 3, the other by transformers' stock `Trainer` on peft's model, cross entropy of the
response. The rows have nearly one length, so that batches differ in nothing but their order. Each
run is a process of its own and they take turns. The first step of a run is left out; the memory is
the most that the process held from its first step on, beyond what it held before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.memory import status
from idlm.environment import environment

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Row = dict[str, list[int]]


class Clock:
    """Seconds and CPU seconds of each step, and bytes of the process."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.held = 0

    def begin(self) -> None:
        """Before a step; the first one starts the count of the peak."""
        if not self.steps and not self.held:
            self.held = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
        self.at = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """After a step."""
        self.steps.append(
            (time.perf_counter() - self.at[0], time.process_time() - self.at[1]),
        )

    def report(self) -> dict[str, float]:
        """The means of all steps but the first."""
        seconds, cpu = (mean(column) for column in zip(*self.steps[1:], strict=True))
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_bytes": status("VmHWM"),
            "step_bytes": status("VmHWM") - self.held,
        }


def conversion(model: str, rows: list[Row], options: argparse.Namespace) -> dict[str, float]:
    """`idlm train` on the rows."""
    from idlm.training.loop import Trainer
    from idlm.training.read_config import parse_config
    from idlm.training.run import train

    torch.set_num_threads(options.threads)
    clock, step = Clock(), Trainer.train_step

    def timed(trainer: Trainer) -> None:
        clock.begin()
        step(trainer)
        clock.end()

    Trainer.train_step = timed  # type: ignore[method-assign]
    with TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
        tree = {
            "output_dir": f"{place}/run",
            "device": "cpu",
            "threads": options.threads,
            "batch_size": options.rows,
            "stages": [{"block_size": 3, "steps": options.steps, "ce": 1.0, "tv": 1.0}],
            "model": {"path": model},
            "lora": {"rank": options.rank, "alpha": options.rank, "targets": list(TARGETS)},
            "data": {"source": "jsonl", "path": str(data), "held_out": 1},
            "optimizer": {"warmup": 0, "lr": 1e-3},
        }
        train(parse_config(tree))
    return clock.report()


def fine_tuning(model: str, rows: list[Row], options: argparse.Namespace) -> dict[str, float]:
    """The stock Trainer with peft on the rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(options.threads)
    clock = Clock()

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            clock.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            clock.end()

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=list(TARGETS))
    )
    with TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place,
            per_device_train_batch_size=options.rows,
            max_steps=options.steps,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(
            adapted, arguments, data_collator=padded, train_dataset=rows, callbacks=[Timed()]
        ).train()
    return clock.report()


def padded(batch: list[Row]) -> dict[str, Any]:
    """A batch padded on the right; the loss is on the responses."""
    longest = max(len(row["prompt"]) + len(row["response"]) for row in batch)
    ids, labels, seen = [], [], []
    for row in batch:
        length = len(row["prompt"]) + len(row["response"])
        rest = longest - length
        ids.append(row["prompt"] + row["response"] + [0] * rest)
        labels.append([-100] * len(row["prompt"]) + row["response"] + [-100] * rest)
        seen.append([1] * length + [0] * rest)
    names = ("input_ids", "labels", "attention_mask")
    return {k: torch.tensor(v) for k, v in zip(names, (ids, labels, seen), strict=True)}


def rows_of(model: str, file: Path, count: int) -> list[Row]:
    """Questions and answers as token ids, those around the median length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[Row] = []
    for line in file.read_text(encoding="utf-8").splitlines()[: max(500, 2 * count)]:
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
        found.append({"prompt": prompt, "response": [*answer, tokenizer.eos_token_id]})
    found.sort(key=lambda row: len(row["prompt"]) + len(row["response"]))
    first = (len(found) - count) // 2
    return found[first : first + count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("file", type=Path, help='.jsonl rows with a "question" and an "answer"')
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = rows_of(options.model, options.file, options.rows * options.steps)
    kinds: dict[str, Callable[..., dict[str, float]]] = {
        "idlm": conversion,
        "transformers + peft": fine_tuning,
    }
    rounds = []
    for number in range(options.rounds):
        order = list(kinds) if number % 2 == 0 else list(reversed(kinds))
        of_round = {}
        for name in order:
            with get_context("spawn").Pool(1) as process:
                work = partial(kinds[name], options.model, rows, options)
                of_round[name] = process.apply(work)
        rounds.append(of_round)
        print(json.dumps(of_round), file=sys.stderr, flush=True)
    ratios = {
        key: median(r["idlm"][key] / r["transformers + peft"][key] for r in rounds)
        for key in ("seconds", "cpu_seconds", "peak_bytes", "step_bytes")
    }
    tokens = sum(len(row["prompt"]) + len(row["response"]) for row in rows) / options.steps
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    report = {"environment": environment(), "settings": settings, "tokens_of_a_step": tokens}
    text = json.dumps(report | {"rounds": rounds, "ratio": ratios}, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
