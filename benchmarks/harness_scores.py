"""Our engine beside the harness's own model `hf`, item by item, and over HTTP.

    python -m benchmarks.harness_scores MODEL [--items 20] [--data DIR] [--max-tokens 48]
                                        [--no-http] [--out FILE]

Two tasks of lm-evaluation-harness: likelihoods of choices, and texts. The bundled models get
arithmetic problems, others the first items of gsm8k in DIR. In float32, greedy. Every item is
compared: the text, the likelihood of each choice, which choice is greedy, and the figures. Over
HTTP `idlm serve` answers the harness's `local-completions` with `tokenizer_backend=remote` and its
`local-chat-completions`. Exit status 1 if an item differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from benchmarks.harness.process import ServerProcess, idlm_serve
from benchmarks.harness.results import report
from idlm.cli.eval import quiet
from idlm.evaluation.engine_model import EngineModel
from idlm.evaluation.local_data import rows
from idlm.models.sources import resolve
from idlm.nano.problems import held_out_problems

TOLERANCE = 1e-3
"""Of a likelihood in float32: sums of tens of log-probabilities, computed in other shapes."""


def items(model: str, count: int, data: Path | None) -> list[dict[str, Any]]:
    """Questions, answers, and three numbers to choose from."""
    if data is None:
        found = [(one.question, int(one.answer)) for one in held_out_problems(count)]
    else:
        lines = rows(data / "gsm8k" / "test.jsonl")[:count]
        found = [
            (row["question"], int(row["answer"].rpartition("#### ")[2].replace(",", "")))
            for row in lines
        ]
    return [
        {
            "question": question,
            "answer": str(value),
            "choices": [str(value + at) for at in range(3)],
        }
        for question, value in found
    ]


def tasks(documents: list[dict[str, Any]], kinds: Sequence[str], max_tokens: int) -> dict[str, Any]:
    """The tasks, as the harness takes them."""
    from datasets import Dataset

    shared = {
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    texts = {
        "task": "texts",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["\n\n"], "max_gen_toks": max_tokens, "do_sample": False, "temperature": 0.0
        },
        "filter_list": [
            {"name": "number", "filter": [
                {"function": "regex", "regex_pattern": "(-?[0-9]+)", "group_select": -1},
                {"function": "take_first"},
            ]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    choices = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_target": 0,
        "doc_to_choice": "choices",
    }
    configs = [{**shared, **one} for one in (texts, choices) if one["task"] in kinds]
    return dict(TaskManager(include_defaults=False).load(configs)["tasks"])


def ask(
    model: Any, documents: list[dict[str, Any]], kinds: Sequence[str], chat: bool, most: int
) -> Any:
    """The samples of a model by task, and its figures."""
    return evaluate(
        lm=model,
        task_dict={"tasks": tasks(documents, kinds, most)},
        apply_chat_template=chat,
        bootstrap_iters=0,
    )


def compare(left: Any, right: Any) -> dict[str, Any]:
    """By task: how many items are equal, how far likelihoods are apart, and both figures."""
    found = {}
    for task, samples in left["samples"].items():
        pairs = list(zip(samples, right["samples"][task], strict=True))
        apart = [
            abs(float(a[0][0]) - float(b[0][0]))
            for one, two in pairs
            for a, b in zip(one["resps"], two["resps"], strict=True)
            if task == "choices"
        ]
        metric = "exact_match,number" if task == "texts" else "acc,none"
        found[task] = {
            "items": len(pairs),
            "equal": sum(_same(task, *pair) for pair in pairs),
            "apart": max(apart, default=0.0),
            "figures": [float(one["results"][task][metric]) for one in (left, right)],
        }
    return found


def _same(task: str, left: Any, right: Any) -> bool:
    if task == "texts":
        return bool(left["resps"] == right["resps"])
    pairs = zip(left["resps"], right["resps"], strict=True)
    return left["acc"] == right["acc"] and all(
        bool(a[0][1]) == bool(b[0][1]) and abs(float(a[0][0]) - float(b[0][0])) < TOLERANCE
        for a, b in pairs
    )


def over_http(model: str, documents: list[dict[str, Any]], ours: Any, most: int) -> dict[str, Any]:
    """The harness's own models of servers, against our engine in this process."""
    found = {}
    command = idlm_serve(
        model, "--name", "m", "--dtype", "float32", "--stride", "1", "--threads", "1"
    )
    with ServerProcess(command) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        completions = LocalCompletionsAPI(
            base_url=f"{url}/completions", model="m", tokenizer_backend="remote"
        )
        both = ask(completions, documents, ("texts", "choices"), False, most)
        found["local-completions, remote tokenizer"] = compare(both, ours["plain"])
        chat = LocalChatCompletion(base_url=f"{url}/chat/completions", model="m", num_concurrent=1)
        texts = ask(chat, documents, ("texts",), True, most)
        found["local-chat-completions"] = compare(texts, ours["chat"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--data", type=Path, help="of gsm8k, for models that are not bundled")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    found = {Path(model).name: measure(model, args) for model in args.models}
    report({"models": found, "max_tokens": args.max_tokens, "tolerance": TOLERANCE}, args.out)
    parts = [part for one in found.values() for part in one.values()]
    good = all(task["equal"] == task["items"] for part in parts for task in part.values())
    return 0 if good else 1


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    most, bundled = args.max_tokens, not Path(model).exists()
    documents = items(model, args.items, None if bundled else args.data)
    mine = EngineModel(model, dtype="float32", stride=1, threads=1)
    both = ("texts", "choices")
    ours = {"plain": ask(mine, documents, both, False, most)}
    if not args.no_http:
        ours["chat"] = ask(mine, documents, ("texts",), True, most)
    del mine
    folder = str(resolve(model)[0])
    theirs = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
    found = {"hf": compare(ask(theirs, documents, both, False, most), ours["plain"])}
    del theirs
    return found if args.no_http else found | over_http(model, documents, ours, most)


if __name__ == "__main__":
    sys.exit(main())
