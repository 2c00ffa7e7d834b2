"""`idlm export RUN -o DIR`: a run's result as one Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from idlm.cli import common
from idlm.errors import InputError
from idlm.extras import need


def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The output_dir of a run, or a checkpoint in it."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A new or empty folder.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Round an adapter's weights to this type: half the size."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload it too: owner/name. The token is HF_TOKEN."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    as_json: common.Json = False,
) -> None:
    """Write the adapter or the model of a run to one Hugging Face folder, with a model card.

    Of a run its end is taken, or the newest checkpoint if it has not ended. An earlier export in
    DIR is replaced.
    """
    need("train", "idlm export")
    import torch

    from idlm.training import export as exporting

    if private and push_to_hub is None:
        raise InputError("--private makes a private repository; give --push-to-hub its name")
    rounded = None if dtype is None else getattr(torch, dtype)
    taken = exporting.export(source, output, push_to_hub, rounded)
    report = {"output": str(output), "from": str(taken)}
    if push_to_hub is not None:
        report["address"] = exporting.push(output, push_to_hub, private)
    if as_json:
        common.print_json(report)
    else:
        typer.echo("\n".join(f"{key}: {value}" for key, value in report.items()))
