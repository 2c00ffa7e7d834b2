"""Which checkpoints of a run stay, and the links `best` and `last` that name two of them.

A link is replaced by a rename, after its checkpoint is complete and before others are removed. So
it always names a whole checkpoint; after a kill, the next run sets it right.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlm.training.checkpoint import checkpoint_of, checkpoints

BEST, LAST = "best", "last"


def score(measured: Mapping[str, Any]) -> float:
    """How good a held-out measurement is, larger is better: the TPF along the texts; for AR the
    negative cross entropy."""
    return float(measured["tpf"] if "tpf" in measured else -measured["held_out_ce"])


def keep(folder: Path, best: int | None, newest: int) -> None:
    """Link the best and the last checkpoint, and remove all others but the newest ones.

    Args:
        best: the step of the best one; None before the first measurement.
        newest: how many stay beside it.
    """
    found = checkpoints(folder)
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        _link(folder / BEST, checkpoint_of(folder, best))
    _link(folder / LAST, found[-1])
    for old in found[:-newest]:
        if best is None or old != checkpoint_of(folder, best):
            shutil.rmtree(old, ignore_errors=True)


def _link(link: Path, checkpoint: Path) -> None:
    staging = link.with_name(f".{link.name}")
    staging.unlink(missing_ok=True)
    staging.symlink_to(checkpoint.name)
    os.replace(staging, link)
