"""Makes tasks of lm-evaluation-harness of a suite: the harness's own, or ours."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.tasks import TaskManager

from idlm.errors import InputError
from idlm.evaluation import cpu_time, local_data
from idlm.evaluation.suites.suite import Harness, Own, Rows, Splits, Suite

TASKS = Path(lm_eval.tasks.__file__).parent
ORDER_SEED, SHOTS_SEED = 0, 1234
"""The harness's own, of the order of choices (GPQA) and of few-shot examples."""
NO_LIKELIHOOD = "--generative asks for an answer in words instead"


@dataclass(frozen=True)
class Way:
    """How the suites are asked.

    Attributes:
        data: the folder of local files; None: the hub.
        chat: through a chat template.
        generative: our own form, in words, where the harness has a task too.
        limit: the most items of a suite, the first ones; over several tasks, as many of each.
        generation: what replaces the generation options of a task.
        run_code: whether answers may be run.
        scores: whether the model gives log-probabilities of a prompt.
    """

    data: Path | None = None
    chat: bool = True
    generative: bool = False
    limit: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    run_code: bool = False
    scores: bool = True


def form(suite: Suite, way: Way) -> Harness | Own | None:
    """How a suite is asked; None if it is a speed suite.

    Raises:
        InputError: that is not possible; the message names what to do.
    """
    chosen = suite.own if suite.harness is None or (way.generative and suite.own) else suite.harness
    if isinstance(chosen, Own) and chosen.runs_code and not way.run_code:
        raise InputError(
            f"suite {suite.name} runs code that the model writes; "
            "allow it with --run-code (no network, no files, limits), or leave the suite out"
        )
    if isinstance(chosen, Harness) and chosen.scored and not way.scores:
        raise InputError(
            f"suite {suite.name} compares likelihoods, which a chat API does not give; "
            f"{NO_LIKELIHOOD}, or use --raw with a server whose completions echo log-probabilities"
        )
    if way.data is None and suite.hub is None and suite.name != "ifeval":
        raise InputError(
            f"suite {suite.name} comes from local files only: get {suite.source}, "
            f"put its files into DIR/{suite.folder} and give --data DIR"
        )
    return chosen


def build(suite: Suite, way: Way) -> tuple[list[Any], int | None]:
    """The tasks of a suite, and the most items of each."""
    chosen = form(suite, way)
    assert chosen is not None  # a speed suite has no task
    if isinstance(chosen, Own):
        tasks = [_own(suite, chosen, way)]
    else:
        tasks = _of_harness(suite, chosen, way)
    for task in tasks:
        _same_order(task)
        task.set_fewshot_seed(SHOTS_SEED)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        if way.generation and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(way.generation), update=True)
    limit = None if way.limit is None else math.ceil(way.limit / len(tasks))
    return tasks, limit


def _same_order(task: Any) -> None:
    """Give a task the same documents whenever it makes them. GPQA's shuffles their choices, and the
    harness asks for them once for the requests and once more for the grading."""
    process = task.config.process_docs
    if process is None:
        return

    def seeded(documents: Any) -> Any:
        random.seed(ORDER_SEED)
        return process(documents)

    task.config.process_docs = seeded


def rows(suite: Suite, way: Way) -> Splits:
    """The rows of a suite, from local files or from the hub."""
    if way.data is not None:
        return local_data.read(way.data, suite)
    path, name = suite.hub or (suite.source, None)
    with _hub(suite):
        loaded = datasets.load_dataset(path, name)
    return {split: list(loaded[split]) for split in suite.files if split in loaded}


@contextmanager
def _hub(suite: Suite) -> Iterator[None]:
    """Turn what goes wrong while a data set is fetched into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(
            f"suite {suite.name}: {suite.source} cannot be loaded from the hub ({reason}); "
            f"put its files into DIR/{suite.folder} and give --data DIR"
        ) from None


def _of_harness(suite: Suite, chosen: Harness, way: Way) -> list[Any]:
    if chosen.folder == "minerva_math":
        cpu_time.prepare()
    manager = TaskManager(include_path=[str(TASKS / chosen.folder)], include_defaults=False)
    if way.data is None:
        with _hub(suite):
            return list(manager.load([chosen.task])["tasks"].values())
    parts = chosen.tasks(local_data.read(way.data, suite))
    known = set(manager.all_subtasks)
    unknown = sorted(parts.keys() - known)
    if unknown:
        raise InputError(
            f"suite {suite.name}: the data names a part {unknown[0]!r} that the harness does not "
            "know; take its rows out, or use --generative"
        )
    empty: Splits = {split: [] for split in suite.files}
    members = [
        {"task": name, "custom_dataset": _dataset({**empty, **splits})}
        for name, splits in parts.items()
    ]
    loaded = manager.load([{"group": f"idlm {suite.name}", "task": members}])
    tasks = list(loaded["tasks"].values())
    for task in tasks:
        _check_examples(suite, task)
    return tasks


def _check_examples(suite: Suite, task: Any) -> None:
    """Check that a task that shows examples has some.

    Raises:
        InputError: there is no file of them.
    """
    split = task.config.fewshot_split or task.config.training_split
    if task.config.num_fewshot and split in suite.files and not len(task.dataset[split]):
        raise InputError(
            f"suite {suite.name} shows {task.config.num_fewshot} examples; put a file like "
            f"{suite.files[split][0]}.jsonl beside the others, or use --generative"
        )


def _dataset(splits: Splits) -> Callable[..., dict[str, Any]]:
    """A function that gives the harness the rows, whatever it passes."""

    def load(**_: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    return load


def _own(suite: Suite, own: Own, way: Way) -> Any:
    """Our form of a suite as a task: documents of a prompt and an item, and a grader."""
    items = own.items(rows(suite, way))
    if way.limit is not None:
        items = items[: way.limit]
    if not items:
        raise InputError(f"suite {suite.name}: the data holds no item; see 'idlm eval --list'")
    documents: Rows = [
        {"text": own.prompt(item, way.chat), "item": json.dumps(item, ensure_ascii=False)}
        for item in items
    ]
    options = {"do_sample": False, "max_gen_toks": own.max_tokens}
    config = {
        "task": suite.name,
        "custom_dataset": _dataset({"test": documents}),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": _text,
        "doc_to_target": _target,
        "process_results": _graded(own),
        "generation_kwargs": {**options, "until": [] if way.chat else list(own.until)},
        "metric_list": [{"metric": own.metric, "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    return TaskManager(include_defaults=False).load([config])["tasks"][suite.name]


def _text(document: Mapping[str, str]) -> str:
    return document["text"]


def _target(document: Mapping[str, str]) -> str:
    item = json.loads(document["item"])
    return str(item.get("target", ""))


def _graded(own: Own) -> Callable[[Mapping[str, str], list[str]], dict[str, float]]:
    def process(document: Mapping[str, str], answers: list[str]) -> dict[str, float]:
        return own.grade(json.loads(document["item"]), answers[0])

    return process
