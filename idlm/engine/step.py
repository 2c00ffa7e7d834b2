"""`ModelStep`: a step as tensor operations of static shape. The host does not wait for the device.

    1. Read the slots' state; lay out their windows and the prompt tokens to prefill.
    2. Run a forward over all these rows.
    3. Run the head on the verify rows; count the accepted drafts and choose the next token.
    4. Commit: cut at the request's limit and at its first stop token. The last committed token
       becomes pending.
    5. Run the head on the MASK rows of the outcome; draw the next drafts, in turn if the adapter
       has a draft head.
    6. Look drafts up in the slots' own texts, if the engine does so.

A prompt's last token is not prefilled. It is the pending token of its slot's first window, which
has no drafts. That window may be in the forward that prefills the other tokens.

Shapes: B slots, K drafts, R = 1 + K verify rows, G groups of K MASK rows, W = R + G K window rows,
P pieces of T prompt tokens in all, D hidden size, V logit columns, C columns of the page table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from idlm.attention.base import Segment
from idlm.decoding.law import Law
from idlm.decoding.plan import Plan
from idlm.decoding.settings import Features, Settings
from idlm.decoding.verify import NOTHING, Drafts, Verdicts, draft, logprobs, report, verify
from idlm.decoding.window import window
from idlm.engine.chain import chain
from idlm.engine.guide import GuidedRows
from idlm.engine.kv_cache import KVCache
from idlm.engine.lookup import Lookup
from idlm.engine.prefill import PrefillBatch
from idlm.engine.products import Products
from idlm.engine.results import StepResult
from idlm.engine.slots import Slots, State, select, store
from idlm.kernels.batch_invariant import batch_invariant
from idlm.kernels.keep import rules
from idlm.models.gate import NO_ROWS, Gate
from idlm.models.idlm_model import Idlm

Guided = GuidedRows | None  # the guides of a step's slots, if any has one
Verify = Callable[[Law, Tensor, Drafts, Tensor], Verdicts]


@dataclass(frozen=True)
class StepKey:
    """The static properties of a step.

    Attributes:
        features: the parts of the law that its requests use.
        logprobs: the number of top log-probabilities for each token; None: no log-probabilities.
        raw_logprobs: they are the model's own, not those of the law.
    """

    plan: Plan
    features: Features
    logprobs: int | None = None
    raw_logprobs: bool = False


class StepContext(NamedTuple):
    """The rows of a forward, for attention, gate and products.

    Attributes:
        segments: the segments of the rows, in order; empty for the head alone.
        mask_rows: the MASK rows.
        adapter: int64 [MASK rows], the index of each MASK row's adapter.
    """

    segments: Sequence[Segment] = ()
    mask_rows: slice = NO_ROWS
    adapter: Tensor | None = None


class WindowTables:
    """A plan's window tables on the device; see `idlm.decoding.window.Window`."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        layout = window(plan.stride, plan.branches)
        self.stride, self.num_masks = layout.stride, layout.num_masks
        self.num_groups, self.mask_rows = layout.groups, layout.mask_rows
        tables = (layout.offsets, layout.visible, layout.group)
        self.offsets, self.visible, self.group = (table.to(device) for table in tables)


@dataclass(frozen=True)
class Verified:
    """The slots [B] of a step once their drafts have been verified.

    Attributes:
        logits: [B, R, V], of the verify rows; the model's own if `StepKey.raw_logprobs`.
        valid: [B], the number of drafts verified.
    """

    slots: Tensor
    state: State
    law: Law
    logits: Tensor
    valid: Tensor
    verdict: Verdicts
    guided: Guided


class ModelStep:
    """Runs steps on a model, its pages and its slots.

    Attributes:
        verify: the rule that accepts drafts: `idlm.decoding.verify.verify`, unless a bench
            simulates acceptance.
        kernels: a context for every step: batch-invariant kernels if the engine is deterministic.
        rules: choose and filter tokens on the model's device.
        lookup: the texts of the slots; None: drafts are not looked up.
    """

    def __init__(
        self,
        idlm: Idlm,
        cache: KVCache,
        slots: Slots,
        settings: Settings,
        products: Products,
        deterministic: bool = False,
        lookup: Lookup | None = None,
    ) -> None:
        self.idlm, self.cache, self.slots, self.settings = idlm, cache, slots, settings
        self.products, self.lookup = products, lookup
        self.verify: Verify = verify
        self.kernels = batch_invariant if deterministic else nullcontext
        self.rules = rules(idlm.device)
        self._tables: dict[Plan, WindowTables] = {}

    def tables(self, plan: Plan) -> WindowTables:
        """The tables of a plan, moved to the device once."""
        if plan not in self._tables:
            self._tables[plan] = WindowTables(plan, self.idlm.device)
        return self._tables[plan]

    def written(self) -> list[Tensor]:
        """Every tensor that a step writes to and a later one reads."""
        settings = self.settings
        looked_up = [] if self.lookup is None else self.lookup.written
        optional = (self.slots.log_q, settings.seen, settings.counts, settings.recent, *looked_up)
        state = [getattr(self.slots.state, field.name) for field in fields(State)]
        return [*self.cache.pages, *state, *(tensor for tensor in optional if tensor is not None)]

    def step(
        self,
        key: StepKey,
        slots: Tensor,
        columns: Tensor,
        prompts: PrefillBatch | None = None,
        guided: Guided = None,
    ) -> StepResult:
        """Run a window for each of the `slots` [B], and prefill the tokens of `prompts`.

        `columns` [C] are the page-table columns that the slots' texts occupy.
        """
        with self.kernels(), self.products.use():
            return self._step(key, slots, columns, prompts, guided)

    def prefill(self, prompts: PrefillBatch) -> Tensor:
        """Prefill prompt tokens without windows; returns their hidden states [T, D]."""
        context = StepContext([self._pieces(prompts)])
        with self.kernels(), self.products.use():
            return self._hidden(prompts.tokens, prompts.positions, context)

    def _step(
        self,
        key: StepKey,
        slots: Tensor,
        columns: Tensor,
        prompts: PrefillBatch | None,
        guided: Guided,
    ) -> StepResult:
        tables, state = self.tables(key.plan), self.slots.read(slots, columns)
        valid, prefix = state.valid.clamp(max=tables.num_masks), state.length - 1
        positions = prefix[:, None] + tables.offsets.index_select(0, valid)  # [B, W]
        real, mask_positions = positions[:, : tables.stride], positions[:, tables.stride :]
        drafts = state.drafts[:, : tables.num_masks]
        visible = tables.visible.index_select(0, valid)
        segments = [self.cache.windows(state.table, prefix, visible, real, tables.mask_rows)]
        # rows: prompt tokens, the verify rows of all slots, then the MASK rows of all slots
        tokens = [torch.cat([state.pending[:, None], drafts], dim=1).flatten()]
        places = [real.flatten()]
        if prompts is not None:
            segments.insert(0, self._pieces(prompts))
            tokens, places = [prompts.tokens, *tokens], [prompts.positions, *places]
        hidden, mask_hidden = self._forward(
            torch.cat(tokens), torch.cat(places), mask_positions, state.adapter, segments
        )
        prompt = None
        if prompts is not None:
            first = prompts.tokens.shape[0]
            prompt, hidden = hidden[:first], hidden[first:]
        logits = self.idlm.head(hidden).unflatten(0, (-1, tables.stride))
        verified = self._verify(key, slots, state, logits, Drafts(drafts, valid, None), guided)
        packed, top = self._commit(key, verified, *_chosen(tables, verified, mask_hidden))
        return StepResult(packed, top, prompt)

    def _pieces(self, prompts: PrefillBatch) -> Segment:
        """The segment of the prompt tokens. They see pages and earlier prompt tokens."""
        table = self.slots.state.table.index_select(0, prompts.slots)
        return self.cache.pieces(table.index_select(1, prompts.columns), prompts)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask_positions: Tensor,
        adapter: Tensor,
        segments: Sequence[Segment],
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of real rows [., D] and of MASK rows [B G K, D].

        Real rows are given by `tokens` and `positions`, MASK rows by `mask_positions` [B, G K] and
        each slot's `adapter` [B].
        """
        if not mask_positions.shape[1]:
            hidden = self._hidden(tokens, positions, StepContext(segments))
            return hidden, hidden[:0]
        adapter = adapter[:, None].expand_as(mask_positions).flatten()
        masks, first = mask_positions.flatten(), tokens.shape[0]
        tokens = torch.cat([tokens, torch.full_like(masks, self.idlm.mask_id)])
        positions = torch.cat([positions, masks])
        context = StepContext(segments, slice(first, positions.shape[0]), adapter)
        hidden = self._hidden(tokens, positions, context)
        return hidden[:first], hidden[first:]

    def _hidden(self, tokens: Tensor, positions: Tensor, context: StepContext) -> Tensor:
        """Run the model on the rows of `context`; returns their hidden states [rows, D]."""
        with self._entered(context):
            rows, cache = context.mask_rows, self.cache
            return self.idlm.hidden(tokens[None], positions[None], None, rows, cache)[0]

    @contextmanager
    def _entered(self, context: StepContext) -> Iterator[None]:
        """Set attention, gate and products for model code that runs on the rows of `context`."""
        if context.segments:
            self.cache.prepare(context.segments, self.idlm.entry)
        gate, linears, adapter = self.idlm.gate or Gate(), self.products.linears, context.adapter
        drafting: AbstractContextManager[None] = nullcontext()
        if adapter is not None:
            gate.adapter = adapter
            if linears is not None and linears.drafts:
                gate.merged, drafting = True, linears.drafting(adapter)
        try:
            with drafting:
                yield
        finally:
            gate.merged = False

    def _verify(
        self,
        key: StepKey,
        slots: Tensor,
        state: State,
        logits: Tensor,
        drafts: Drafts,
        guided: Guided,
    ) -> Verified:
        """Verify the drafts by the slots' laws, and choose the tokens that follow."""
        features = key.features
        law, own = Law(select(self.settings, slots, features), features, *self.rules), logits
        if guided is not None:
            logits = guided.restrict(logits, drafts.tokens, drafts.valid)
        if features.ratio and drafts.tokens.shape[1]:
            matched = None if self.lookup is None else state.matched
            drafts = drafts._replace(log_q=self.slots.laws(slots, drafts.tokens, matched))
        verdict = self.verify(law, logits, drafts, state.length)
        logits = own if key.raw_logprobs else logits
        return Verified(slots, state, law, logits, drafts.valid, verdict, guided)

    def _commit(
        self, key: StepKey, verified: Verified, mask_hidden: Tensor | None, served: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Commit the verdict and draft from `mask_hidden` [B, K, D]. Slots that are not `served`
        [B] get no drafts. Returns `packed` and `logprobs` of `StepResult`."""
        state, tokens = verified.state, verified.verdict.tokens
        keep, ended = self._cut(verified)
        count = keep.sum(dim=1)
        length = state.length + count
        alive = state.alive & ~ended & (length < state.limit)
        last = tokens.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        pending = torch.where(count > 0, last, state.pending)
        top = self._logprobs(key, verified)
        if key.features.historic:
            verified.law.settings.record(tokens, count)
            store(self.settings, verified.slots, verified.law.settings)
        self.slots.write(verified.slots, length=length, pending=pending, alive=alive)
        self._draft(key, verified, mask_hidden, served, length)
        if self.lookup is not None:
            self.lookup.draft(verified.slots, state, tokens, length)
        left = self.slots.left(verified.slots)
        counts = [count, verified.valid, verified.verdict.accepted, *left]
        return torch.cat([tokens, torch.stack(counts, dim=1)], dim=1), top

    def _cut(self, verified: Verified) -> tuple[Tensor, Tensor]:
        """The tokens [B, R] to commit, as flags: up to the limit and the first stop token, and
        before the first `NOTHING`; and whether there is one of these two [B]."""
        state, tokens = verified.state, verified.verdict.tokens
        index = torch.arange(tokens.shape[1], device=tokens.device)
        room = torch.minimum(verified.verdict.accepted + 1, state.limit - state.length)
        keep = (index < room[:, None]) & state.alive[:, None]
        nothing = tokens == NOTHING
        stop = self.slots.stops[verified.slots[:, None], tokens.clamp(min=0)]
        end = (stop | nothing) & keep
        ends_before = end.cumsum(dim=1) - end.to(torch.int64)
        return keep & ~nothing & (ends_before == 0), end.any(dim=1)

    def _draft(
        self,
        key: StepKey,
        verified: Verified,
        mask_hidden: Tensor | None,
        served: Tensor | None,
        position: Tensor,
    ) -> None:
        """Draw the drafts of the tokens from `position` [B] on, and write them to the slots."""
        slots, state = verified.slots, verified.state
        if mask_hidden is None or served is None:
            self.slots.write(slots, valid=torch.zeros_like(verified.valid))
            return
        guided, allow = verified.guided, None
        if guided is not None:
            allow = guided.allow(verified.verdict.tokens, position - state.length)
        adapter = state.adapter[:, None].expand(-1, mask_hidden.shape[1]).flatten()
        with self._entered(StepContext(adapter=adapter)):
            logits = self.idlm.head(mask_hidden)
        chained = chain(self.idlm, self.slots.state, slots, logits, mask_hidden)
        drafts, log_q = draft(verified.law, logits, position, allow, chained)
        depth = drafts.shape[1]
        drafts = torch.cat([drafts, state.drafts[:, depth:]], dim=1)  # of a wider plan: unused
        self.slots.write(slots, valid=(state.drafting & served) * depth, drafts=drafts)
        if key.features.ratio and log_q is not None:
            self.slots.keep_laws(slots, log_q)

    def _logprobs(self, key: StepKey, verified: Verified) -> tuple[Tensor, ...]:
        if key.logprobs is None:
            return ()
        tokens, position = verified.verdict.tokens, verified.state.length
        if key.raw_logprobs:
            return report(verified.law.raw_log_p(verified.logits), tokens, key.logprobs)
        return logprobs(verified.law, verified.logits, tokens, position, key.logprobs)


def _chosen(
    tables: WindowTables, verified: Verified, mask_hidden: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The hidden states [B, K, D] of the MASK rows of each slot's outcome, and whether the outcome
    has a branch [B]; None without MASK rows."""
    if not tables.mask_rows:
        return None, None
    group = tables.group[verified.valid, verified.verdict.accepted]
    by_group = mask_hidden.unflatten(0, (-1, tables.num_groups, tables.num_masks))
    index = group.clamp(min=0)[:, None, None, None].expand(-1, 1, *by_group.shape[2:])
    return by_group.gather(1, index)[:, 0], group >= 0
