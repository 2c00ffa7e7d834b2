"""The reports of a run: JSON lines in `metrics.jsonl`, lines or a progress display on stderr, and
the services of `report_to`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from idlm.models.sources import first_line
from idlm.training.checkpoint import replace_text
from idlm.training.processes import writing

METRICS = "metrics.jsonl"
SHOWN = {
    "loss": "loss {:.4g}",
    "held_out_ce": "held-out {:.4g}",
    "tpf": "TPF {:.3f}",
    "acceptance": "acceptance {}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gib": "{:.1f} GiB",
}
"""The latest figures beside the bar, in this order."""


class Meter:
    """Speed and memory since the last reading.

    Args:
        tokens: of the texts that the run has taken so far.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.seconds = tokens, 0.0

    def read(self, tokens: int, device: torch.device) -> dict[str, float]:
        """Tokens a second of all ranks, while training, and GiB of this process: the most on its
        GPU, or what it takes of a CPU's memory now."""
        rate = (tokens - self.tokens) / max(self.seconds, 1e-9)
        self.tokens, self.seconds = tokens, 0.0
        cuda = device.type == "cuda"
        held = (
            torch.cuda.max_memory_allocated(device) if cuda else psutil.Process().memory_info().rss
        )
        return {"tokens_per_second": round(rate, 1), "memory_gib": round(held / 2**30, 3)}


class Log:
    """The reports of a run; only its main process writes them.

    Attributes:
        entries: every report, including those before the run was resumed.
    """

    def __init__(self, folder: Path, main: bool, trackers: Sequence[GeneralTracker] = ()) -> None:
        self.file = folder / METRICS
        self.main = main
        self.trackers = list(trackers)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not main)
        self.entries: list[dict[str, Any]] = []
        self._latest: dict[str, Any] = {}
        self._show: Callable[[str], None] = lambda figures: None
        self._left = ""

    def message(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def running(self, step: int, steps: int) -> Iterator[Callable[[int], None]]:
        """Drop the reports after `step` of a killed run; yields a function that sets the display to
        a step."""
        if self.main:
            self.entries = read_entries(self.file, step)
            with writing(self.file):
                lines = "".join(json.dumps(entry) + "\n" for entry in self.entries)
                replace_text(self.file, lines)
        shown, began = self.main and self.console.is_terminal, perf_counter()
        with Progress(*_columns(), console=self.console, disable=not shown) as bar:
            task = bar.add_task("train", total=steps, completed=step, figures="")
            self._show = lambda figures: bar.update(task, figures=figures)

            def advance(done: int) -> None:
                bar.update(task, completed=done)
                seconds = (perf_counter() - began) / max(done - step, 1) * (steps - done)
                self._left = str(timedelta(seconds=round(seconds)))

            yield advance

    def write(self, entry: dict[str, Any]) -> None:
        """Add a report; its key `step` counts the optimizer steps taken.

        Raises:
            InputError: it cannot be written.
        """
        self.entries.append(entry)
        if not self.main:
            return
        with writing(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
        line = "  ".join(f"{key} {_short(value)}" for key, value in entry.items())
        self.message(line if self.console.is_terminal else f"{line}  left {self._left}")
        self._latest |= entry
        self._show(figures(self._latest))
        self._track(entry)

    def _track(self, entry: dict[str, Any]) -> None:
        """Send a report to each service. One that fails is left out from then on: the run goes
        on."""
        values = flat(entry)
        step = values.pop("step")
        for tracker in list(self.trackers):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # each service raises errors of its own
                self.message(f"{tracker.name} failed and gets no more figures: {first_line(error)}")
                self.trackers.remove(tracker)


def _columns() -> Iterator[Any]:
    yield BarColumn(bar_width=20)
    yield MofNCompleteColumn()
    yield TextColumn("{task.fields[figures]}", markup=False)
    yield from (TimeElapsedColumn(), TimeRemainingColumn())


def figures(latest: Mapping[str, Any]) -> str:
    """The figures of a display: the last value of each key."""
    return "  ".join(
        form.format(_short(latest[key]) if isinstance(latest[key], list) else latest[key])
        for key, form in SHOWN.items()
        if key in latest
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their paths: `acceptance/1` is the first of the list."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list):
            value = {str(at): item for at, item in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}/")
        else:
            values[f"{prefix}{key}"] = value
    return values


def read_entries(file: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """The reports up to `step`, without a line cut off by a kill."""
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
