"""What a run tells while it runs: a line per report on stderr, the same as JSON in metrics.jsonl, a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Report(TrainerCallback):
    """Writes every log entry of the Trainer to `metrics.jsonl` and to the console."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.jsonl"
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what a killed run reported after the checkpoint, and start the bar."""
        if not state.is_world_process_zero:
            return
        _keep_until(self.file, state.global_step)
        if self.console.is_terminal:
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(BarColumn(), MofNCompleteColumn(), *times, console=self.console)
            self.progress.add_task("train", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One entry."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, **{k: v for k, v in logs.items() if k not in ("epoch", "total_flos")}}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
        self.console.print("  ".join(f"{key} {_short(value)}" for key, value in entry.items()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; also called when a run ends in an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _keep_until(file: Path, step: int) -> None:
    """Drop the entries of later steps, and a line cut off by a kill."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _short(value: Any) -> str:
    """A number for the console: four digits."""
    if isinstance(value, list):
        return "[" + " ".join(_short(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
