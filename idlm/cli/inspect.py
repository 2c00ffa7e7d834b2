"""`idlm inspect PATH`: what is in a checkpoint, and whether it can decode with ISD."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from idlm.cli import common


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A model or adapter: a folder, a GGUF file, a hub id, or a bundled name.",
        ),
    ],
    adapter: common.Adapter = None,
    max_model_len: common.MaxModelLen = None,
    weights: Annotated[
        Literal["bfloat16", "int8"] | None,
        typer.Option(help="Load the model, and say what weights held so do to its logits (CPU)."),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Say what is in a checkpoint, and whether it can decode with ISD; without --weights none are
    read."""
    from idlm.models.checkpoint import inspect_checkpoint

    report = asdict(inspect_checkpoint(path, adapter, max_model_len))
    if weights is not None:
        report |= {"weights": weights} | _accuracy(path, weights, max_model_len)
    if as_json:
        common.print_json(report)
        return
    for key, value in report.items():
        if value is not None:
            typer.echo(f"{key.replace('_', ' '):23} {_shown(key, value)}")


def _accuracy(path: str, weights: str, max_model_len: int | None) -> dict[str, float]:
    """The format against float32 on a built-in text; see `WeightsAccuracy`."""
    from idlm.engine.weights_accuracy import weights_accuracy
    from idlm.models.loading import load

    with common.progress("loading and comparing", 2) as advance:
        model = load(path, dtype="float32", max_model_len=max_model_len)
        advance()
        return asdict(weights_accuracy(model, weights))


def _shown(key: str, value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if key in ("parameters", "active_parameters", "tokens") else str(value)
