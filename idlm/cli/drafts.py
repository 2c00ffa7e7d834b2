"""The options for drafts, and what becomes of them for a model that was never trained to draft.

Such a model decodes AR, and a line says so, unless the command line asks for drafts.
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
        help="The most tokens a forward commits; 1 is plain AR.",
        rich_help_panel="Decoding",
        show_default=f"{STRIDE}; 1 for a model that was not trained to draft",
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


@dataclass(frozen=True)
class Drafts:
    """What the command line says about drafts; None where it says nothing."""

    stride: int | None
    branches: str | None

    @property
    def asked(self) -> str | None:
        """The option that asks for drafts."""
        if self.stride == 1:
            return None
        if self.branches in ("all", "chain"):
            return f"--branches {self.branches}"
        return None if self.stride is None else f"--stride {self.stride}"

    def config(self, **options: Any) -> EngineConfig:
        """The options of an engine, before it is known whether the model can draft."""
        stride = STRIDE if self.stride is None else self.stride
        return EngineConfig(stride, self.branches or BRANCHES, **options)


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
        the config, with stride 1 for a model that was not trained to draft, and whether the command
        should say so.

    Raises:
        InputError: an argument cannot be used, or asks for drafts of a model that has none.
    """
    from idlm.engine.preflight import Wanted, preflight

    found = preflight(Wanted(model, adapters, dtype, device), config)
    if found.trained or config.stride == 1:
        return config, False
    if drafts.asked is None:
        return replace(config, stride=1, branches=BRANCHES), True
    if not found.possible:
        refuse(model, drafts.asked, "--stride 1")
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


def say_ar(model: str) -> None:
    """Say that the model decodes AR, in one line."""
    typer.echo(
        f"AR: {model} was not trained to draft, so a forward commits one token; "
        "'idlm train' converts it (docs/converting.md), --adapter names a gated LoRA",
        err=True,
    )
