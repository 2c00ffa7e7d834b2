"""Speed suites: conversations whose turns a model answers one after the other, ungraded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

GENERATION = {"do_sample": False, "max_gen_toks": 1024, "until": []}


def answer(
    model: Any, rows: Sequence[Mapping[str, Any]], chat: bool, generation: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Let a model of the harness answer; rows have `turns`, the user's.

    All conversations go through their first turn together, then through the second, and so on.
    """
    talks: list[list[dict[str, str]]] = [[] for _ in rows]
    for turn in range(max(len(row["turns"]) for row in rows)):
        active = [at for at, row in enumerate(rows) if turn < len(row["turns"])]
        for at in active:
            talks[at].append({"role": "user", "content": rows[at]["turns"][turn]})
        options = {**GENERATION, **generation}
        asked = [SimpleNamespace(args=(_prompt(model, talks[at], chat), options)) for at in active]
        for at, text in zip(active, model.generate_until(asked), strict=True):
            talks[at].append({"role": "assistant", "content": text})
    return [
        {"id": row.get("question_id", at), "category": row.get("category"), "messages": talk}
        for at, (row, talk) in enumerate(zip(rows, talks, strict=True))
    ]


def _prompt(model: Any, talk: list[dict[str, str]], chat: bool) -> str:
    if chat:
        return str(model.apply_chat_template(talk))
    return "\n\n".join(message["content"] for message in talk) + "\n\n"
