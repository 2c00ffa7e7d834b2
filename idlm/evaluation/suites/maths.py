"""Suites of mathematics: GSM8K, MATH-500, MathBench, AIME-24, AIME-25."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from idlm.evaluation import graders
from idlm.evaluation.graders import Figures, Item
from idlm.evaluation.suites import choice
from idlm.evaluation.suites.suite import Harness, Own, Rows, Splits, Suite


def prompt(item: Item, chat: bool) -> str:
    r"""The problem, and where the answer goes: into \boxed{}, or, with options, a letter."""
    if item.get("options"):
        return choice.prompt(item, chat)
    ask = "Reason step by step, and put the final answer within \\boxed{}."
    return (
        f"{item['question'].strip()}\n\n{ask}"
        if chat
        else f"Problem: {item['question']}\n\n{ask}\n\nSolution:"
    )


def grade(item: Item, text: str) -> Figures:
    """A letter if the item has options, else a value."""
    return graders.choice(item, text) if item.get("options") else graders.maths(item, text)


def own(split: str, question: str, answer: str, last: str | None = None) -> Own:
    """Our form of a suite with these fields; with `last` the answer is what follows it."""

    def items(data: Splits) -> Rows:
        return [
            {
                "question": row[question],
                "target": str(row[answer]).rpartition(last or "\0")[2].strip(),
            }
            for row in data[split]
        ]

    return _own(items)


def _own(items: Callable[[Splits], Rows]) -> Own:
    return Own(items, prompt, grade, until=("Problem:",), max_tokens=2048)


def _math_bench(data: Splits) -> Rows:
    """Cloze items have an answer; items of single choice have options and a letter."""
    items = []
    for row in data["test"]:
        item: dict[str, Any] = {"question": row["question"], "target": str(row["answer"]).strip()}
        items.append({**item, "options": list(row["options"])} if row.get("options") else item)
    return items


MATHS = (
    Suite(
        "gsm8k",
        "GSM8K",
        "openai/gsm8k",
        "gsm8k",
        {"test": ("*test*", "*"), "train": ("*train*",)},
        Harness("gsm8k", "gsm8k", "exact_match,flexible-extract"),
        own("test", "question", "answer", "####"),
        ("openai/gsm8k", "main"),
    ),
    Suite(
        "math-500",
        "MATH-500",
        "HuggingFaceH4/MATH-500",
        "math500",
        {"test": ("*test*", "*")},
        Harness("minerva_math", "minerva_math500", "math_verify,none"),
        own("test", "problem", "answer"),
        ("HuggingFaceH4/MATH-500", None),
    ),
    Suite(
        "mathbench",
        "MathBench",
        "https://github.com/open-compass/MathBench",
        "mathbench",
        {"test": ("**/*_en.jsonl", "**/*")},
        own=_own(_math_bench),
    ),
    Suite(
        "aime-24",
        "AIME-24",
        "Maxwell-Jia/AIME_2024",
        "aime24",
        {"train": ("*",)},
        Harness("aime", "aime24", "exact_match,none"),
        own("train", "Problem", "Answer"),
        ("Maxwell-Jia/AIME_2024", None),
    ),
    Suite(
        "aime-25",
        "AIME-25",
        "math-ai/aime25",
        "aime25",
        {"test": ("*",)},
        Harness("aime", "aime25", "exact_match,none"),
        own("test", "problem", "answer"),
        ("math-ai/aime25", None),
    ),
)
