"""The command line `idlm`: one file for each command; a user's mistake is one line on stderr."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from idlm import __version__
from idlm.cli import (
    accept,
    bench,
    chat,
    compare,
    demo,
    distill,
    eval,
    export,
    generate,
    inspect,
    lm_eval,
    page,
    report,
    serve,
    train,
    verify,
)
from idlm.cli.errors import OneLineErrors

# before transformers and tqdm are imported: no warnings around the one line, bars on terminals only
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"idlm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Decode several tokens per forward pass, with unchanged output."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("accept")(accept.accept)
app.command("bench")(bench.bench)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.command("distill")(distill.distill)
app.command("eval")(eval.evaluate)
app.command("explore")(page.explore)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("lm-eval", context_settings=lm_eval.CONTEXT)(lm_eval.lm_eval)
app.command("report")(report.report)
app.command("serve")(serve.serve)
app.command("ui")(page.ui)
app.command("train", context_settings=train.CONTEXT)(train.train)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
