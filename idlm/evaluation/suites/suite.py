"""`Suite`: a benchmark as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idlm.evaluation.graders import Figures, Item

Rows = list[dict[str, Any]]
Splits = dict[str, Rows]


@dataclass(frozen=True)
class Own:
    """The suite as a task of our own: an answer in words, then a grader.

    Attributes:
        items: the items of the data: dicts with the fields that `prompt` and `grade` use.
        prompt: what is asked, of a chat model or of a base model.
        grade: the figures of an answer.
        until: texts that end a base model's answer; a chat model ends by itself.
        runs_code: whether the grader runs the answer.
    """

    items: Callable[[Splits], Rows]
    prompt: Callable[[Item, bool], str]
    grade: Callable[[Item, str], Figures]
    metric: str = "exact_match"
    until: tuple[str, ...] = ()
    max_tokens: int = 1024
    runs_code: bool = False


@dataclass(frozen=True)
class Harness:
    """The suite as tasks of lm-evaluation-harness.

    Attributes:
        folder: of the harness's tasks.
        task: the name of its task or group.
        split: rows by task, where the data of one file belongs to several tasks; None: all rows
            belong to `task`.
        metric: the figure that stands for the suite, as "metric,filter".
        scored: whether it compares likelihoods, so that nothing is generated.
    """

    folder: str
    task: str
    metric: str
    split: Callable[[Splits], dict[str, Splits]] | None = None
    scored: bool = False

    def tasks(self, data: Splits) -> dict[str, Splits]:
        """The rows of each task."""
        return {self.task: data} if self.split is None else self.split(data)


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        title: the paper's name for it.
        source: where its items come from: an id of the hub, or a page.
        folder: of the local files, below `--data`.
        files: by split, patterns of files in that folder; the first pattern that finds files is
            used. The first split is the one that is asked.
        harness: how the harness asks it; None if it has no task for it, or none that works offline.
        own: how we ask it; None if the harness's way is the only one.
        hub: the id and the configuration to load from the hub; None: local files only, or the
            harness loads it.
        speed: a suite without answers that is there to time.
    """

    name: str
    title: str
    source: str
    folder: str
    files: Mapping[str, Sequence[str]]
    harness: Harness | None = None
    own: Own | None = None
    hub: tuple[str, str | None] | None = None
    speed: bool = False

    @property
    def metrics(self) -> list[str]:
        """The figures that stand for it, ours and the harness's."""
        ways = [way.metric for way in (self.harness, self.own) if way is not None]
        return list(dict.fromkeys(ways)) or ["tokens per forward and second"]
