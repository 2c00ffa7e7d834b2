"""Progress where stderr is no terminal: a line at times, for logs."""

from __future__ import annotations

import sys
from time import perf_counter

EVERY = 30.0
"""Seconds between two lines."""


class Lines:
    """Lines on stderr such as "responses: 40 of 200", at most one every `EVERY` seconds."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done, self.shown = label, total, done, perf_counter()

    def __call__(self, count: int = 1, more: str = "") -> None:
        """Count `count` steps; `more` ends the line."""
        self.done += count
        if perf_counter() - self.shown > EVERY:
            self.shown = perf_counter()
            print(f"{self.label}: {self.done} of {self.total}{more}", file=sys.stderr, flush=True)
