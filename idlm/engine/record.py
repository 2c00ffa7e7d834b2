"""`Recorder`: records steps and replays them without Python.

A step of a small model on a CPU spends about half its time in Python; one of a large model on a GPU
waits for kernel launches. A recording of the step's operations avoids both. It is a trace on a CPU
and a CUDA graph on a GPU. Recording uses the spare slot, so it changes no request. A recording's
results are bit-equal to those of the step, except for float32 on a CPU: there the small operations
between the matrix products are fused (`idlm.kernels.fused`).

On a CPU a recording serves all batch sizes and prefix lengths. A CUDA graph serves a single batch
size and a single number of page-table columns, so the runner rounds both up on a GPU. Graphs are
replayed one at a time, and their outputs are copied, so they share memory.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.engine.prefill import PrefillBatch
from idlm.engine.results import StepResult
from idlm.engine.step import ModelStep, StepKey
from idlm.kernels.fused import fuse

log = logging.getLogger("idlm")

Replay = Callable[..., tuple[Tensor, ...]]

WARM = {"cpu": 4, "cuda": 1}
"""How often a step runs before it is recorded. A recording takes as long as dozens of steps."""
MOST_GRAPHS = 60
"""The most CUDA graphs that are kept. The least recently used graph is dropped first."""


class Recorder:
    """Runs steps; records and replays them if `on`."""

    def __init__(self, model_step: ModelStep, on: bool) -> None:
        self.model_step = model_step
        self.on = on
        self._device = model_step.idlm.device.type
        self.steady = True
        """Whether later steps of the same kind run as the last step did. False if that step was
        recorded just then, or if the kind will be recorded later."""
        self._seen: Counter[object] = Counter()
        self._recordings: OrderedDict[object, Replay] = OrderedDict()
        self._eager: set[object] = set()  # kinds of steps that had no memory to be recorded
        self._place: _Place | None = None

    def step(
        self, step_key: StepKey, rows: Tensor, columns: Tensor, prompts: PrefillBatch | None
    ) -> StepResult:
        """Run `ModelStep.step`, or replay its recording.

        A step with prompts is recorded only if the attention back-end takes any number of pieces in
        a single call.
        """
        model_step = self.model_step
        key = (
            (step_key, len(rows), len(columns))
            if self._device == "cuda"
            else (step_key, prompts is not None)
        )
        recordable = prompts is None or model_step.cache.backend.takes_pieces
        self.steady = key in self._recordings or not self.on or not recordable
        if (
            not recordable
            or not self._due(key)
            or not self._has(key, step_key, rows, columns, prompts)
        ):
            return model_step.step(step_key, rows, columns, prompts)
        if prompts is None:
            packed, *logprobs = self._recordings[key](rows, columns)
            return StepResult(packed, tuple(logprobs))
        packed, hidden, *logprobs = self._recordings[key](rows, columns, *prompts.tensors)
        return StepResult(packed, tuple(logprobs), hidden)

    def ready(self, step_key: StepKey) -> bool:
        """Whether steps of this kind run at their full speed at once, with prompts and without. On
        a GPU that depends on the batch too; there the answer is True."""
        kinds = ((step_key, prompts) for prompts in (False, True))
        return (
            not self.on or self._device == "cuda" or all(kind in self._recordings for kind in kinds)
        )

    def prepare(self, step_key: StepKey) -> None:
        """On a CPU, let the next step of this kind be recorded, even if it has never run."""
        # make the tables now: if a recording made them, each replay would make them again
        self.model_step.tables(step_key.plan)
        for prompts in (False, True):
            self._seen[step_key, prompts] = max(self._seen[step_key, prompts], WARM["cpu"])

    def forget(self) -> None:
        """Drop all recordings, since the steps have changed."""
        self._recordings.clear()

    def _due(self, key: object) -> bool:
        """Count the step; whether it shall be recorded now, or replayed."""
        self._seen[key] += 1
        return self.on and self._seen[key] > WARM[self._device] and key not in self._eager

    def _has(
        self,
        key: object,
        step_key: StepKey,
        rows: Tensor,
        columns: Tensor,
        prompts: PrefillBatch | None,
    ) -> bool:
        """Make the recording if there is none. False if there is no memory for it."""
        if key in self._recordings:
            self._recordings.move_to_end(key)
        elif self._device != "cuda":
            self._recordings[key] = _recording(self.model_step, step_key, rows, columns, prompts)
        else:
            self._capture(key, step_key, rows, columns)
        return key in self._recordings

    def _capture(self, key: object, step_key: StepKey, rows: Tensor, columns: Tensor) -> None:
        """Make room for a CUDA graph and record it. If memory runs out, steps of this kind run
        eagerly from now on."""
        while len(self._recordings) >= MOST_GRAPHS:
            self._recordings.popitem(last=False)
        self._place = self._place or _Place()
        try:
            self._recordings[key] = _graph(self.model_step, step_key, rows, columns, self._place)
        except torch.cuda.OutOfMemoryError:
            log.warning(
                "no memory to record %s for %d requests: these steps run eagerly",
                step_key.plan.name,
                len(rows),
            )
            self._eager.add(key)
            torch.cuda.empty_cache()


def _trace(model_step: ModelStep, step: Replay, *inputs: Tensor) -> Replay:
    """A recording of `step` for inputs of any length.

    The tensors that a step writes to are inputs of the recording too, although `step` reaches them
    through `model_step`. Writes to tensors that are not inputs would be removed as dead code.
    """
    written = model_step.written()

    def given(*values: Tensor) -> tuple[Tensor, ...]:
        return step(*values[: len(inputs)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that are static by design
        # not `torch.jit.trace`: the process would keep its result, and with it the weights, forever
        graph, _ = torch._C._create_graph_by_tracing(
            given, (*inputs, *written), lambda _: "", True, False
        )
    fuse(graph, model_step.idlm.dtype, model_step.products.fused)
    traced = torch._C._create_function_from_graph("step", graph)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.jit.optimized_execution(False):
            return traced(*inputs, *written)

    return replay


def _recording(
    model_step: ModelStep,
    step_key: StepKey,
    rows: Tensor,
    columns: Tensor,
    prompts: PrefillBatch | None,
) -> Replay:
    """A recording of a step with three windows, and with two pieces if there are `prompts`. All are
    on the spare slot."""

    def step(rows: Tensor, columns: Tensor, *pieces: Tensor) -> tuple[Tensor, ...]:
        outcome = model_step.step(
            step_key, rows, columns, PrefillBatch((2, 3), *pieces) if pieces else None
        )
        return (
            outcome.packed,
            *(() if outcome.prompt is None else (outcome.prompt,)),
            *outcome.logprobs,
        )

    spare = torch.full((3,), model_step.slots.spare)
    if prompts is None:
        return _trace(model_step, step, spare, columns)
    starts, ends, owner = (
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([2, 5]),
        torch.tensor([0, 0, 1, 1, 1]),
    )
    positions = torch.tensor([0, 1, 0, 1, 2])
    pieces = torch.zeros_like(owner), positions, owner, spare[:2], starts, ends, columns
    return _trace(model_step, step, spare, columns, *pieces)


@dataclass
class _Graph:
    """A CUDA graph, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    columns: Tensor
    outputs: tuple[Tensor, ...]

    def __call__(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        """Replay for the slots `rows`. The outputs are copied, since the next replay overwrites
        them."""
        self.rows.copy_(rows)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


class _Place:
    """The memory pool and the stream that all CUDA graphs share. They use a single stream, since
    CUDA keeps memory and workspaces by stream."""

    def __init__(self) -> None:
        self.memory = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()


def _graph(
    model_step: ModelStep, step_key: StepKey, rows: Tensor, columns: Tensor, place: _Place
) -> Replay:
    """A CUDA graph for this number of rows and columns. Recording runs a single warm-up step, on
    the spare slot."""
    spare = torch.full_like(rows, model_step.slots.spare)
    columns = columns.clone()
    place.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(place.stream):
        model_step.step(step_key, spare, columns)
    torch.cuda.current_stream().wait_stream(place.stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, place.memory, place.stream, "thread_local"):
        outcome = model_step.step(step_key, spare, columns)
    return _Graph(graph, spare, columns, (outcome.packed, *outcome.logprobs))
