"""Runs suites and writes what `idlm eval` gives: results, samples, and the journal.

    FOLDER/settings.json            what the answers depend on; another run has to agree
    FOLDER/SUITE.journal.jsonl      each answer, as soon as it is there
    FOLDER/SUITE.samples.jsonl      each item with its answer and its figures
    FOLDER/results.json             the figures of all suites of the run
    FOLDER/run.json                 time, speed, machine: what differs from run to run

Everything but the journal and run.json is the same whether the run was interrupted or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from lm_eval.evaluator import evaluate

import idlm
from idlm.environment import environment
from idlm.errors import InputError
from idlm.evaluation import conversations, ifeval, sandbox
from idlm.evaluation.journal import Journal
from idlm.evaluation.suites.suite import Own, Suite
from idlm.evaluation.tasks import Way, build, form, rows
from idlm.models.sources import read_json

SKIPPED = ("doc_hash", "prompt_hash", "target_hash", "metrics")


def run(
    model: Any,
    suites: Sequence[Suite],
    way: Way,
    folder: Path,
    settings: Mapping[str, Any],
    show: Any,
) -> dict[str, Any]:
    """Ask a model all suites, and return what results.json holds.

    Args:
        model: an `EngineModel` or a `UrlModel`.
        settings: what the answers depend on, for settings.json.
        show: a function that begins the progress of a suite and returns one that advances it.

    Raises:
        InputError: a suite cannot be asked, or the folder belongs to other settings.
    """
    check(suites, way)
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder / "settings.json", settings)
    results, runs = {}, {}
    for suite in suites:
        journal = Journal(folder / f"{suite.name}.journal.jsonl")
        known, started = set(journal.answers), perf_counter()
        ask = _talk if suite.speed else _ask
        figures, samples = ask(model, suite, way, journal, show, settings)
        _write_lines(folder / f"{suite.name}.samples.jsonl", samples)
        results[suite.name] = figures
        runs[suite.name] = _speed(journal, known, perf_counter() - started)
    report = {"settings": dict(settings), "versions": _versions(), "suites": results}
    _write(folder / "results.json", report)
    _write(folder / "run.json", {"suites": runs, "environment": environment()})
    return report


def check(suites: Sequence[Suite], way: Way) -> None:
    """Check that every suite can be asked, before a model is loaded.

    Raises:
        InputError: one cannot.
    """
    forms = [form(suite, way) for suite in suites]
    if any(isinstance(one, Own) and one.runs_code for one in forms):
        sandbox.check()
    if way.data is not None:
        for suite in suites:
            rows(suite, way)


def _versions() -> dict[str, str]:
    return {"idlm": idlm.__version__, "lm_eval": version("lm_eval")}


def _agree(file: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or check that they are those that are there."""
    if not file.exists():
        return _write(file, settings)
    there, ours = read_json(file), json.loads(json.dumps(settings))
    for name in sorted(there.keys() | ours.keys()):
        if there.get(name) != ours.get(name):
            raise InputError(
                f"{str(file.parent)!r} was written with {name}={there.get(name)!r}, "
                f"and this run has {ours.get(name)!r}; use another --output"
            )


def _ask(
    model: Any, suite: Suite, way: Way, journal: Journal, show: Any, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask a suite through the harness."""
    about = {}
    if suite.name == "ifeval":
        about["sentences"] = ifeval.prepare(offline=way.data is not None)
    tasks, limit = build(suite, way)
    count = sum(min(len(task.eval_docs), limit or len(task.eval_docs)) for task in tasks)
    model.start(journal, show(suite.title, count * _requests(tasks[0])), int(settings["seed"]))
    found = evaluate(
        lm=model,
        task_dict={"tasks": {task.task_name: task for task in tasks}},
        limit=limit,
        apply_chat_template=way.chat,
        fewshot_as_multiturn=way.chat,
        bootstrap_iters=0,
        confirm_run_unsafe_code=way.run_code,
    )
    samples = [
        {"task": task, **{k: v for k, v in sample.items() if k not in SKIPPED}}
        | {"metrics": {name: sample[name] for name in sample["metrics"]}}
        for task in found["samples"]
        for sample in sorted(found["samples"][task], key=lambda one: (one["doc_id"], one["filter"]))
    ]
    for sample in samples:
        for name in sample["metrics"]:
            sample.pop(name)
    versions = {task: found["versions"].get(task) for task in found["samples"]}
    return {"title": suite.title, **about, "tasks": versions, **figures(samples)}, samples


def _requests(task: Any) -> int:
    """How many requests of the model an item of a task makes, for the progress."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 1
    return len(task.doc_to_choice(next(iter(task.eval_docs))))


def _talk(
    model: Any, suite: Suite, way: Way, journal: Journal, show: Any, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let the model answer the conversations of a speed suite."""
    talks = rows(suite, way)["test"][: way.limit]
    count = sum(len(row["turns"]) for row in talks)
    model.start(journal, show(suite.title, count), int(settings["seed"]))
    samples = conversations.answer(model, talks, way.chat, way.generation)
    characters = sum(len(m["content"]) for s in samples for m in s["messages"][1::2])
    return {"title": suite.title, "answers": count, "characters": characters}, samples


def figures(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the samples, with its standard error and count.

    A figure that is a list, of an item with several instructions, counts each of its values.
    """
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample["metrics"].items():
            several = value if isinstance(value, list | tuple) else [value]
            values.setdefault(f"{name},{sample['filter']}", []).extend(map(float, several))
    return {"metrics": {name: mean_of(found) for name, found in sorted(values.items())}}


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error (None for one value) and count."""
    mean, count = fmean(values), len(values)
    if count == 1:
        return {"value": mean, "stderr": None, "n": 1}
    spread = sum((value - mean) ** 2 for value in values) / (count - 1)
    return {"value": mean, "stderr": (spread / count) ** 0.5, "n": count}


def _speed(journal: Journal, known: set[str], seconds: float) -> dict[str, Any]:
    """Tokens per forward of all answers, and tokens per second of those of this run."""
    texts = [one for one in journal.answers.values() if one.get("tokens")]
    forwards = sum(one.get("forwards") or 0 for one in texts)
    tokens = sum(one["tokens"] for one in texts)
    new = [one.get("tokens") or 0 for name, one in journal.answers.items() if name not in known]
    return {
        "answers": len(journal.answers),
        "tokens": tokens,
        "tpf": tokens / forwards if forwards else None,
        "new_answers": len(new),
        "new_tokens": sum(new),
        "seconds": seconds,
    }


def _write(file: Path, value: Mapping[str, Any]) -> None:
    _write_text(file, json.dumps(value, indent=1, default=str) + "\n")


def _write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    _write_text(file, "".join(_lines(lines)))


def _lines(values: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for value in values:
        yield json.dumps(value, default=str) + "\n"


def _write_text(file: Path, text: str) -> None:
    """Write a file at once: a kill leaves the old one or the new one."""
    staging = file.with_name(f".{file.name}.writing")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, file)
