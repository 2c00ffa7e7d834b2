"""Self-distillation: the model that is converted writes the responses, so a run needs only prompts.

The engine decodes several prompts at once. A response is a function of its prompt and of a seed of
its own, and rows are written in the order of the prompts. So a run that was killed goes on to the
same files, byte for byte where the arithmetic does not depend on the batch (float64).
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from idlm.engine.engine import Engine
from idlm.engine.request import Result
from idlm.errors import InputError
from idlm.models.adapter import fingerprint
from idlm.params import SamplingParams
from idlm.progress import Lines
from idlm.training.prompts import Prompt, Prompts
from idlm.training.shards import Place, Shards

AHEAD = 4
"""Samples for each slot of the engine that run or wait for an earlier one to be written."""
NGRAM, REPEATED = 8, 0.5
"""A response is repetitive if more than this share of its runs of so many tokens were there
before."""


@dataclass(frozen=True)
class Recipe:
    """How responses are made and which are kept.

    Attributes:
        params: of each response; its seed follows from `seed` and its place.
        samples: of each prompt.
        keep_truncated: also keep responses that end at `max_tokens` or the context.
        keep_repetitive: also keep responses that repeat themselves.
        shard_rows: rows of a file.
    """

    params: SamplingParams
    samples: int = 1
    seed: int = 0
    keep_truncated: bool = False
    keep_repetitive: bool = False
    shard_rows: int = 1000

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that differ from the defaults, with the temperature and the
        limit."""
        plain, given = SamplingParams(), self.params
        shown = {
            f.name: getattr(given, f.name)
            for f in fields(given)
            if f.name in ("temperature", "max_tokens")
            or getattr(given, f.name) != getattr(plain, f.name)
        }
        return dict(json.loads(json.dumps(shown)))

    @property
    def shown(self) -> dict[str, Any]:
        """The other settings that the rows depend on."""
        keys = ("samples", "seed", "keep_truncated", "keep_repetitive", "shard_rows")
        return {key: getattr(self, key) for key in keys}

    def seed_of(self, place: Place) -> int:
        """The seed of a response."""
        return random.Random(f"{self.seed}/{place[0]}/{place[1]}").getrandbits(62)

    def fault(self, result: Result) -> str | None:
        """Why a response is not for training; None if it is."""
        if result.finish_reason == "error":
            return "failed"
        if result.finish_reason == "length" and not self.keep_truncated:
            return "truncated"
        if not self.keep_repetitive and repeats(result.token_ids) > REPEATED:
            return "repetitive"
        return None


class Job(NamedTuple):
    """A response to make."""

    place: Place
    prompt: Prompt


def repeats(tokens: list[int]) -> float:
    """The share of the runs of `NGRAM` tokens that were there before."""
    runs = [tuple(tokens[at : at + NGRAM]) for at in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distill(
    prompts: Prompts,
    recipe: Recipe,
    folder: Path,
    engine: Callable[[], Engine],
    wait: bool = False,
) -> dict[str, Any]:
    """Write a row for each sample of each prompt to `folder`, but for those that are there.

    All prompts are checked before any of them runs.

    Args:
        engine: makes the engine, if a response is missing.
        wait: for another run that writes to the folder, instead of an error.

    Returns:
        the object of `idlm distill --json`: counts, and the speed of this call.

    Raises:
        InputError: a prompt is broken or leaves no room; the folder was made with other settings or
            prompts, or cannot be written.
    """
    idlm, began = prompts.encoding.idlm, perf_counter()
    recipe.params.check_vocabulary(idlm.vocab_size)
    number = sum(1 for _ in prompts)
    left_out = {"duplicates": prompts.duplicates, "bad_rows": prompts.bad}
    about = {
        "model": idlm.name,
        "fingerprint": fingerprint(idlm.model),
        "sampling": recipe.sampling,
    }
    made = {"tokens": 0, "tokens_per_second": 0.0, "tpf": 0.0}
    limit, total = prompts.encoding.length, number * recipe.samples
    with Shards(folder, about | recipe.shown | {"max_length": limit}, wait) as shards:
        jobs = _jobs(prompts, recipe)
        _skip(jobs, shards)
        resumed = shards.rows + shards.dropped.total()
        if resumed < total:
            made = _run(jobs, recipe, shards, engine(), about, limit, total)
        dropped = dict(sorted(shards.dropped.items()))
        rows = shards.rows
    return {
        "output": str(folder),
        "prompts": number,
        "rows": rows,
        "dropped": dropped,
        **left_out,
        "resumed": resumed,
        **made,
        "seconds": round(perf_counter() - began, 3),
    }


def _jobs(prompts: Prompts, recipe: Recipe) -> Iterator[Job]:
    for index, prompt in enumerate(prompts):
        for sample in range(recipe.samples):
            yield Job((index, sample), prompt)


def _skip(jobs: Iterator[Job], shards: Shards) -> None:
    """Pass over the jobs whose rows are there. Rows of more prompts than there are now stay."""
    for place, ids in shards.present():
        job = next(jobs, None)
        if job is not None and (job.place, job.prompt.ids) != (place, ids):
            raise InputError(
                f"{shards.folder} has sample {place[1]} of prompt {place[0]} where now is sample "
                f"{job.place[1]} of prompt {job.place[0]}, or another prompt; give the same "
                "prompts in the same order, or name another folder"
            )


def _run(
    jobs: Iterator[Job],
    recipe: Recipe,
    shards: Shards,
    engine: Engine,
    about: dict[str, Any],
    limit: int,
    total: int,
) -> dict[str, Any]:
    """Run the jobs and write their rows, which also say what is `about` all of them; returns
    tokens, their rate and TPF."""
    began, tokens, forwards = perf_counter(), 0, 0
    with _bar(engine, shards.rows + shards.dropped.total(), total) as show:
        for job, result in in_order(engine, jobs, recipe, limit, show):
            tokens, forwards = tokens + len(result.token_ids), forwards + result.forwards
            shards.append(_row(job, result) | about, recipe.fault(result))
    seconds = perf_counter() - began
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "tpf": round(tokens / max(forwards, 1), 3),
    }


def in_order(
    engine: Engine, jobs: Iterator[Job], recipe: Recipe, limit: int, show: Callable[[int], None]
) -> Iterator[tuple[Job, Result]]:
    """The result of each job, in the order of the jobs; the engine runs as many as it has slots.

    Args:
        limit: the most tokens of a prompt and its response.
        show: called after each step, with the number of results that it brought.
    """
    waiting: deque[tuple[Job, str]] = deque()
    done: dict[str, Result] = {}
    more = True
    while more or waiting:
        while more and len(waiting) < AHEAD * engine.config.max_num_seqs:
            job = next(jobs, None)
            more = job is not None
            if job is not None:
                waiting.append((job, _add(engine, job, recipe, limit)))
        ended = [update for update in engine.step() if update.result is not None]
        done |= {update.request_id: update.result for update in ended if update.result}
        show(len(ended))
        while waiting and waiting[0][1] in done:
            job, request = waiting.popleft()
            yield job, done.pop(request)


def _add(engine: Engine, job: Job, recipe: Recipe, limit: int) -> str:
    most = min(recipe.params.max_tokens, limit - len(job.prompt.ids))
    least, seed = min(recipe.params.min_tokens, most), recipe.seed_of(job.place)
    params = replace(recipe.params, max_tokens=most, min_tokens=least, seed=seed)
    return engine.add(job.prompt.ids, params, seed)


def _row(job: Job, result: Result) -> dict[str, Any]:
    """What training needs of a response, and what a reader wants to know."""
    shown = job.prompt.shown
    if "messages" in shown:
        answer = {"role": "assistant", "content": result.text}
        shown = shown | {"messages": [*shown["messages"], answer]}
    elif result.text:
        shown = shown | {"response_text": result.text}
    return {
        "index": job.place[0],
        "sample": job.place[1],
        **shown,
        "prompt": result.prompt_token_ids,
        "response": result.token_ids,
        "finish_reason": result.finish_reason,
        "seed": result.seed,
    }


@contextmanager
def _bar(engine: Engine, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with tokens/s and the time left, or a line at times if that is no
    terminal."""
    console, began = Console(stderr=True), perf_counter()
    lines = Lines("responses", total, done)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("responses", total=total, completed=done, rate=0.0)

        def show(ended: int) -> None:
            rate = engine.metrics.tokens / (perf_counter() - began)
            if not console.is_terminal:
                lines(ended, f", {rate:.0f} tokens/s")
            bar.update(task, advance=ended, rate=rate)

        yield show
