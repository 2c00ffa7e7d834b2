"""The ranges of the numbers in a training config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from idlm.config import MOST_THREADS
from idlm.decoding.window import MAX_STRIDE
from idlm.errors import InputError


class Range(NamedTuple):
    """From `low`, which may be excluded, to `high`, which is excluded if it is infinite."""

    low: float
    high: float = math.inf
    without_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value is in the range; NaN and infinity are in none."""
        above = value > self.low if self.without_low else value >= self.low
        return above and value <= self.high and value < math.inf

    def __str__(self) -> str:
        if self == POSITIVE:
            return "a positive number"
        low = f"above {self.low:g}" if self.without_low else f"at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"


COUNT, NOT_NEGATIVE, POSITIVE = Range(1), Range(0), Range(0, without_low=True)
SEED = Range(0, 2**63 - 1)
RANGES = {
    "stages.*.steps": COUNT,
    "stages.*.epochs": POSITIVE,
    "stages.*.tokens": COUNT,
    "stages.*.block_size": Range(1, MAX_STRIDE - 1),
    "seed": SEED,
    "threads": Range(1, MOST_THREADS),
    "batch_size": Range(1, 2**20),
    "phases": COUNT,
    "batch_tokens": COUNT,
    "data.path.*.weight": POSITIVE,
    "accumulation": Range(1, 2**20),
    "log_steps": COUNT,
    "eval_steps": COUNT,
    "save_steps": COUNT,
    "eval_decode": NOT_NEGATIVE,
    "keep_checkpoints": COUNT,
    "model.max_model_len": Range(2),
    "lora.rank": Range(1, 2**16),
    "lora.alpha": POSITIVE,
    "lora.entry": NOT_NEGATIVE,
    "diffusion.random": Range(0, 1),
    "diffusion.fill": NOT_NEGATIVE,
    "head.size": COUNT,
    "head.top": COUNT,
    "data.examples": COUNT,
    "data.held_out": COUNT,
    "data.seed": SEED,
    "data.temperature": NOT_NEGATIVE,
    "data.max_tokens": COUNT,
    "data.max_length": Range(2),
    "optimizer.lr": POSITIVE,
    "optimizer.betas.*": Range(0, 0.99999),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.decay": Range(0, 1, without_low=True),
    "optimizer.warmup": NOT_NEGATIVE,
    "optimizer.grad_clip": NOT_NEGATIVE,
}
"""By key; * is any number of an item."""


def check_ranges(tree: dict[str, Any]) -> None:
    """Check the numbers of the plain values of a config.

    Raises:
        InputError: a number is outside its range; the message has its key and value.
    """
    for key, value in _numbers(tree, ""):
        name = ".".join("*" if part.isdecimal() else part for part in key.split("."))
        if name in RANGES and not RANGES[name].holds(value):
            raise InputError(f"{key} is {value}; it must be {RANGES[name]}")


def _numbers(node: Any, key: str) -> Iterator[tuple[str, float]]:
    """The numbers in a tree by their keys, items of lists by their positions."""
    items: Iterable[tuple[object, Any]] = ()
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in items:
        yield from _numbers(child, f"{key}.{name}" if key else str(name))
    if isinstance(node, int | float) and not isinstance(node, bool):
        yield key, node
