"""Where one tensor lies on disk, whatever the format of the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: its type by the name its format has for it, its shape, and its bytes'
    place in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
