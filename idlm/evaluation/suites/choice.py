"""Suites of multiple choice: ARC-C, MMLU, MMLU-Pro, GPQA, GPQA-Diamond.

The harness compares the likelihoods of the choices (MMLU-Pro: reads a letter). Our own form asks
for an answer in words that ends in a letter, so that a model can think, and a server that gives no
log-probabilities can answer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from idlm.evaluation import graders
from idlm.evaluation.answers import LETTERS
from idlm.evaluation.graders import Item
from idlm.evaluation.suites.suite import Harness, Own, Rows, Splits, Suite


def prompt(item: Item, chat: bool) -> str:
    """The question and its choices."""
    lines = [item["question"].strip()]
    lines += [f"({letter}) {text}" for letter, text in zip(LETTERS, item["options"], strict=False)]
    ask = 'Think it through, then finish with "The answer is (X)", X being the letter.'
    return "\n".join([*lines, "", ask if chat else "Answer: Let us think step by step."])


def _item(question: str, options: Sequence[str], right: int) -> dict[str, Any]:
    return {"question": question, "options": list(options), "target": LETTERS[right]}


def _arc(row: Item) -> dict[str, Any]:
    choices = row["choices"]
    right = list(choices["label"]).index(row["answerKey"])
    return _item(row["question"], choices["text"], right)


def _mmlu(row: Item) -> dict[str, Any]:
    answer = row["answer"]
    right = LETTERS.index(answer) if isinstance(answer, str) else int(answer)
    return _item(row["question"], row["choices"], right)


def _mmlu_pro(row: Item) -> dict[str, Any]:
    return _item(row["question"], row["options"], LETTERS.index(row["answer"]))


def _gpqa(row: Item) -> dict[str, Any]:
    """The four answers in an order that the question alone decides."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {at}"] for at in (1, 2, 3))]
    order = list(range(4))
    digest = hashlib.sha256(row["Question"].encode()).hexdigest()
    random.Random(int(digest, 16)).shuffle(order)
    return _item(row["Question"], [options[at].strip() for at in order], order.index(0))


def own(read: Callable[[Item], dict[str, Any]], split: str) -> Own:
    """Our form of a suite whose rows `read` turns into items."""

    def items(data: Splits) -> Rows:
        return [read(row) for row in data[split]]

    return Own(items, prompt, graders.choice, until=("Question:",), max_tokens=2048)


def _subjects(data: Splits) -> dict[str, Splits]:
    """The rows of MMLU by subject."""
    return _parts(data, "test", "subject", "mmlu_")


def _categories(data: Splits) -> dict[str, Splits]:
    """The rows of MMLU-Pro by category."""
    return _parts(data, "test", "category", "mmlu_pro_")


def _parts(data: Splits, main: str, field: str, prefix: str) -> dict[str, Splits]:
    names = dict.fromkeys(row[field] for row in data[main])
    return {
        prefix + name.replace(" ", "_"): {
            split: [row for row in rows if row[field] == name] for split, rows in data.items()
        }
        for name in names
    }


CHOICE = (
    Suite(
        "arc-c",
        "ARC-C",
        "allenai/ai2_arc (ARC-Challenge)",
        "arc_challenge",
        {"test": ("*[Tt]est*", "*"), "train": ("*[Tt]rain*",), "validation": ("*[Vv]al*", "*Dev*")},
        Harness("arc", "arc_challenge", "acc_norm,none", scored=True),
        own(_arc, "test"),
        ("allenai/ai2_arc", "ARC-Challenge"),
    ),
    Suite(
        "mmlu",
        "MMLU",
        "cais/mmlu",
        "mmlu",
        {"test": ("*test*", "*"), "dev": ("*dev*",)},
        Harness("mmlu/default", "mmlu", "acc,none", _subjects, scored=True),
        own(_mmlu, "test"),
        ("cais/mmlu", "all"),
    ),
    Suite(
        "mmlu-pro",
        "MMLU-Pro",
        "TIGER-Lab/MMLU-Pro",
        "mmlu_pro",
        {"test": ("*test*", "*"), "validation": ("*val*",)},
        Harness("mmlu_pro", "mmlu_pro", "exact_match,custom-extract", _categories),
        own(_mmlu_pro, "test"),
        ("TIGER-Lab/MMLU-Pro", None),
    ),
    Suite(
        "gpqa",
        "GPQA",
        "Idavidrein/gpqa (gpqa_main; access on request)",
        "gpqa",
        {"train": ("*main*", "*")},
        Harness("gpqa/zeroshot", "gpqa_main_zeroshot", "acc,none", scored=True),
        own(_gpqa, "train"),
        ("Idavidrein/gpqa", "gpqa_main"),
    ),
    Suite(
        "gpqa-diamond",
        "GPQA-Diamond",
        "Idavidrein/gpqa (gpqa_diamond; access on request)",
        "gpqa",
        {"train": ("*diamond*",)},
        Harness("gpqa/zeroshot", "gpqa_diamond_zeroshot", "acc,none", scored=True),
        own(_gpqa, "train"),
        ("Idavidrein/gpqa", "gpqa_diamond"),
    ),
)
