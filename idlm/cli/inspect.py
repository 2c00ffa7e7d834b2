"""`idlm inspect PATH`: what is in a checkpoint, and whether it can decode with ISD."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from idlm.cli import common


def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A model or adapter: a folder, a GGUF file, a hub id, or a bundled name."),
    ],
    adapter: common.Adapter = None,
    as_json: common.Json = False,
) -> None:
    """Say what is in a checkpoint, and whether it can decode with ISD; no weights are read."""
    from idlm.models.checkpoint import inspect_checkpoint

    found = asdict(inspect_checkpoint(path, adapter))
    if as_json:
        common.print_json(found)
        return
    for key, value in found.items():
        if value is not None:
            shown = f"{value:,}" if key == "parameters" else ", ".join(value) if isinstance(value, tuple) else value
            typer.echo(f"{key.replace('_', ' '):18} {shown}")
