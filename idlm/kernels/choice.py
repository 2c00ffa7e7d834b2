"""Which implementation of an operator is the fastest here: measured when an engine starts, on its
model's own shapes.

An operator of the C kernels is used where it is at least as fast as PyTorch's; where that is
depends on the processor, the shape and the number of rows. Matrix products are timed in recordings,
since steps are recorded: called from Python, an operator of ours costs 1.7 us more, and
`F.linear` does not. What was found for them is kept per machine, kernels, PyTorch and shapes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
RECORDED, PARAMETERS = 8, 2 << 20
"""Products of one recording: as many as hide its call, by the weights that they read."""
DRAFT_ROWS = 12
"""MASK rows, beside as many real ones, that the weights of MASK rows are timed at."""

Call = Callable[[], object]
Recorded = Callable[[Tensor], object]


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


def fastest(calls: Sequence[Call], rounds: int = ROUNDS, products: int = 1) -> list[float]:
    """Seconds of each of a call's `products`: the least of `rounds` or more calls, in turn, so that
    noise hits them alike."""
    best = [float("inf")] * len(calls)
    begun = perf_counter()
    for number in range(MOST_ROUNDS):
        if number > rounds and perf_counter() - begun > ENOUGH_SECONDS:
            break  # the first round, which brings caches and threads up, is one more
        for index, call in enumerate(calls):
            started = perf_counter()
            call()
            best[index] = min(best[index], (perf_counter() - started) / products)
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
            layer.choose(_bits(timings))
        log.info("%s", _line(f"linear {name}", timings))
    if found != known:
        _write(place, found)


def _by_shape(linears: Linears) -> dict[tuple[int, int], list[Layer]]:
    shapes: dict[tuple[int, int], list[Layer]] = {}
    for layer in linears.layers:
        shapes.setdefault(layer.shape, []).append(layer)
    return shapes


def _time(layers: Sequence[Layer], until: float) -> list[Timing]:
    """Both candidates by rows; the layers take turns, so that large ones come from memory."""
    timings: list[Timing] = []
    for layer in layers:
        layer.choose(0)  # so that PyTorch's product has its weight
    turns = [_recordings(layers, choice) for choice in (ALWAYS, 0)]
    for rows in ROWS:
        if timings and perf_counter() > until:
            break
        x = noise(rows, layers[0].shape[0])
        calls = [partial(_call, turn, x) for turn in turns]
        timings.append(Timing(rows, *fastest(calls, products=_products(layers[0]))))
    return timings


def _call(turn: Iterator[Recorded], x: Tensor) -> None:
    next(turn)(x)


def _products(layer: Layer) -> int:
    """Products of one recording."""
    inner, out = layer.shape
    return min(RECORDED, max(1, PARAMETERS // (inner * out)))


def _recordings(layers: Sequence[Layer], choice: int) -> Iterator[Recorded]:
    """Endless recordings, which together have the products by all layers."""
    inner, number = layers[0].shape[0], _products(layers[0])
    turn = cycle(
        [partial(replace(layer, choice=choice).multiply, adapter=None) for layer in layers]
    )
    made = [
        recorded([next(turn) for _ in range(number)], inner)
        for _ in range(-(-len(layers) // number))
    ]
    return cycle(made)


def recorded(products: Sequence[Callable[[Tensor], Tensor]], inner: int) -> Recorded:
    """All products of the same rows [T, inner], as a step runs them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            lambda x: tuple(one(x) for one in products), noise(2, inner), check_trace=False
        )

    def call(x: Tensor) -> object:
        with torch.jit.optimized_execution(False):
            return traced(x)

    return call


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
            parts.append(
                f"{one.rows}+ rows {winner} {1e3 * best:.3f} ms ({loser} {1e3 * other:.3f})"
            )
        before = one.wins
    return f"{name}: {', '.join(parts)}"


@torch.inference_mode()
def drafts_pay(linears: Linears, ranks: Mapping[int, int]) -> bool:
    """Whether MASK rows are faster with int8 weights of their own than with the model's weights
    and the adapter beside them.

    Args:
        ranks: by id of a layer's weight, the ranks of all its adapters together.
    """
    own = beside = 0.0
    seen: dict[object, tuple[float, float]] = {}
    for layer in linears.layers:
        key = (
            tuple(layer.widths),
            layer.shape,
            tuple(ranks.get(id(weight), 0) for weight in layer.group),
        )
        if key not in seen:
            seen[key] = _time_drafts(layer, key[2])
        own, beside = own + seen[key][0], beside + seen[key][1]
    better = "int8 weights of their own" if own < beside else "the model's weights and the adapter"
    figures = (DRAFT_ROWS, DRAFT_ROWS, 1e3 * own, 1e3 * beside)
    how = "%d of them beside %d real rows take %.2f ms a step by int8, %.2f by the model's weights"
    log.info(f"MASK rows: {better}; {how}", *figures)
    return own < beside


def _time_drafts(layer: Layer, ranks: Sequence[int]) -> tuple[float, float]:
    """Seconds of both; `ranks` are those of the adapters of each of the layer's parts."""
    inner, _ = layer.shape
    x, adapter = noise(2 * DRAFT_ROWS, inner), torch.zeros(DRAFT_ROWS, dtype=torch.int64)
    trial = replace(layer, drafts=stacked([layer.panels.matrix()], draft_format()))
    low = [
        (noise(rank, inner), noise(out, rank))
        for out, rank in zip(layer.widths, ranks, strict=True)
    ]

    def beside() -> None:
        parts = layer.multiply(x, None).split(layer.widths, dim=1)
        for part, (down, up) in zip(parts, low, strict=True):
            if len(down):
                part[DRAFT_ROWS:].add_(F.linear(F.linear(x[DRAFT_ROWS:], down), up))

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
    facts = [shapes, ROWS, RECORDED, PARAMETERS, *native.facts(), *machine]
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
        return {
            name: [Timing(int(rows), float(a), float(b)) for rows, a, b in one]
            for name, one in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(place: Path, found: Mapping[str, Sequence[Timing]]) -> None:
    """Best effort: without a place to write, the next start measures again."""
    content = {
        name: [(one.rows, one.ours, one.torch) for one in timings]
        for name, timings in found.items()
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(content))
        draft.replace(place)
    except OSError:
        return
