"""`Recorder`: steps recorded once and replayed without Python.

A step of a small model on a CPU spends about half its time in Python; one of a large model on a GPU waits for kernel
launches. Both go away when the step's operations are recorded: by `torch.jit.trace` on a CPU, as a CUDA graph on a
GPU. It is made on the spare slot, which changes nothing. A recording is bit-equal to the step it was made from, but for
float32 on a CPU: there the small operations between the matrix products are fused (`idlm.kernels.fused`).

On a CPU one recording serves every batch size and prefix length; a CUDA graph serves one of each, so the runner rounds
them up there.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.engine.step import Core, Kind, Outcome, Piece
from idlm.kernels.fused import fuse

Replay = Callable[..., tuple[Tensor, ...]]

WARM = {"cpu": 4, "cuda": 1}
"""How often a step runs before it is recorded: a recording costs as much as dozens of steps."""


class Recorder:
    """Runs steps, recorded where that is on."""

    def __init__(self, core: Core, on: bool) -> None:
        self.core = core
        self.on = on
        self._seen: Counter[object] = Counter()
        self._recordings: dict[object, Replay] = {}

    def decode(self, kind: Kind, rows: Tensor, columns: Tensor) -> Outcome:
        """`Core.decode`."""
        device = rows.device.type
        key = (kind, len(rows), len(columns)) if device == "cuda" else kind
        if not self._due(key, device):
            return self.core.decode(kind, rows, columns)
        if key not in self._recordings:
            record = _capture if device == "cuda" else _trace_decode
            self._recordings[key] = record(self.core, kind, rows, columns)
        packed, *logprobs = self._recordings[key](rows, columns)
        return Outcome(packed, tuple(logprobs))

    def prefill(self, kind: Kind, pieces: Sequence[Piece], last: Sequence[bool]) -> Outcome:
        """`Core.prefill`; recorded for single pieces on a CPU."""
        key, (piece, *more) = (kind, *last), pieces
        if more or piece.tokens.is_cuda or not self._due(key, "cpu"):
            return self.core.prefill(kind, pieces, last)
        if key not in self._recordings:
            self._recordings[key] = _trace_prefill(self.core, kind, piece, last)
        packed, hidden, *logprobs = self._recordings[key](*piece)
        return Outcome(packed, tuple(logprobs), hidden)

    def _due(self, key: object, device: str) -> bool:
        """Whether to record now, or to use the recording."""
        self._seen[key] += 1
        return self.on and self._seen[key] > WARM[device]


def _trace(core: Core, step: Replay, *inputs: Tensor) -> Replay:
    """A recording of `step` for inputs of any length.

    What a step writes to is an input of the recording, though it reaches it through `core`: writes to anything else
    would count as dead code.
    """
    written = core.written()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are static by design
        traced = torch.jit.trace(lambda *given: step(*given[: len(inputs)]), (*inputs, *written), check_trace=False)
    fuse(traced.graph, core.idlm.dtype)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.jit.optimized_execution(False):
            return traced(*inputs, *written)

    return replay


def _trace_decode(core: Core, kind: Kind, rows: Tensor, columns: Tensor) -> Replay:
    def step(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        outcome = core.decode(kind, rows, columns)
        return outcome.packed, *outcome.logprobs

    return _trace(core, step, torch.full((3,), core.slots.spare), columns)


def _trace_prefill(core: Core, kind: Kind, piece: Piece, last: Sequence[bool]) -> Replay:
    def step(*piece: Tensor) -> tuple[Tensor, ...]:
        outcome = core.prefill(kind, [Piece(*piece)], last)
        assert outcome.prompt is not None  # noqa: S101
        return outcome.packed, outcome.prompt, *outcome.logprobs

    spare = piece._replace(slot=torch.full_like(piece.slot, core.slots.spare))
    return _trace(core, step, *spare)


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
