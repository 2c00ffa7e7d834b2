"""`idlm eval MODEL SUITE...`: benchmarks of quality on our engine, or on any server."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from idlm.cli import common, drafts
from idlm.errors import InputError
from idlm.extras import need
from idlm.progress import Lines

if TYPE_CHECKING:
    from idlm.evaluation.suites.suite import Suite
    from idlm.evaluation.tasks import Way

FAST_ITEMS = 200
PAPER = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95, "max_gen_toks": 32768}
GREEDY = {"do_sample": False, "temperature": 0.0}
THOUGHTS = ("<think>", "</think>")


def _option(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Evaluation", **settings)


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a GGUF file, a hub id, a bundled model, or a server's name of it.",
            show_default=False,
        ),
    ] = None,
    suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="SUITE...", help="What to run; see --list.", show_default=False),
    ] = None,
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Results; a run there goes on."),
    ] = Path("eval"),
    show_list: Annotated[
        bool, _option("Show the suites, their sources and their figures.", "--list")
    ] = False,
    data: Annotated[
        Path | None, _option("Local files of the suites; the hub if not given.", metavar="DIR")
    ] = None,
    preset: Annotated[
        Literal["paper", "fast"] | None,
        _option(
            "paper: thinking, T=1, top-k 50, top-p 0.95, 32k tokens; fast: greedy, 200 items.",
            show_default="all items, as each suite asks them",
        ),
    ] = None,
    limit: Annotated[int | None, _option("The most items of a suite.", min=1)] = None,
    generative: Annotated[
        bool,
        _option("Ask for answers in words where a suite compares likelihoods.", "--generative"),
    ] = False,
    thinking: Annotated[
        bool | None,
        _option(
            "Let the model think, and cut the thoughts before grading.",
            "--thinking/--no-thinking",
            show_default="as the preset says",
        ),
    ] = None,
    run_code: Annotated[
        bool,
        _option(
            "Run code that the model writes, without network and with limits.",
            "--run-code",
            "--confirm-run-unsafe-code",
        ),
    ] = False,
    temperature: Annotated[
        float | None, _option("0 is greedy.", min=0.0, show_default="the suite's")
    ] = None,
    max_tokens: Annotated[
        int | None, _option("The most tokens of an answer.", min=1, show_default="the suite's")
    ] = None,
    seed: Annotated[int, _option("Of the noise; each answer has a seed of its own.")] = 0,
    url: Annotated[
        str | None,
        typer.Option(help="Ask this OpenAI-compatible API, as .../v1.", rich_help_panel="Server"),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests at once.", min=1, rich_help_panel="Server")
    ] = 8,
    adapter: common.Adapter = None,
    stride: drafts.Stride = None,
    branches: drafts.Branches = None,
    draft_source: drafts.Source = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Kernels whose results do not depend on the batch; slower.",
            rich_help_panel="Decoding",
        ),
    ] = False,
    max_num_seqs: Annotated[
        int, typer.Option(help="Answers that run at once.", min=1, rich_help_panel="Decoding")
    ] = 64,
    chat: common.Chat = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    weights: common.Weights = "auto",
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Run benchmarks of quality; killed at any point, the same command goes on.

    Suites run through lm-evaluation-harness, on our engine or on any OpenAI-compatible server.
    """
    need("eval", "idlm eval")
    quiet()
    from idlm.evaluation import runner
    from idlm.evaluation.suites import named

    if show_list:
        return _list(as_json)
    if not model or not suites:
        raise InputError("give a model and suites, as in 'idlm eval nano gsm8k'; see --list")
    chosen = named(suites)
    limit = FAST_ITEMS if limit is None and preset == "fast" else limit
    thinking = preset == "paper" if thinking is None and preset else thinking
    asked = {
        "preset": preset, "chat": chat, "generative": generative or preset == "paper",
        "limit": limit, "generation": _generation(preset, temperature, max_tokens),
        "thinking": thinking, "seed": seed, "adapter": adapter, "dtype": dtype,
        "weights": weights, "max_model_len": max_model_len, "deterministic": deterministic,
    }  # fmt: skip
    way = _way(asked, data, run_code, scores=url is None or not chat)
    runner.check(chosen, way)  # before the model is loaded, which can take minutes
    if url is not None:
        built, decoding = _server(url, model, asked, concurrency), {"url": url}
    else:
        options = {"max_num_seqs": max_num_seqs, "threads": threads}
        wanted = drafts.Drafts(stride, branches, draft_source)
        built, decoding = _engine(model, asked, device, wanted, options)
        way = replace(way, chat=chat and built.idlm.encoder.has_template)
    settings = {"model": model, **asked, "chat": way.chat, **decoding}
    with progress() as show:
        report = runner.run(built, chosen, way, output, settings, show)
    if as_json:
        return common.print_json(report)
    _show(report, output)


def quiet() -> None:
    """Silence the harness's bars and remarks; call it before the harness is imported."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lm_eval|datasets|sklearn|scipy")


def _generation(
    preset: str | None, temperature: float | None, max_tokens: int | None
) -> dict[str, Any]:
    """What replaces the generation options of the suites."""
    options = {"paper": PAPER, "fast": GREEDY, None: {}}[preset]
    if temperature is not None:
        options = {**options, "do_sample": temperature > 0, "temperature": temperature}
    return dict(options) if max_tokens is None else {**options, "max_gen_toks": max_tokens}


def _way(asked: dict[str, Any], data: Path | None, run_code: bool, scores: bool) -> Way:
    from idlm.evaluation.tasks import Way

    shared = (asked["chat"], asked["generative"], asked["limit"], asked["generation"])
    return Way(data, *shared, run_code, scores)


def _engine(
    model: str,
    asked: dict[str, Any],
    device: str,
    wanted: drafts.Drafts,
    options: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The model in our engine, and how it decodes."""
    from idlm.engine.llm import LLM
    from idlm.evaluation.engine_model import EngineModel
    from idlm.models.loading import load

    names = ("deterministic", "weights", "max_model_len")
    fixed = {name: asked[name] for name in names}
    config = wanted.config(logprobs_mode="raw_logprobs", **fixed, **options)
    adapter = asked["adapter"]
    folders = [] if adapter is None else [adapter]
    config, ordinary = drafts.checked(wanted, config, model, folders, asked["dtype"], device)
    idlm = load(model, adapter, asked["dtype"], device, asked["max_model_len"])
    llm = LLM(idlm, config=config)
    if ordinary:
        drafts.say_lookup(model)
    built = EngineModel(
        llm,
        enable_thinking=asked["thinking"],
        think_end_token=THOUGHTS[1] if asked["thinking"] else None,
    )
    return built, {"stride": config.stride, "branches": config.branches}


def _server(url: str, model: str, asked: dict[str, Any], concurrency: int) -> Any:
    from idlm.evaluation.url_model import UrlModel

    thoughts = THOUGHTS if asked["thinking"] else None
    return UrlModel(url, model, asked["chat"], concurrency, asked["thinking"], thoughts)


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on stderr, one for each suite; where that is no terminal, a line at times."""
    from rich.console import Console
    from rich.progress import BarColumn as Bar
    from rich.progress import MofNCompleteColumn as Count
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), Bar(), Count(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def show(label: str, total: int) -> Callable[[], None]:
            task = bar.add_task(label, total=total)
            if console.is_terminal:
                return lambda: bar.advance(task)
            return Lines(label, total)

        yield show


def _list(as_json: bool) -> None:
    """Show all suites: by name, where items come from, and the figures."""
    from idlm.evaluation.suites import SUITES

    if as_json:
        return common.print_json({name: asdict(_Shown.of(one)) for name, one in SUITES.items()})
    from rich.console import Console
    from rich.table import Table

    table = Table("suite", "title", "items from", "files in", "figures", "asked by")
    for name, suite in SUITES.items():
        shown = _Shown.of(suite)
        table.add_row(
            name, shown.title, shown.source, shown.folder, "\n".join(shown.metrics), shown.by
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@dataclass(frozen=True)
class _Shown:
    title: str
    source: str
    folder: str
    metrics: list[str]
    by: str

    @classmethod
    def of(cls, suite: Suite) -> _Shown:
        by = "idlm" if suite.harness is None else f"harness: {suite.harness.task}"
        by += ", or idlm" if suite.harness and suite.own else ""
        by += " (--run-code)" if suite.own and suite.own.runs_code else ""
        return cls(suite.title, suite.source, suite.folder, suite.metrics, by)


def _show(report: dict[str, Any], output: Path) -> None:
    """Print a line for each figure."""
    for name, suite in report["suites"].items():
        if "metrics" not in suite:
            typer.echo(f"{name}: {suite['answers']} answers, {suite['characters']} characters")
            continue
        for metric, one in suite["metrics"].items():
            error = "" if one["stderr"] is None else f" +- {100 * one['stderr']:.1f}"
            label = f"{name} {metric.removesuffix(',none')}"
            typer.echo(f"{label}: {100 * one['value']:.1f}{error} (n = {one['n']})")
    typer.echo(f"results: {output / 'results.json'}", err=True)
