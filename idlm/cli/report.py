"""`idlm report RUN... [-o report.html]`: the curves of training runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from idlm.errors import InputError
from idlm.extras import need


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="The output_dir of one or several runs."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
) -> None:
    """Draw the curves of training runs, with their configs and environments.

    The page is one HTML file that loads nothing from elsewhere; curves of several runs lie over
    each other.
    """
    need("train", "idlm report")
    need("report", "idlm report")
    from idlm.training.report import report as page

    text = page(runs)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {str(output)!r} ({error.strerror}); give another --output"
        ) from None
    typer.echo(str(output))
