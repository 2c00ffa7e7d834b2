"""Held-out accuracy and TPF of the bundled models as JSON: `python -m idlm.nano.evaluate`.

The base and the full fine-tune also run with transformers' batched `generate`, which shares no
decoding code with ours. Each of our runs reports the share of problems with the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from idlm.chat_template import PromptEncoder
from idlm.engine.llm import LLM
from idlm.environment import environment
from idlm.evaluation.accuracy import evaluate
from idlm.evaluation.metrics import summary
from idlm.models.loading import load
from idlm.nano.problems import Problem, held_out_problems, read_answer
from idlm.params import SamplingParams

WEIGHTS = Path(__file__).parent / "weights"
FOLDERS = {"nano": WEIGHTS / "base", "nano-full": WEIGHTS / "full"}
RUNS: dict[str, tuple[str, int, str]] = {
    f"{model} N={stride} {branches}": (model, stride, branches)
    for model in ("nano", "nano-full")
    for stride, branches in ((1, "all"), (4, "all"), (4, "chain"), (8, "all"), (8, "chain"))
}
"""Model, stride, branches."""
LIMIT = 256


def stock_outputs(folder: Path, problems: Sequence[Problem], batch: int = 100) -> list[list[int]]:
    """Greedy outputs of a model by transformers' `generate`, with their stop tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    encoder = PromptEncoder(tokenizer, folder.name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs = []
    for start in range(0, len(problems), batch):
        chats = [
            [{"role": "user", "content": problem.question}]
            for problem in problems[start : start + batch]
        ]
        prompts: Any = tokenizer.pad({"input_ids": encoder.chats(chats)}, return_tensors="pt")
        with torch.inference_mode():
            rows = model.generate(**prompts, max_new_tokens=LIMIT, do_sample=False)
        for row in rows[:, prompts["input_ids"].shape[1] :].tolist():
            end = (
                row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            )
            outputs.append(row[:end])
    return outputs


def share_right(problems: Sequence[Problem], outputs: list[list[int]]) -> float:
    """The share of problems whose output (token ids) ends with the right answer."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["nano"])
    texts = (str(tokenizer.decode(output, skip_special_tokens=True)) for output in outputs)
    right = [
        read_answer(text) == problem.answer for text, problem in zip(texts, problems, strict=True)
    ]
    return sum(right) / len(right)


def main() -> None:
    """Run the chosen `RUNS`; print progress to stderr and the report to stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    problems = held_out_problems(options.problems)
    chosen = [RUNS[name] for name in options.runs]
    stock = {
        model: stock_outputs(FOLDERS[model], problems)
        for model in dict.fromkeys(run[0] for run in chosen)
    }
    report: dict[str, dict[str, object]] = {
        f"{FOLDERS[model].name}, transformers": {"accuracy": share_right(problems, outputs)}
        for model, outputs in stock.items()
    }
    for name, (model, stride, branches) in zip(options.runs, chosen, strict=True):
        params = SamplingParams(max_tokens=LIMIT, temperature=0.0)
        llm = LLM(load(model), stride=stride, branches=branches)
        accuracy = evaluate(llm, problems, params)
        same = sum(
            result.token_ids == output
            for result, output in zip(accuracy.results, stock[model], strict=True)
        )
        report[name] = {
            "accuracy": accuracy.share,
            "same_tokens_as_transformers": same / len(problems),
            **summary(accuracy.results),
            "seconds": accuracy.seconds,
        }
        print(name, json.dumps(report[name]), file=sys.stderr)
    print(
        json.dumps(
            {"problems": len(problems), "environment": environment(), "runs": report}, indent=1
        )
    )


if __name__ == "__main__":
    main()
