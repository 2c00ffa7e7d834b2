"""A journal of answers, so that an evaluation that was killed goes on where it was.

Each answer is a line of JSON, written as soon as it is there. A line that a kill cut short is the
last one, and is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idlm.inputs import read_lines


def key(kind: str, arguments: Any, repeat: int) -> str:
    """The name of a request: the same request, repeated, has another for each repetition."""
    text = json.dumps([kind, arguments, repeat], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def seed_of(name: str, base: int) -> int:
    """A seed for a request, that depends on nothing but its name and the seed of the run."""
    digest = hashlib.sha256(f"{base}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class Journal:
    """The answers in a file, by key.

    Args:
        path: None keeps them in memory alone.

    Attributes:
        answers: by key: {"value": the answer, and what else was recorded}.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.answers = path, dict[str, dict[str, Any]]()
        if path is not None and path.exists():
            self.answers = {line.pop("key"): line for line in _whole_lines(path)}

    def put(self, name: str, value: Any, **more: Any) -> None:
        """Keep an answer, on disk before this returns."""
        self.answers[name] = {"value": value, **more}
        if self.path is None:
            return
        line = json.dumps({"key": name, "value": value, **more}) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; cuts off a last one that is not whole."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    for line in read_lines(path):
        if line:
            yield json.loads(line)
