"""Prompts whose answers repeat given text, and prompts whose answers do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

FUNCTION = re.compile(r"def (\w+)\((\w+)")
TEXTS = 3
"""Stories in a text to summarise."""


def prompts(data: Path, number: int) -> dict[str, list[str]]:
    """`number` prompts of each kind, from the folders mbpp, gsm8k and mt_bench of `data`."""
    makers = {"edit": edits(data), "summary": summaries(data), "chat": chats(data, number)}
    return {kind: [next(made) for _ in range(number)] for kind, made in makers.items()}


def edits(data: Path) -> Iterator[str]:
    """A function of MBPP, to be repeated with its first argument renamed."""
    for row in _rows(data / "mbpp" / "mbpp.jsonl"):
        code = row["code"].replace("\r\n", "\n").replace("\t", "    ")
        found = FUNCTION.search(code)
        if found is not None and 200 <= len(code) <= 600:
            yield (
                f"Repeat this Python function with the argument {found[2]} renamed to value. "
                f"Change nothing else, and explain nothing.\n\n```python\n{code}\n```"
            )


def summaries(data: Path) -> Iterator[str]:
    """A few stories of GSM8K, to be summarised."""
    stories = [row["question"] for row in _rows(data / "gsm8k" / "test.jsonl")]
    for at in range(0, len(stories), TEXTS):
        text = "\n\n".join(stories[at : at + TEXTS])
        yield f"Summarize the following text. Keep names and numbers.\n\n{text}"


def chats(data: Path, number: int) -> Iterator[str]:
    """Questions of MT-Bench, spread over its categories."""
    rows = _rows(data / "mt_bench" / "question.jsonl")
    for row in rows[:: len(rows) // number]:
        yield row["turns"][0]


def _rows(file: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
