"""Percentiles, and the files of results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "msgspec")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def report(figures: dict[str, Any], out: Path | None) -> None:
    """Print the figures with their environment, and write them to `out`."""
    from idlm.environment import environment  # it brings torch, which took no part so far

    versions = {name: version(name) for name in PACKAGES}
    text = json.dumps(figures | {"environment": environment() | versions}, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
