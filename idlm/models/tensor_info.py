"""The position of a tensor in a file, for any file format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: bytes `start` to `stop`. `dtype` is the format's name of the type."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """The number of elements, the product of the shape."""
        return math.prod(self.shape)
