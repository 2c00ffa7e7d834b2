"""The reports of a run: JSON lines in `metrics.jsonl`, the same on stderr, and a progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

COLUMNS = (BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)


class Log:
    """The reports of a run; only its main process writes them.

    Attributes:
        entries: every report, including those before the run was resumed.
    """

    def __init__(self, folder: Path, main: bool) -> None:
        self.file = folder / "metrics.jsonl"
        self.main = main
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not main)
        self.entries: list[dict[str, Any]] = []

    def message(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def running(self, step: int, steps: int) -> Iterator[Callable[[int], None]]:
        """Drop the reports after `step` of a killed run; yields a function that sets the bar to a
        step."""
        if self.main:
            self.entries = read_entries(self.file, step)
            lines = (json.dumps(entry) + "\n" for entry in self.entries)
            self.file.write_text("".join(lines), encoding="utf-8")
        shown = self.main and self.console.is_terminal
        columns = (column() for column in COLUMNS)
        with Progress(*columns, console=self.console, disable=not shown) as bar:
            task = bar.add_task("train", total=steps, completed=step)
            yield lambda done: bar.update(task, completed=done)

    def write(self, entry: dict[str, Any]) -> None:
        """Add a report; its key `step` counts the optimizer steps taken."""
        self.entries.append(entry)
        if self.main:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
        self.message("  ".join(f"{key} {_short(value)}" for key, value in entry.items()))


def read_entries(file: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """The reports up to `step`, by default all, without a line cut off by a kill."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                entries.append(entry)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return entries


def _short(value: Any) -> str:
    """A value for the console; numbers have four digits."""
    if isinstance(value, list):
        return "[" + " ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
