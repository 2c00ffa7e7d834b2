"""What several commands share: options, JSON output, and a progress bar on stderr."""

from __future__ import annotations

import atexit
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

import typer

from idlm.progress import Lines

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a GGUF file, a hub id, or a bundled model: nano, nano-base, nano-full.",
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="A gated LoRA for the model.", rich_help_panel="Model"),
]
Dtype = Annotated[
    Literal["auto", "float64", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Type of the weights; auto is the checkpoint's, float32 for a quantised GGUF file.",
        rich_help_panel="Model",
    ),
]
Device = Annotated[
    str, typer.Option(help="Where to run: cpu, cuda, cuda:1.", rich_help_panel="Model")
]
Weights = Annotated[
    Literal["auto", "float32", "bfloat16", "int8"],
    typer.Option(
        help="What linear layers hold on a CPU; auto is the checkpoint's, int8 quantises.",
        rich_help_panel="Model",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; measured if not given.", rich_help_panel="Decoding"),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="The context, prompt and output together; the model's if not given.",
        rich_help_panel="Model",
    ),
]
Stride = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="The most tokens a forward commits; 1 is plain AR.",
        rich_help_panel="Decoding",
    ),
]
BranchesOption = Annotated[
    Literal["all", "chain", "lookup", "planner"],
    typer.Option(
        help="Draft for every outcome, or for full acceptance only; look N - 1 drafts up in the "
        "request's own text; or whichever plan up to stride N is fastest here.",
        rich_help_panel="Decoding",
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat/--raw", help="Use the model's chat template, if it has one.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]


def keep_what_is_loaded() -> None:
    """Exempt all objects from garbage collection; call it once the models are loaded.

    Collections that visit them, every thousand steps or so, take a tenth of a small model's time.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries report as leaks what is not collected at the end


def print_json(value: Mapping[str, object]) -> None:
    """Print the object of `--json` on one line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, or a line at times if that is no terminal; call the function that this
    yields after each step."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(label, total)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
