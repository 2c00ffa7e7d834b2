"""Measures, when an engine starts, which implementation of an operator is faster on this machine.

A C operator is used if it is at least as fast as PyTorch's. That depends on the processor, the
shape and the number of rows, so the shapes of the engine's model are timed. Matrix products are
timed inside recordings, because steps are recorded: a call of a C operator from Python costs 1.7 us
more than in a recording, a call of `F.linear` does not. The results are cached by machine, kernels,
PyTorch and shapes.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
"""Row counts at which products are timed. Each also decides for the counts between it and the one
before it."""
SECONDS = 2.0
"""Timing of products stops after about this time. The remaining row counts are decided as the
largest that was timed."""
ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 5, 50, 0.01
"""Rounds of timing; each round runs every candidate. Fast candidates get more, up to MOST_ROUNDS,
until ENOUGH_SECONDS have passed. The minimum counts, since noise only adds time."""
NOISE = 0.03
"""Relative difference of two timings of the same operator. The C operator may be slower by as much,
because its result for a row does not depend on the rows beside it."""
RECORDED, PARAMETERS = 8, 2 << 20
"""A recording for timing has up to RECORDED products, until they read about PARAMETERS weights: so
the cost of its call is hidden."""
DRAFT_ROWS = 12
"""The weights of MASK rows are timed with so many MASK rows and as many real rows."""

Call = Callable[[], object]
Recorded = Callable[[Tensor], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of the C operator (`ours`) and of PyTorch's for a number of rows."""

    rows: int
    ours: float
    torch: float

    @property
    def wins(self) -> bool:
        """Whether the C operator is used: it may be slower by NOISE."""
        return self.ours <= (1 + NOISE) * self.torch


def noise(*shape: int) -> Tensor:
    """Random inputs for timing. They do not advance torch's default generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fastest(calls: Sequence[Call], rounds: int = ROUNDS, products: int = 1) -> list[float]:
    """Seconds per product of each call: the minimum over at least `rounds` rounds.

    A round runs all calls, so that noise affects them alike. A call computes `products` products.
    """
    best = [float("inf")] * len(calls)
    begun = perf_counter()
    for index in range(MOST_ROUNDS):
        if index > rounds and perf_counter() - begun > ENOUGH_SECONDS:
            break  # the first round only warms up caches and threads, so there is one more
        for candidate, call in enumerate(calls):
            started = perf_counter()
            call()
            best[candidate] = min(best[candidate], (perf_counter() - started) / products)
    return best


@torch.inference_mode()
def choose_linears(linears: Linears, seconds: float = SECONDS) -> None:
    """Set `choice` of every layer, and log a line for each shape.

    Only float32 weights have an alternative: other formats are read by the C kernels alone.
    """
    if linears.format != "float32":
        return
    shapes = _by_shape(linears)
    path = choice_file("linears", sorted(shapes))
    cached, until = _read(path), perf_counter() + seconds
    by_shape: dict[str, list[Timing]] = {}
    for shape, layers in shapes.items():
        name = f"{shape[0]}x{shape[1]}"
        timings = by_shape[name] = cached.get(name) or _time(layers, until)
        for layer in layers:
            layer.choose(_bits(timings))
        log.info("%s", _line(f"linear {name}", timings))
    if by_shape != cached:
        _write(path, by_shape)


def _by_shape(linears: Linears) -> dict[tuple[int, int], list[Layer]]:
    shapes: dict[tuple[int, int], list[Layer]] = {}
    for layer in linears.layers:
        shapes.setdefault(layer.shape, []).append(layer)
    return shapes


def _time(layers: Sequence[Layer], until: float) -> list[Timing]:
    """Time both candidates by number of rows.

    Calls cycle through all layers of the shape, so that the weights of large ones come from memory
    as in a step, and not from the cache.
    """
    timings: list[Timing] = []
    for layer in layers:
        layer.choose(0)  # so that PyTorch's product has its weight
    candidates = [_recordings(layers, choice) for choice in (ALWAYS, 0)]
    for rows in ROWS:
        if timings and perf_counter() > until:
            break
        x = noise(rows, layers[0].shape[0])
        calls = [partial(_call_next, recordings, x) for recordings in candidates]
        timings.append(Timing(rows, *fastest(calls, products=_products(layers[0]))))
    return timings


def _call_next(recordings: Iterator[Recorded], x: Tensor) -> None:
    next(recordings)(x)


def _products(layer: Layer) -> int:
    """Products of a recording with layers of this shape; see RECORDED."""
    inner, out = layer.shape
    return min(RECORDED, max(1, PARAMETERS // (inner * out)))


def _recordings(layers: Sequence[Layer], choice: int) -> Iterator[Recorded]:
    """An endless cycle of recordings, which together multiply by all layers."""
    inner, count = layers[0].shape[0], _products(layers[0])
    products = cycle(
        [partial(replace(layer, choice=choice).multiply, adapter=None) for layer in layers]
    )
    recordings = [
        recorded([next(products) for _ in range(count)], inner)
        for _ in range(-(-len(layers) // count))
    ]
    return cycle(recordings)


def recorded(products: Sequence[Callable[[Tensor], Tensor]], inner: int) -> Recorded:
    """Record products of the same rows [T, inner], as a step runs them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            lambda x: tuple(product(x) for product in products), noise(2, inner), check_trace=False
        )

    def call(x: Tensor) -> object:
        with torch.jit.optimized_execution(False):
            return traced(x)

    return call


def _bits(timings: Sequence[Timing]) -> int:
    """The bits of a layer's `choice`; bit b is for 2^(b-1) + 1 to 2^b rows.

    Row counts beyond the last that was timed are decided as that one.
    """
    choice = 0
    for bit in range(63):
        timing = next((timing for timing in timings if timing.rows >= 1 << bit), timings[-1])
        choice |= timing.wins << bit
    return ALWAYS if choice == (1 << 63) - 1 else choice


def _line(name: str, timings: Sequence[Timing]) -> str:
    """A log line: for each range of rows the winner, with the times at the start of the range."""
    target = native.instruction_set()
    ours = f"C/{target.name}" if target is not None else "C"
    ranges: list[str] = []
    wins_before = None
    for timing in timings:
        if timing.wins != wins_before:
            pair = (ours, timing.ours, "torch", timing.torch)
            winner, best, loser, other = pair if timing.wins else (*pair[2:], *pair[:2])
            ranges.append(
                f"{timing.rows}+ rows {winner} {1e3 * best:.3f} ms ({loser} {1e3 * other:.3f})"
            )
        wins_before = timing.wins
    return f"{name}: {', '.join(ranges)}"


@torch.inference_mode()
def drafts_pay(linears: Linears, ranks: Mapping[int, int]) -> bool:
    """Whether MASK rows are faster by merged int8 weights than by the model's weights and the
    adapter; the log has both times.

    Args:
        ranks: the sum of the ranks of a layer's adapters, by the id of its weight; those that have
            none are multiplied by no MASK row.
    """
    merged = separate = 0.0
    timed: dict[object, tuple[float, float]] = {}
    for layer in linears.layers:
        if id(layer.group[0]) not in ranks:
            continue
        of_group = tuple(ranks[id(weight)] for weight in layer.group)
        key = (tuple(layer.widths), layer.shape, of_group)
        if key not in timed:
            timed[key] = _time_drafts(layer, key[2])
        merged, separate = merged + timed[key][0], separate + timed[key][1]
    wins = merged < separate
    better = "int8 weights of their own" if wins else "the model's weights and the adapter"
    figures = (DRAFT_ROWS, DRAFT_ROWS, 1e3 * merged, 1e3 * separate)
    how = "%d of them beside %d real rows take %.2f ms a step by int8, %.2f by the model's weights"
    log.info(f"MASK rows: {better}; {how}", *figures)
    return wins


def _time_drafts(layer: Layer, ranks: Sequence[int]) -> tuple[float, float]:
    """Seconds by merged int8 weights, and by the model's weights and the adapter.

    `ranks` has a rank for each weight of the layer's group.
    """
    inner, _ = layer.shape
    x, adapter = noise(2 * DRAFT_ROWS, inner), torch.zeros(DRAFT_ROWS, dtype=torch.int64)
    trial = replace(layer, drafts=stacked([layer.panels.matrix()], draft_format()))
    updates = [
        (noise(rank, inner), noise(out, rank))
        for out, rank in zip(layer.widths, ranks, strict=True)
    ]

    def with_adapter() -> None:
        parts = layer.multiply(x, None).split(layer.widths, dim=1)
        for part, (a, b) in zip(parts, updates, strict=True):
            if len(a):
                part[DRAFT_ROWS:].add_(F.linear(F.linear(x[DRAFT_ROWS:], a), b))

    merged, separate = fastest((lambda: trial.multiply(x, adapter), with_adapter))
    return merged, separate


def faster(name: str, ours: Call, theirs: Call) -> bool:
    """Whether the C operator is used instead of PyTorch's; both times are logged."""
    timing = Timing(1, *fastest((ours, theirs)))
    winner = "C" if timing.wins else "torch"
    log.info("%s: %s; C %.3f ms, torch %.3f", name, winner, 1e3 * timing.ours, 1e3 * timing.torch)
    return timing.wins


def choice_file(name: str, shapes: object) -> Path:
    """The cache file of timings; its name hashes everything that they depend on."""
    machine = (platform.node(), processor_name(), torch.get_num_threads())
    facts = [shapes, ROWS, RECORDED, PARAMETERS, *native.facts(), *machine]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
    return native.user_cache("choices") / f"{name}-{key}.json"


def processor_name() -> str:
    """The processor's model name from /proc/cpuinfo, else `platform.processor`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    line = next((line for line in lines if line.startswith("model name")), "")
    return line.partition(":")[2].strip() or platform.processor()


def _read(path: Path) -> dict[str, list[Timing]]:
    """Cached timings by shape; empty if there is no file or it cannot be parsed."""
    try:
        content = json.loads(path.read_text())
        return {
            shape: [Timing(int(rows), float(ours), float(torch)) for rows, ours, torch in timings]
            for shape, timings in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, by_shape: Mapping[str, Sequence[Timing]]) -> None:
    content = {
        shape: [(timing.rows, timing.ours, timing.torch) for timing in timings]
        for shape, timings in by_shape.items()
    }
    native.write_cache(path, content)
