"""`idlm train CONFIG.yaml [--a.b=c] [--json]`: run a training config."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from idlm.extras import need

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Typer's settings: options that it does not know are overrides of the config."""


def train(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml", help="The run; configs/ has examples.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Train a base model, or convert a model to an I-DLM, as CONFIG.yaml says.

    Any key of the config can be set here: --optimizer.lr=0.001 --stages.0.steps=50 --resume=true
    """
    need("train", "idlm train")
    import idlm.nano.source  # noqa: F401  # registers its data
    from idlm.training.read_config import load_config
    from idlm.training.run import train as run

    result = run(load_config(config, context.args))
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun the first process prints for all
    typer.echo(
        json.dumps(result)
        if as_json
        else "\n".join(f"{key}: {value}" for key, value in result.items())
    )
