"""`Recorder`: decode steps recorded once and replayed without Python.

A step of a small model on a CPU spends about half its time in Python; one of a large model on a GPU waits for kernel
launches. Both go away when the step's operations are recorded: by `torch.jit.trace` on a CPU, as a CUDA graph on a
GPU. A recording is bit-equal to the step it was made from; it is made on the spare slot, which changes nothing.

On a CPU one recording serves every batch size and prefix length; a CUDA graph serves one of each, so the runner rounds
them up there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.engine.step import Core, Kind, Outcome

Replay = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

WARM = {"cpu": 4, "cuda": 1}
"""How often a step runs before it is recorded: a recording costs as much as dozens of steps."""


class Recorder:
    """Runs decode steps, recorded where that is on."""

    def __init__(self, core: Core, on: bool) -> None:
        self.core = core
        self.on = on
        self._seen: Counter[object] = Counter()
        self._recordings: dict[object, Replay] = {}

    def __call__(self, kind: Kind, rows: Tensor, columns: Tensor) -> Outcome:
        """`Core.decode`."""
        device = rows.device.type
        key = (kind, len(rows), len(columns)) if device == "cuda" else kind
        if not self.on or self._seen[key] < WARM[device]:
            self._seen[key] += 1
            return self.core.decode(kind, rows, columns)
        if key not in self._recordings:
            record = _capture if device == "cuda" else _trace
            self._recordings[key] = record(self.core, kind, rows, columns)
        packed, *logprobs = self._recordings[key](rows, columns)
        return Outcome(packed, tuple(logprobs))


def _trace(core: Core, kind: Kind, rows: Tensor, columns: Tensor) -> Replay:
    """A recording for any number of rows and columns.

    What a step writes to is an input of the recording, though `step` reaches it through `core`: writes to anything
    else would count as dead code.
    """
    written = core.written()

    def step(rows: Tensor, columns: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        outcome = core.decode(kind, rows, columns)
        return outcome.packed, *outcome.logprobs

    spare = torch.full((3,), core.slots.spare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are static by design
        traced = torch.jit.trace(step, (spare, columns, *written), check_trace=False)

    def replay(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        with torch.jit.optimized_execution(False):
            return traced(rows, columns, *written)

    return replay


@dataclass
class _Graph:
    """A CUDA graph with the tensors it reads and writes."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    columns: Tensor
    outputs: tuple[Tensor, ...]

    def __call__(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        """Replay for other slots; the outputs are copied, since the next replay overwrites them."""
        self.rows.copy_(rows)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


def _capture(core: Core, kind: Kind, rows: Tensor, columns: Tensor) -> Replay:
    """A CUDA graph for this number of rows and columns; capturing runs nothing but the warm-up on the spare slot."""
    spare = torch.full_like(rows, core.slots.spare)
    columns = columns.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        core.decode(kind, spare, columns)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = core.decode(kind, spare, columns)
    return _Graph(graph, spare, columns, (outcome.packed, *outcome.logprobs))
