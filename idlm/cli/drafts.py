"""The options for drafts, and what becomes of them for a model that was never trained to draft.

Such a model has lookup drafts alone, and a line says so, unless the command line asks for others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from idlm.config import EngineConfig
from idlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

STRIDE, BRANCHES = 4, "planner"

Stride = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="The most tokens a forward commits with drafts of MASK rows; 1 is plain AR.",
        rich_help_panel="Decoding",
        show_default=f"{STRIDE}",
    ),
]
Branches = Annotated[
    Literal["all", "chain", "planner"] | None,
    typer.Option(
        help="Draft for every outcome, or for full acceptance only; "
        "or whichever plan up to stride N is fastest here.",
        rich_help_panel="Decoding",
        show_default=BRANCHES,
    ),
]


Source = Annotated[
    Literal["auto", "masks", "lookup"] | None,
    typer.Option(
        "--drafts",
        help="Where drafts come from: MASK rows; repeats in the request's own text, which needs "
        "no training; or whichever is better at a step.",
        rich_help_panel="Decoding",
        show_default="auto; lookup for a model that was not trained to draft",
    ),
]


@dataclass(frozen=True)
class Drafts:
    """What the command line says about drafts; None where it says nothing."""

    stride: int | None
    branches: str | None
    source: str | None

    @property
    def asked(self) -> str | None:
        """The option that asks for drafts of MASK rows."""
        if self.stride == 1 or self.source == "lookup":
            return None
        if self.source == "masks":
            return "--drafts masks"
        if self.branches in ("all", "chain"):
            return f"--branches {self.branches}"
        return None if self.stride is None else f"--stride {self.stride}"

    def config(self, **options: Any) -> EngineConfig:
        """The options of an engine, before it is known whether the model can draft."""
        stride = STRIDE if self.stride is None else self.stride
        source = self.source or EngineConfig.drafts
        return EngineConfig(stride, self.branches or BRANCHES, source, **options)


def checked(
    drafts: Drafts,
    config: EngineConfig,
    model: str,
    adapters: Sequence[str | Path],
    dtype: str,
    device: str,
) -> tuple[EngineConfig, bool]:
    """Check all that can be checked before weights are read.

    Returns:
        the config, with lookup drafts alone for a model that was not trained to draft, and whether
        the command should say so.

    Raises:
        InputError: an argument cannot be used, or asks for drafts of a model that has none.
    """
    from idlm.engine.preflight import Wanted, preflight

    found = preflight(Wanted(model, adapters, dtype, device), config)
    if found.trained or config.stride == 1:
        return config, False
    if drafts.asked is None:
        return replace(config, drafts="lookup"), drafts.source is None
    if not found.possible:
        refuse(model, drafts.asked, "--drafts lookup, --stride 1")
    return config, False


def refuse(model: str, asked: str, instead: str) -> None:
    """Refuse an option that asks for drafts of a model that has none; `instead` is what fits.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"{asked}: model {model!r} has no MASK row to draft with; "
        f"give --adapter, convert the model with 'idlm train', or use {instead}"
    )


def say_lookup(model: str) -> None:
    """Say that the model has lookup drafts alone, in one line."""
    typer.echo(
        f"lookup drafts: {model} was not trained to draft, so drafts are repeats of a request's "
        "own text; 'idlm train' converts it (docs/converting.md), --adapter names a gated LoRA",
        err=True,
    )
