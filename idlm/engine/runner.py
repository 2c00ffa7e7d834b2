"""`Runner`: launches steps on the device and copies their results to the host.

It owns the state on the device: model, pages, slots and settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter, thread_time

import torch
from torch import Tensor

from idlm.config import EngineConfig
from idlm.decoding.law import filtered
from idlm.decoding.plan import AR, Plan
from idlm.decoding.settings import Features, Settings
from idlm.engine.guide import Constraint, GuidedRows
from idlm.engine.kv_cache import KVCache
from idlm.engine.lookup import Lookup
from idlm.engine.prefill import Chunk, PrefillBatch
from idlm.engine.products import Products
from idlm.engine.record import Recorder
from idlm.engine.request import Request
from idlm.engine.results import COUNTS, StepResult
from idlm.engine.slots import Slots, staged
from idlm.engine.step import ModelStep, StepKey, Verify
from idlm.kernels.gpu import current
from idlm.models.experts import unrecordable
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

WARM_UP = 2
"""Steps before the step that is timed. The first of them is recorded."""
MEASURE_PREFIX = 256
"""The cached tokens of each window when step costs are measured."""
SHORT_CONTEXT = 512
"""The smallest context of a CUDA graph, in tokens, if the context matters. Each larger one is four
times as long."""


@dataclass
class PendingStep:
    """A launched step and the copy of its result to the host; `read` waits for it.

    Attributes:
        drafts: int64 [B, K], the drafts of the step's slots before it, if they are wanted.
    """

    result: StepResult
    done: torch.cuda.Event | None = None
    drafts: Tensor | None = None

    @classmethod
    def of(cls, result: StepResult, drafts: Tensor | None = None) -> PendingStep:
        """Start to copy `result` to the host. The hidden states of prompts stay on the device."""
        if result.packed.device.type != "cuda":
            return cls(result, None, drafts)
        packed = result.packed.to("cpu", non_blocking=True)
        logprobs = tuple(tensor.to("cpu", non_blocking=True) for tensor in result.logprobs)
        drafts = None if drafts is None else drafts.to("cpu", non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return cls(StepResult(packed, logprobs, result.prompt), done, drafts)

    def read(self) -> StepResult:
        """Wait for the copy; returns the result on the host."""
        if self.done is not None:
            self.done.synchronize()
        return self.result


class Runner:
    """The device side of an engine. Its methods must be called in torch's inference mode.

    Args:
        plans: all plans of the engine. If any looks drafts up, every step does.
        products: the kernels that multiply by the model's weights.

    Attributes:
        depth: K, the most drafts of any plan.
    """

    def __init__(
        self,
        idlm: Idlm,
        config: EngineConfig,
        plans: Sequence[Plan],
        cache: KVCache,
        products: Products,
    ) -> None:
        self.idlm, self.depth = idlm, max(plan.drafts for plan in plans)
        self._masks = max(plan.drafts if plan.masks else 0 for plan in plans)
        depth, looking = self.depth, any(plan.branches == "lookup" for plan in plans)
        slots, deterministic = config.max_num_seqs, config.deterministic
        self.slots = Slots(slots, depth, cache.columns(idlm.context), idlm.vocab_size, idlm.device)
        self.settings = Settings.empty(slots + 1, idlm.vocab_size, idlm.mask_id, idlm.device)
        self.lookup = Lookup(self.slots, cache.page_size) if looking else None
        self.model_step = ModelStep(
            idlm, cache, self.slots, self.settings, products, deterministic, self.lookup
        )
        # a CPU recording serves all batch sizes, but deterministic kernels fix a number of tiles
        tiled = deterministic and idlm.device.type == "cpu"
        routed = unrecordable(idlm.model, deterministic)
        if config.record and routed is not None:
            log.info("steps are not recorded: %s", routed)
        self._graphs = idlm.device.type == "cuda"
        # on a CPU not the time that other processes take: it would fall on long steps only
        self.clock = perf_counter if self._graphs else thread_time
        self._measured: set[tuple[Plan, int]] = set()
        self._steps = Recorder(self.model_step, config.record and not tiled and routed is None)

    def seat(self, request: Request) -> None:
        """Write a request's state to its slot. Later steps must prefill its text except the last
        token, which is pending."""
        assert request.slot is not None  # noqa: S101
        if request.params.verification == "ratio" and self.slots.log_q is None and self._masks:
            rows = len(self.slots.state.length)
            shape = (rows, self._masks, self.idlm.vocab_size)
            self.slots.log_q = torch.zeros(shape, dtype=torch.float64, device=self.idlm.device)
        result, stop_ids = request.result, sorted(request.stop_ids)
        self.settings.put(
            request.slot, request.params, result.seed, request.prompt, result.token_ids, stop_ids
        )
        self.slots.put(request)
        if self.lookup is not None:
            self.lookup.put(request.slot, request.text)

    def replace_verify(self, verify: Verify) -> None:
        """Change the rule that accepts drafts. Benches use this to simulate acceptance."""
        self.model_step.verify = verify
        self.forget()

    def forget(self) -> None:
        """Drop all recordings: the steps have changed."""
        self._steps.forget()

    def clear(self, slot: int) -> None:
        """Free a slot. Steps in flight commit nothing more for it."""
        self.settings.clear(slot)
        self.slots.clear(slot)

    def replace_from(self, long: int) -> None:
        """Set `Lookup.long`, for the steps that are launched from now on."""
        if self.lookup is not None:
            self.lookup.replace_from(long)

    def map_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Write (slot, column, page) entries into the page tables."""
        self.slots.map_pages(entries)

    def step(
        self,
        key: StepKey,
        slots: Sequence[int],
        tokens: int,
        chunks: Sequence[Chunk] = (),
        matchers: Sequence[Constraint | None] = (),
        windows: bool = False,
    ) -> PendingStep:
        """Launch a window for each of `slots`, and the prefill of `chunks`. With `windows` the
        drafts that the windows verify are copied to the host too.

        No slot has more than `tokens` tokens, including drafts. `matchers` are those of the slots.
        A step with a matcher is not recorded, since the host takes part in it.
        """
        with current(self.idlm.device):
            prompts = (
                PrefillBatch.of(chunks, self.model_step.cache.page_size, self._on_device)
                if chunks
                else None
            )
            drafts = self.slots.state.drafts[self._on_device(slots)] if windows else None
            if prompts is None or not self._graphs:
                return PendingStep.of(self._windows(key, slots, tokens, prompts, matchers), drafts)
            hidden = self.model_step.prefill(prompts)  # separately: graphs have windows only
            if not slots:
                nothing = hidden.new_empty(0, key.plan.stride + COUNTS, dtype=torch.int64)
                return PendingStep.of(StepResult(nothing, prompt=hidden))
            return PendingStep.of(
                replace(self._windows(key, slots, tokens, None, matchers), prompt=hidden), drafts
            )

    def _windows(
        self,
        key: StepKey,
        slots: Sequence[int],
        tokens: int,
        prompts: PrefillBatch | None,
        matchers: Sequence[Constraint | None],
    ) -> StepResult:
        """Run windows, and the pieces of prompts in the same forward."""
        slots, batch = slots or [self.slots.spare], max(1, len(slots))
        if self._graphs:
            key, batch, tokens = self._shared(key), _round_up(batch), self._context(tokens)
        columns = min(self.model_step.cache.columns(tokens), self.slots.state.table.shape[1])
        rows = self._on_device([*slots, *[self.slots.spare] * (batch - len(slots))])
        taken = torch.arange(columns, device=self.idlm.device)
        if any(matchers):
            guided = self.guided([*matchers, *[None] * (batch - len(matchers))])
            return self.model_step.step(key, rows, taken, prompts, guided)
        return self._steps.step(key, rows, taken, prompts)

    def guided(self, matchers: Sequence[Constraint | None]) -> GuidedRows:
        """What the matchers of a step's slots allow."""
        return GuidedRows(matchers, self.idlm.vocab_size)

    def _shared(self, key: StepKey) -> StepKey:
        """The key of a CUDA graph that serves this step too. A graph for sampling also filters, if
        that takes a kernel and no sort: it copies the scores of slots without a filter."""
        features, by_sort = key.features, self.model_step.rules[1] is filtered
        if by_sort or not (features.sampled or features.filtered):
            return key
        return replace(key, features=replace(features, sampled=True, filtered=True, ranked=True))

    def _context(self, tokens: int) -> int:
        """The tokens of a graph's page tables. A kernel that takes pieces reads no page past a
        prefix, so a single graph serves all contexts."""
        whole = self.model_step.cache.backend.takes_pieces
        return self.idlm.context if whole else _context(tokens)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return staged(numbers, self.idlm.device)

    @torch.inference_mode()
    def measure(self, plan: Plan, batch: int, prefix: int = MEASURE_PREFIX) -> float:
        """The seconds of a greedy decode step of `batch` windows with `prefix` cached tokens each.
        All windows are on the spare slot."""
        prefix = min(prefix, self.idlm.context - self.depth - 1)
        self.lengthen_spare(prefix)
        key, slots = StepKey(plan, Features()), [self.slots.spare] * batch
        shape = (plan, batch if self.idlm.device.type == "cuda" else 0)  # one recording for each
        self.prepare(key)
        for _ in range(1 if shape in self._measured else WARM_UP):
            self.step(key, slots, prefix + self.depth).read()
        self._measured.add(shape)
        started = self.clock()
        self.step(key, slots, prefix + self.depth).read()
        seconds = self.clock() - started
        self.lengthen_spare(1)
        return seconds

    def lengthen_spare(self, length: int) -> None:
        """Set the tokens of the spare slot."""
        self.slots.state.length[self.slots.spare] = length

    def prepare(self, key: StepKey) -> None:
        """Let the next step of this kind be recorded; see `Recorder.prepare`."""
        self._steps.prepare(key)

    def ready(self, key: StepKey) -> bool:
        """Whether no step of this kind has to be recorded first."""
        return self._steps.ready(key)

    @property
    def steady(self) -> bool:
        """Whether the time of the last step predicts that of later steps of the same kind."""
        return self._steps.steady and self.idlm.device.type == "cpu"

    @torch.inference_mode()
    def warm_up(self, plans: Iterable[Plan], seconds: float) -> None:
        """Record the steps of greedy requests and of requests with a temperature, so that no
        request waits for a recording. The first plans come first.

        A CUDA graph serves a single batch size, so on a GPU graphs are recorded when they are
        needed.
        """
        if self.idlm.device.type == "cuda":
            return
        started, spare = perf_counter(), self.slots.spare
        for plan, features in product(
            dict.fromkeys([AR, *plans]), (Features(), Features(sampled=True))
        ):
            key = StepKey(plan, features)
            self.prepare(key)
            for chunks in ((), [Chunk(spare, [0, 0], 0)]):
                self.step(key, [spare], 3, chunks)
                if perf_counter() - started > seconds:
                    return


def _round_up(number: int) -> int:
    """The next of 1, 2, 4, 8, 16, 24, 32, 48, 64, ..."""
    if number <= 8:
        return 1 << (number - 1).bit_length()
    step = 8 if number <= 32 else 16
    return -(-number // step) * step


def _context(tokens: int) -> int:
    """The next of 512, 2048, 8192, ...; steps with the same value share CUDA graphs."""
    size = SHORT_CONTEXT
    while size < tokens:
        size *= 4
    return size
