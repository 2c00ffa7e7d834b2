"""Which implementation of an operator is the fastest here: measured when an engine starts, on its
model's own shapes.

An operator of the C kernels is used where it is at least as fast as PyTorch's; where that is
depends on the processor, the shape and the number of rows. What was found for matrix products is
kept per machine, kernels, PyTorch and shapes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.kernels import native
from idlm.kernels.linears import ALWAYS, Layer, Linears
from idlm.kernels.panels import draft_format, stacked

log = logging.getLogger("idlm")

ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
"""Row counts that products are timed at; each stands for those down to the one before it."""
SECONDS = 2.0
"""Timing of products stops after about this long; what is left takes what fewer rows had."""
ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 5, 50, 0.01
"""Times each candidate is run, in turn: short ones more often, until all took ENOUGH_SECONDS. The
least counts, since noise only ever adds."""
NOISE = 0.03
"""How far two timings of the same thing differ. Ours may be behind by as much: what it makes of a
row does not depend on the rows beside it."""
DRAFT_ROWS = 12
"""MASK rows, beside as many real ones, that the weights of MASK rows are timed at."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of both candidates for so many rows."""

    rows: int
    ours: float
    torch: float

    @property
    def wins(self) -> bool:
        """Whether ours is used."""
        return self.ours <= (1 + NOISE) * self.torch


def noise(*shape: int) -> Tensor:
    """Something to time with; torch's own generator stays as it was, since others draw from it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fastest(calls: Sequence[Call], rounds: int = ROUNDS) -> list[float]:
    """Seconds of each call: the least of `rounds` or more, in turn, so that noise hits them alike."""
    best = [float("inf")] * len(calls)
    begun = perf_counter()
    for number in range(MOST_ROUNDS):
        if number > rounds and perf_counter() - begun > ENOUGH_SECONDS:
            break  # the first round, which brings caches and threads up, is one more
        for index, call in enumerate(calls):
            started = perf_counter()
            call()
            best[index] = min(best[index], perf_counter() - started)
    return best


@torch.inference_mode()
def choose_linears(linears: Linears, seconds: float = SECONDS) -> None:
    """Set every layer's `choice`, and log one line for each shape.

    Only float32 weights have an alternative; in other formats the kernels are all there is.
    """
    if linears.format != "float32":
        return
    shapes = _by_shape(linears)
    place = _file("linears", sorted(shapes))
    known, until = _read(place), perf_counter() + seconds
    found: dict[str, list[Timing]] = {}
    for shape, layers in shapes.items():
        name = f"{shape[0]}x{shape[1]}"
        timings = found[name] = known.get(name) or _time(layers, until)
        for layer in layers:
            layer.choice = _bits(timings)
        log.info("%s", _line(f"linear {name}", timings))
    if found != known:
        _write(place, found)


def _by_shape(linears: Linears) -> dict[tuple[int, int], list[Layer]]:
    shapes: dict[tuple[int, int], list[Layer]] = {}
    for layer in linears.layers.values():
        shapes.setdefault(layer.shape, []).append(layer)
    return shapes


def _time(layers: Sequence[Layer], until: float) -> list[Timing]:
    """Both candidates by rows; the layers take turns, so that large ones come from memory."""
    timings: list[Timing] = []
    turn = cycle(layers)
    for rows in ROWS:
        if timings and perf_counter() > until:
            break
        x = noise(rows, layers[0].shape[0])
        calls = (partial(_ours, turn, x), partial(_torch, turn, x))
        timings.append(Timing(rows, *fastest(calls)))
    return timings


def _ours(turn: Iterator[Layer], x: Tensor) -> None:
    layer = next(turn)
    weights, scales, out, _ = layer.panels
    torch.ops.idlm.linear(x, layer.weight, weights, scales, out, ALWAYS)


def _torch(turn: Iterator[Layer], x: Tensor) -> None:
    F.linear(x, next(turn).weight)


def _bits(timings: Sequence[Timing]) -> int:
    """The choice that csrc/ops.c takes; the last row count measured stands for all beyond."""
    choice = 0
    for bit in range(63):
        one = next((timing for timing in timings if timing.rows >= 1 << bit), timings[-1])
        choice |= one.wins << bit
    return ALWAYS if choice == (1 << 63) - 1 else choice


def _line(name: str, timings: Sequence[Timing]) -> str:
    """For the log: ranges of rows with the winner, and the times where each range begins."""
    target = native.instruction_set()
    ours = f"C/{target.name}" if target is not None else "C"
    parts: list[str] = []
    before = None
    for one in timings:
        if one.wins != before:
            pair = (ours, one.ours, "torch", one.torch)
            winner, best, loser, other = pair if one.wins else (*pair[2:], *pair[:2])
            parts.append(f"{one.rows}+ rows {winner} {1e3 * best:.3f} ms ({loser} {1e3 * other:.3f})")
        before = one.wins
    return f"{name}: {', '.join(parts)}"


@torch.inference_mode()
def drafts_pay(linears: Linears, merged: Iterable[tuple[Tensor, Sequence[Tensor]]], ranks: Mapping[int, int]) -> bool:
    """Whether MASK rows are faster with int8 weights of their own than with the model's weights
    and the adapter beside them.

    Args:
        merged: as `Linears.add_drafts` takes them.
        ranks: by id of a layer's weight, the ranks of all its adapters together.
    """
    own = beside = 0.0
    seen: dict[tuple[int, int], tuple[float, float]] = {}
    for weight, adapters in merged:
        layer = linears.layers[id(weight)]
        if layer.shape not in seen:
            seen[layer.shape] = _time_drafts(layer, adapters, ranks.get(id(weight), 0))
        own, beside = own + seen[layer.shape][0], beside + seen[layer.shape][1]
    better = "int8 weights of their own" if own < beside else "the model's weights and the adapter"
    figures = (DRAFT_ROWS, DRAFT_ROWS, 1e3 * own, 1e3 * beside)
    how = "%d of them beside %d real rows take %.2f ms a step by int8, %.2f by the model's weights"
    log.info(f"MASK rows: {better}; {how}", *figures)
    return own < beside


def _time_drafts(layer: Layer, adapters: Sequence[Tensor], rank: int) -> tuple[float, float]:
    inner, out = layer.shape
    x, adapter = noise(2 * DRAFT_ROWS, inner), torch.zeros(DRAFT_ROWS, dtype=torch.int64)
    trial = Layer(layer.weight, layer.panels, stacked(adapters[:1], draft_format()), layer.choice)
    down, up = noise(rank, inner), noise(out, rank)

    def beside() -> None:
        y = layer.multiply(x, None)
        if rank:
            y[DRAFT_ROWS:].add_(F.linear(F.linear(x[DRAFT_ROWS:], down), up))

    own, other = fastest((lambda: trial.multiply(x, adapter), beside))
    return own, other


def faster(name: str, ours: Call, theirs: Call) -> bool:
    """Whether our operator is used and not PyTorch's; the log says why."""
    found = Timing(1, *fastest((ours, theirs)))
    winner = "C" if found.wins else "torch"
    log.info("%s: %s; C %.3f ms, torch %.3f", name, winner, 1e3 * found.ours, 1e3 * found.torch)
    return found.wins


def _file(name: str, shapes: object) -> Path:
    """Where what was found lies: one file for each combination of what it depends on."""
    machine = (platform.node(), processor_name(), torch.get_num_threads())
    facts = [shapes, ROWS, *native.facts(), *machine]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
    return native.user_cache("choices") / f"{name}-{key}.json"


def processor_name() -> str:
    """The processor's model, as /proc/cpuinfo has it; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = next((line for line in lines if line.startswith("model name")), "")
    return found.partition(":")[2].strip() or platform.processor()


def _read(place: Path) -> dict[str, list[Timing]]:
    """By shape; nothing where nothing was measured yet, or the file holds something else."""
    try:
        found = json.loads(place.read_text())
        return {name: [Timing(int(rows), float(a), float(b)) for rows, a, b in one] for name, one in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(place: Path, found: Mapping[str, Sequence[Timing]]) -> None:
    """Best effort: without a place to write, the next start measures again."""
    content = {name: [(one.rows, one.ours, one.torch) for one in timings] for name, timings in found.items()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(content))
        draft.replace(place)
    except OSError:
        return
