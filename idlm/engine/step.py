"""One step, as tensor operations of static shape: forward, verification, state update. Nothing
waits for the device.

    1. read the slots' rows; lay out their windows, and the pieces of prompts that this step
       prefills
    2. one forward over all these rows
    3. the head on the verify rows; the verdict: how many drafts stand, and the token after them
    4. commit: cut at the request's limit and at its first stop token; the last token committed
       becomes pending
    5. the head on the masks of that very outcome: the next drafts

A prompt's last token is not prefilled: it is the pending token of its slot's first window, which
has no drafts to verify. That window may be in the forward that prefills the rest.

Shapes: B slots, K drafts, R = 1 + K verify rows, G groups of K masks, P pieces of T prompt tokens
in all, D hidden size, V logit columns, M columns of the page table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from idlm.attention.base import Segment
from idlm.decoding.law import Law
from idlm.decoding.noise import Stream, uniform
from idlm.decoding.plan import Plan
from idlm.decoding.settings import Features, Settings
from idlm.decoding.verify import Drafts, Verdicts, draft, logprobs, verify
from idlm.decoding.window import window
from idlm.engine.guide import GuidedRows
from idlm.engine.kv_cache import KVCache
from idlm.engine.prefill import PrefillBatch
from idlm.engine.slots import Slots, State, select, store
from idlm.kernels.batch_invariant import batch_invariant
from idlm.kernels.choose import chooser
from idlm.kernels.fused import OPERATORS
from idlm.kernels.linears import Linears
from idlm.models.gated_lora import NO_ROWS, Gate
from idlm.models.idlm_model import Idlm

Guided = GuidedRows | None  # the guides of a step's slots, if any has one


@dataclass(frozen=True)
class Kind:
    """What is static about a step: the plan, which parts of the law its requests use, how many
    logprobs they want."""

    plan: Plan
    features: Features
    logprobs: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step tells the host.

    Attributes:
        packed: int64 [B, R + 4]: R tokens, how many of them are committed, the drafts looked at,
            those accepted, and whether the request goes on.
        logprobs: of the R tokens, if asked for; see `idlm.decoding.verify.logprobs`.
        prompt: hidden states [T, D] of the pieces of prompts, for prompt logprobs.
    """

    packed: Tensor
    logprobs: tuple[Tensor, ...] = ()
    prompt: Tensor | None = None


class Layout:
    """A plan's window tables on the device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        layout = window(plan.stride, plan.branches)
        self.stride, self.masks, self.groups = layout.stride, layout.masks, layout.groups
        self.mask_rows = layout.mask_rows
        tables = (layout.offsets, layout.visible, layout.group)
        self.offsets, self.visible, self.group = (table.to(device) for table in tables)


@dataclass(frozen=True)
class Slate:
    """What is known of the slots `rows` once their drafts have been judged.

    Attributes:
        verdict: the judgement; logits [B, R, V] it was made from; valid [B], the drafts looked at.
    """

    rows: Tensor
    state: State
    law: Law
    logits: Tensor
    valid: Tensor
    verdict: Verdicts
    guided: Guided


class Core:
    """The model, the pages and the slots: what every step works on.

    Attributes:
        simulated: acceptance by depth that replaces the verification, for shapes without trained
            weights.
        linears: the kernels that multiply by the linear layers' weights; None where PyTorch does.
        fused: the operators that recordings use the C kernels for.
        kernels: a context for every step; batch-invariant kernels where results must not depend on
            the batch.
        chooser: what chooses tokens on the model's device.
    """

    def __init__(
        self,
        idlm: Idlm,
        cache: KVCache,
        slots: Slots,
        settings: Settings,
        simulated: Sequence[float] | None = None,
        deterministic: bool = False,
        linears: Linears | None = None,
        fused: frozenset[str] = OPERATORS,
    ) -> None:
        self.linears, self.fused = linears, fused
        self.idlm, self.cache, self.slots, self.settings = idlm, cache, slots, settings
        self.simulated = None if simulated is None else torch.tensor(simulated, device=idlm.device)
        self.kernels = batch_invariant if deterministic else nullcontext
        self.chooser = chooser(idlm.device)
        self._layouts: dict[Plan, Layout] = {}

    def layout(self, plan: Plan) -> Layout:
        """The tables of a plan, moved to the device once."""
        if plan not in self._layouts:
            self._layouts[plan] = Layout(plan, self.idlm.device)
        return self._layouts[plan]

    def written(self) -> list[Tensor]:
        """Every tensor that a step writes to and a later one reads."""
        optional = (self.slots.log_q, self.settings.seen, self.settings.counts)
        state = [getattr(self.slots.state, field.name) for field in fields(State)]
        return [*self.cache.pages, *state, *(tensor for tensor in optional if tensor is not None)]

    def _products(self) -> AbstractContextManager[None]:
        return nullcontext() if self.linears is None else self.linears.use()

    def step(
        self,
        kind: Kind,
        rows: Tensor,
        columns: Tensor,
        prompts: PrefillBatch | None = None,
        guided: Guided = None,
    ) -> Outcome:
        """One window for each of the slots `rows` [B], and the pieces of `prompts`.

        The slots' texts lie in the first `columns` [M] of their page tables.
        """
        with self.kernels(), self._products():
            return self._step(kind, rows, columns, prompts, guided)

    def prefill(self, prompts: PrefillBatch) -> Tensor:
        """The pieces alone; returns their hidden states [T, D]."""
        with self.kernels(), self._products():
            self.cache.prepare([self._pieces(prompts)])
            tokens, positions = prompts.tokens[None], prompts.positions[None]
            return self.idlm.hidden(tokens, positions, None, NO_ROWS, self.cache)[0]

    def _step(
        self,
        kind: Kind,
        rows: Tensor,
        columns: Tensor,
        prompts: PrefillBatch | None,
        guided: Guided,
    ) -> Outcome:
        layout, state = self.layout(kind.plan), self.slots.read(rows, columns)
        valid, prefix = state.valid.clamp(max=layout.masks), state.length - 1
        positions = prefix[:, None] + layout.offsets.index_select(0, valid)
        real = positions[:, : layout.stride]
        drafts = state.drafts[:, : layout.masks]
        visible = layout.visible.index_select(0, valid)
        segments = [self.cache.windows(state.table, prefix, visible, real, layout.mask_rows)]
        tokens, places = (
            torch.cat([state.pending[:, None], drafts], dim=1).flatten(),
            real.flatten(),
        )
        if prompts is not None:
            segments.insert(0, self._pieces(prompts))
            tokens, places = (
                torch.cat([prompts.tokens, tokens]),
                torch.cat([prompts.positions, places]),
            )
        self.cache.prepare(segments)
        hidden, masks = self._forward(
            tokens, places, positions[:, layout.stride :].flatten(), state.adapter
        )
        prompt = None
        if prompts is not None:
            first = prompts.tokens.shape[0]
            prompt, hidden = hidden[:first], hidden[first:]
        logits = self.idlm.head(hidden).unflatten(0, (-1, layout.stride))
        slate = self._judge(kind, rows, state, logits, drafts, valid, guided)
        packed, chances = self._commit(kind, slate, *_chosen(layout, slate, masks))
        return Outcome(packed, chances, prompt)

    def _pieces(self, prompts: PrefillBatch) -> Segment:
        """What the rows of pieces see: the tokens before them, in their slots' pages and in the
        pieces themselves."""
        table = self.slots.state.table.index_select(0, prompts.slots).index_select(
            1, prompts.columns
        )
        return self.cache.pieces(table, prompts)

    def _forward(
        self, tokens: Tensor, real: Tensor, masks: Tensor, adapter: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of real rows [., D] and of MASK rows [., D], the rows given as tokens and
        positions."""
        if not masks.shape[0]:
            return self.idlm.hidden(tokens[None], real[None], None, NO_ROWS, self.cache)[0], masks
        first = real.numel()
        tokens = torch.cat([tokens, torch.full_like(masks, self.idlm.mask_id)])
        positions = torch.cat([real, masks])
        with self._drafting(
            adapter[:, None].expand(-1, masks.numel() // adapter.numel()).flatten()
        ):
            rows = slice(first, positions.numel())
            hidden = self.idlm.hidden(tokens[None], positions[None], None, rows, self.cache)[0]
        return hidden[:first], hidden[first:]

    @contextmanager
    def _drafting(self, adapter: Tensor) -> Iterator[None]:
        """For model code that has MASK rows; `adapter` [MASK rows] says whose."""
        gate, own = self.idlm.gate or Gate(), self.linears is not None and self.linears.drafts
        gate.adapter, gate.merged = adapter, own
        try:
            with (
                self.linears.drafting(adapter)
                if self.linears is not None and own
                else nullcontext()
            ):
                yield
        finally:
            gate.merged = False

    def _judge(
        self,
        kind: Kind,
        rows: Tensor,
        state: State,
        logits: Tensor,
        drafts: Tensor,
        valid: Tensor,
        guided: Guided,
    ) -> Slate:
        """The verdict on `drafts` [B, K], of which `valid` [B] count."""
        law = Law(select(self.settings, rows, kind.features), kind.features, self.chooser)
        logits = logits if guided is None else guided.restrict(logits, drafts, valid)
        log_q = self.slots.log_q
        if log_q is not None:
            log_q = (
                log_q.index_select(0, rows)[:, : drafts.shape[1]]
                if kind.features.ratio and drafts.shape[1]
                else None
            )
        verdict = verify(law, logits, Drafts(drafts, valid, log_q), state.length)
        if self.simulated is not None:
            verdict = self._simulate(verdict, drafts, valid, state.length, law.settings.keys)
        return Slate(rows, state, law, logits, valid, verdict, guided)

    def _commit(
        self, kind: Kind, slate: Slate, masks: Tensor | None, served: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Commit the verdict and draft from `masks` [B, K, D], which the slots `served` [B] have;
        see `Outcome`."""
        state, tokens = slate.state, slate.verdict.tokens
        keep, ended = self._cut(slate)
        number = keep.sum(dim=1)
        length = state.length + number
        alive = state.alive & ~ended & (length < state.limit)
        pending = torch.where(
            number > 0, tokens.gather(1, (number - 1).clamp(min=0)[:, None])[:, 0], state.pending
        )
        chances = self._logprobs(kind, slate)
        if kind.features.penalised:
            slate.law.settings.record(tokens, number)
            store(self.settings, slate.rows, slate.law.settings)
        self.slots.write(slate.rows, length=length, pending=pending, alive=alive)
        self._draft(kind, slate, masks, served, length)
        columns = torch.stack(
            [number, slate.valid, slate.verdict.accepted, alive.to(torch.int64)], dim=1
        )
        return torch.cat([tokens, columns], dim=1), chances

    def _cut(self, slate: Slate) -> tuple[Tensor, Tensor]:
        """Which tokens [B, R] are committed, up to the limit and the first stop token; and whether
        that came [B]."""
        state, tokens = slate.state, slate.verdict.tokens
        index = torch.arange(tokens.shape[1], device=tokens.device)
        room = torch.minimum(slate.verdict.accepted + 1, state.limit - state.length)
        keep = (index < room[:, None]) & state.alive[:, None]
        stop = self.slots.stops[slate.rows[:, None], tokens] & keep
        before = stop.cumsum(dim=1) - stop.to(torch.int64)
        return keep & (before == 0), stop.any(dim=1)

    def _draft(
        self, kind: Kind, slate: Slate, masks: Tensor | None, served: Tensor | None, first: Tensor
    ) -> None:
        """Write the drafts of the tokens from position `first` [B] on."""
        if masks is None or served is None:
            self.slots.write(slate.rows, valid=torch.zeros_like(slate.valid))
            return
        number = first - slate.state.length
        allow = None if slate.guided is None else slate.guided.allow(slate.verdict.tokens, number)
        with self._drafting(slate.state.adapter[:, None].expand(-1, masks.shape[1]).flatten()):
            logits = self.idlm.head(masks)
        drafts, log_q = draft(slate.law, logits, first, allow)
        good = slate.state.drafting & served
        depth = drafts.shape[1]
        whole = torch.cat([drafts, slate.state.drafts[:, depth:]], dim=1)
        self.slots.write(slate.rows, valid=good * depth, drafts=whole)
        if kind.features.ratio and log_q is not None:
            self.slots.keep_laws(slate.rows, log_q)

    def _logprobs(self, kind: Kind, slate: Slate) -> tuple[Tensor, ...]:
        tokens, first, top = slate.verdict.tokens, slate.state.length, kind.logprobs
        return () if top is None else logprobs(slate.law, slate.logits, tokens, first, top)

    def _simulate(
        self, verdict: Verdicts, drafts: Tensor, valid: Tensor, first: Tensor, keys: Tensor
    ) -> Verdicts:
        """Accept draft k with chance `simulated[k]` (its last entry from there on), whatever the
        tokens."""
        assert self.simulated is not None  # noqa: S101
        depth = torch.arange(drafts.shape[1], device=drafts.device)
        chance = uniform(keys[:, Stream.ACCEPT], first[:, None] + depth)
        luck = chance < self.simulated[depth.clamp(max=len(self.simulated) - 1)]
        accepted = (luck & (depth < valid[:, None])).to(torch.int64).cumprod(dim=1).sum(dim=1)
        token = verdict.tokens[:, :1]
        tokens = torch.where(
            torch.arange(verdict.tokens.shape[1], device=token.device) < accepted[:, None],
            torch.cat([drafts, token], dim=1),
            token,
        )
        return verdict._replace(accepted=accepted, tokens=tokens)


def _chosen(layout: Layout, slate: Slate, masks: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The masks [B, K, D] of each slot's outcome, and which slots [B] have some; None under AR."""
    if not layout.masks:
        return None, None
    group = layout.group[slate.valid, slate.verdict.accepted]
    masks = masks.unflatten(0, (-1, layout.groups, layout.masks))
    index = group.clamp(min=0)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, index)[:, 0], group >= 0
