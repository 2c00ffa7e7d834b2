"""The number of threads of an engine on a CPU: 1, 2 or 4, by measurement when it starts."""

from __future__ import annotations

import logging
import os
from functools import partial

import torch
import torch.nn.functional as F

from idlm.kernels.choice import fastest
from idlm.kernels.linears import Linears
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

COUNTS = (1, 2, 4)
WORTH = 0.9
"""More threads are used if a pass with them takes at most this share of the time."""
ROUNDS = 5


def free_cores() -> int:
    """The cores that this process may use, but no more than PyTorch's number of threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, torch.get_num_threads())


def choose_threads(idlm: Idlm, linears: Linears | None, wanted: int | None) -> None:
    """Set PyTorch's number of threads, which the C kernels use too. The log gives the reason.

    Args:
        wanted: the number. None: measure a pass of a single row through all linear layers with
            each of `COUNTS`, up to the free cores, and use more threads only if they pay.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return
    counts = [count for count in COUNTS if count <= free_cores()]
    if len(counts) < 2:
        return
    seconds = _time(idlm, linears, counts)
    best = counts[0]
    for count in counts[1:]:
        if seconds[count] <= WORTH * seconds[best]:
            best = count
    figures = ", ".join(f"{count}: {1e3 * seconds[count]:.2f} ms" for count in counts)
    log.info("threads: %d (one row through all linear layers, by threads: %s)", best, figures)
    torch.set_num_threads(best)


@torch.inference_mode()
def _time(idlm: Idlm, linears: Linears | None, counts: list[int]) -> dict[int, float]:
    """The seconds of a pass of a row through all linear layers, by number of threads."""
    weights = [weight for group in idlm.linear_groups() for weight in group]
    rows = {size: torch.randn(1, size, dtype=idlm.dtype) for size in {w.shape[1] for w in weights}}

    def through(count: int) -> None:
        torch.set_num_threads(count)
        if linears is None:
            for weight in weights:
                F.linear(rows[weight.shape[1]], weight)
            return
        for layer in linears.layers:
            layer.multiply(rows[layer.shape[0]], None)

    before = torch.get_num_threads()
    try:
        found = fastest([partial(through, count) for count in counts], ROUNDS)
    finally:
        torch.set_num_threads(before)
    return dict(zip(counts, found, strict=True))
