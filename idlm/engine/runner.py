"""`Runner`: launches steps on the device and brings their results back.

It owns what lies on the device (model, pages, slots, settings) and knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features, Settings
from idlm.engine.guide import GuidedRows, Matcher
from idlm.engine.kv_cache import KVCache
from idlm.engine.prefill import Chunk, PrefillBatch
from idlm.engine.record import Recorder
from idlm.engine.slots import Slots, staged
from idlm.engine.step import Core, Kind, Outcome
from idlm.kernels.fused import OPERATORS
from idlm.kernels.linears import Linears
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams

WARM_UP = 2
"""Steps before the first one that is timed: it is recorded in the first."""
MEASURE_PREFIX = 256
"""Cached tokens of the slots that step costs are measured on."""
SHORT_CONTEXT = 512
"""Tokens of the shortest requests that CUDA graphs tell apart; the next ones hold four times as
many, and so on."""


@dataclass
class Launched:
    """A step under way; `read` waits for it."""

    outcome: Outcome
    done: torch.cuda.Event | None = None

    @classmethod
    def of(cls, outcome: Outcome) -> Launched:
        """Start the copies to the host."""
        if outcome.packed.device.type != "cuda":
            return cls(outcome)
        packed = outcome.packed.to("cpu", non_blocking=True)
        chances = tuple(tensor.to("cpu", non_blocking=True) for tensor in outcome.logprobs)
        done = torch.cuda.Event()
        done.record()
        return cls(Outcome(packed, chances, outcome.prompt), done)

    def read(self) -> Outcome:
        """The outcome, on the host."""
        if self.done is not None:
            self.done.synchronize()
        return self.outcome


class Runner:
    """The device side of an engine; its methods are called in torch's inference mode.

    Args:
        slots: the most requests at once.
        depth: K, the most drafts a plan has.
        pages, page_size: of the KV cache; page 0 is the trash page.
        record: whether decode steps are recorded (see `Recorder`).
        simulated, deterministic, linears, fused: see `Core`.
    """

    def __init__(
        self,
        idlm: Idlm,
        slots: int,
        depth: int,
        pages: int,
        page_size: int,
        record: bool = True,
        simulated: Sequence[float] | None = None,
        deterministic: bool = False,
        linears: Linears | None = None,
        fused: frozenset[str] = OPERATORS,
    ) -> None:
        self.idlm, self.depth = idlm, depth
        like = torch.empty(0, dtype=idlm.dtype, device=idlm.device)
        cache = KVCache(attention_shapes(idlm), pages, page_size, like, deterministic)
        columns = cache.columns(idlm.context)
        self.slots = Slots(slots, depth, columns, idlm.vocab_size, idlm.device)
        self.settings = Settings.empty(slots + 1, idlm.vocab_size, idlm.mask_id, idlm.device)
        # on a CPU one recording serves all batch sizes, but the number of fixed tiles is part of it
        tiled = deterministic and idlm.device.type == "cpu"
        self._graphs = idlm.device.type == "cuda"
        self.core = Core(
            idlm, cache, self.slots, self.settings, simulated, deterministic, linears, fused
        )
        self._measured: set[tuple[Plan, int]] = set()
        self._steps = Recorder(self.core, record and not tiled)

    def seat(
        self,
        slot: int,
        prompt: Sequence[int],
        output: Sequence[int],
        params: SamplingParams,
        seed: int,
        limit: int,
        stop_ids: Sequence[int],
        adapter: int,
        drafting: bool,
        pages: Sequence[int],
    ) -> None:
        """Give a request a slot; the prefill of its text but for the last token follows."""
        if params.verification == "ratio" and self.slots.log_q is None:
            rows = len(self.slots.state.length)
            shape = (rows, self.depth, self.idlm.vocab_size)
            self.slots.log_q = torch.zeros(shape, dtype=torch.float64, device=self.idlm.device)
        self.settings.put(slot, params, seed, prompt, output, stop_ids)
        text = [*prompt, *output]
        self.slots.put(slot, len(text), text[-1], limit, stop_ids, adapter, drafting, pages)

    def clear(self, slot: int) -> None:
        """Free a slot."""
        self.settings.clear(slot)
        self.slots.clear(slot)

    def map_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Write (slot, column, page) entries into the page tables."""
        self.slots.map_pages(entries)

    def step(
        self,
        kind: Kind,
        slots: Sequence[int],
        tokens: int,
        chunks: Sequence[Chunk] = (),
        matchers: Sequence[Matcher | None] = (),
    ) -> Launched:
        """One window for each of `slots`, none of which has more than `tokens` tokens, drafts
        included; and `chunks`.

        `matchers` are those of the slots; where there is one, the step is not recorded: its host
        takes part in it.
        """
        with current(self.idlm.device):
            prompts = (
                PrefillBatch.of(chunks, self.core.cache.page_size, self._on_device)
                if chunks
                else None
            )
            if prompts is None or not self._graphs:
                return Launched.of(self._windows(kind, slots, tokens, prompts, matchers))
            hidden = self.core.prefill(prompts)  # by itself: graphs are of windows alone
            if not slots:
                nothing = hidden.new_empty(0, kind.plan.stride + 4, dtype=torch.int64)
                return Launched.of(Outcome(nothing, prompt=hidden))
            return Launched.of(
                replace(self._windows(kind, slots, tokens, None, matchers), prompt=hidden)
            )

    def _windows(
        self,
        kind: Kind,
        slots: Sequence[int],
        tokens: int,
        prompts: PrefillBatch | None,
        matchers: Sequence[Matcher | None],
    ) -> Outcome:
        """The windows, and the pieces of prompts in the same forward."""
        slots = slots or [self.slots.spare]
        batch, tokens = (
            (_round_up(len(slots)), _context(tokens)) if self._graphs else (len(slots), tokens)
        )
        columns = min(self.core.cache.columns(tokens), self.slots.state.table.shape[1])
        rows = self._on_device([*slots, *[self.slots.spare] * (batch - len(slots))])
        taken = torch.arange(columns, device=self.idlm.device)
        if any(matchers):
            guided = GuidedRows(
                [*matchers, *[None] * (batch - len(matchers))], self.idlm.vocab_size
            )
            return self.core.step(kind, rows, taken, prompts, guided)
        return self._steps.step(kind, rows, taken, prompts)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return staged(numbers, self.idlm.device)

    @torch.inference_mode()
    def measure(self, plan: Plan, batch: int, prefix: int = MEASURE_PREFIX) -> float:
        """Seconds of one greedy decode step of `batch` requests with `prefix` cached tokens each,
        on the spare slot."""
        prefix = min(prefix, self.idlm.context - self.depth - 1)
        self.slots.state.length[self.slots.spare] = prefix
        kind, slots = Kind(plan, Features()), [self.slots.spare] * batch
        shape = (plan, batch if self.idlm.device.type == "cuda" else 0)  # what one recording serves
        self._steps.prepare(kind)
        for _ in range(1 if shape in self._measured else WARM_UP):
            self.step(kind, slots, prefix + self.depth).read()
        self._measured.add(shape)
        started = perf_counter()
        self.step(kind, slots, prefix + self.depth).read()
        seconds = perf_counter() - started
        self.slots.state.length[self.slots.spare] = 1
        return seconds

    @property
    def steady(self) -> bool:
        """Whether the time of the last step says what later ones like it will take."""
        return self._steps.steady and self.idlm.device.type == "cpu"

    @torch.inference_mode()
    def warm_up(self, plans: Iterable[Plan], seconds: float) -> None:
        """Record the steps of greedy and of plainly sampled requests, so that no request waits for
        that later.

        A CUDA graph is for one batch size, so there it is left to the first of each.
        """
        if self.idlm.device.type == "cuda":
            return
        started, spare = perf_counter(), self.slots.spare
        for features, plan in product(
            (Features(), Features(sampled=True)), dict.fromkeys([AR, *plans])
        ):
            kind = Kind(plan, features)
            self._steps.prepare(kind)
            for chunks in ((), [Chunk(spare, [0, 0], 0)]):
                self.step(kind, [spare], 3, chunks)
                if perf_counter() - started > seconds:
                    return


def _round_up(number: int) -> int:
    """The next of 1, 2, 4, 8, 16, 24, 32, 40, ..."""
    return 1 << (number - 1).bit_length() if number <= 8 else -(-number // 8) * 8


def _context(tokens: int) -> int:
    """The next of 512, 2048, 8192, ...: requests up to so many tokens have their CUDA graphs in
    common."""
    size = SHORT_CONTEXT
    while size < tokens:
        size *= 4
    return size


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it a GPU is CUDA's current one: Triton, graphs, streams and events go by that, not by
    their tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Shapes:
    """A cache that keeps nothing and notes each layer's shape."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.found.append((query.shape[1], key.shape[1], key.shape[3]))
        return query.transpose(1, 2)


@torch.inference_mode()
def working_memory(idlm: Idlm, rows: int, logits: int) -> int:
    """Bytes that a GPU's largest forward takes beside weights and pages: of so many rows, with
    logits of some."""
    torch.cuda.reset_peak_memory_stats(idlm.device)
    before = torch.cuda.memory_allocated(idlm.device)
    tokens = torch.zeros(1, rows, dtype=torch.int64, device=idlm.device)
    hidden = idlm.hidden(tokens, tokens, None, cache=_Shapes())
    idlm.head(hidden[0, :1].expand(logits, -1))
    peak = torch.cuda.max_memory_allocated(idlm.device)
    torch.cuda.empty_cache()
    return peak - before


@torch.inference_mode()
def attention_shapes(idlm: Idlm) -> list[tuple[int, int, int]]:
    """Query heads, key/value heads and head size of each layer, as the model itself computes them."""
    cache = _Shapes()
    one = torch.zeros(1, 1, dtype=torch.int64, device=idlm.device)
    idlm.hidden(one, one, None, cache=cache)
    return cache.found
