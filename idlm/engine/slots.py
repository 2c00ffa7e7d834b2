"""`Slots`: the state of the running requests on the device, a row for each. A request keeps its row
while it runs.

    x_0 ... x_{n-2}    their keys and values are in the pages of the slot's page table
    x_{n-1}            the pending token
    d_1 .. d_valid     the valid drafts of the tokens at n, n + 1, ...; later drafts are left over

The last row is spare. It is never alive, and its page table has only the trash page. It fills the
rows of a step that has fewer requests than rows.

Shapes: B slots, K drafts, M page-table columns, V logit columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from idlm.decoding.settings import NEVER, Features, Settings, on_device
from idlm.engine.request import Request


@dataclass(frozen=True)
class State:
    """The rows of some slots.

    Attributes:
        length: int64 [B], n; pending: int64 [B].
        limit: int64 [B], the length at which the request ends.
        alive: bool [B], whether the request has not ended yet.
        drafting: bool [B], whether MASK rows draft; looking: bool [B], whether drafts are looked up
            in the request's text. Neither: plain AR.
        drafts: int64 [B, K]; valid: int64 [B], the number of valid drafts.
        adapter: int64 [B], the index of the adapter that drafts.
        matched: int64 [B], the length of the match that the drafts were looked up by; 0 if they
            were not.
        table: int64 [B, M], the page tables.
    """

    length: Tensor
    pending: Tensor
    limit: Tensor
    alive: Tensor
    drafting: Tensor
    looking: Tensor
    drafts: Tensor
    valid: Tensor
    adapter: Tensor
    matched: Tensor
    table: Tensor


class Slots:
    """The rows of all slots.

    Attributes:
        stops: bool [B, V], the tokens that end each request.
        log_q: [B, K of MASK rows, V], the laws that these drafts were drawn from; None until a
            request uses the ratio rule.
    """

    def __init__(
        self, number: int, depth: int, columns: int, vocab_size: int, device: torch.device
    ):
        rows = number + 1

        def whole(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=torch.int64, device=device)

        # fields are columns of two tables, so that a request's row is written in two copies
        self._numbers = torch.tensor([1, 0, 1, 0, 0, 0], device=device).repeat(rows, 1)
        self._flags = torch.zeros(rows, 3, dtype=torch.bool, device=device)
        length, pending, limit, valid, adapter, matched = self._numbers.unbind(1)
        alive, drafting, looking = self._flags.unbind(1)
        self.spare = number
        self.log_q: Tensor | None = None
        self.state = State(
            length,
            pending,
            limit,
            alive,
            drafting,
            looking,
            whole(depth),
            valid,
            adapter,
            matched,
            table=whole(columns),
        )
        self.stops = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def put(self, request: Request) -> None:
        """Write a request's state to its slot. The last token of its text is pending."""
        slot, text, pages = request.slot, request.text, request.pages
        assert slot is not None  # noqa: S101
        table, device = self.state.table[slot], self.state.table.device
        numbers = [len(text), text[-1], request.limit, 0, request.adapter, 0]
        self._numbers[slot] = staged(numbers, device)
        flags = [True, request.drafting, request.looking]
        self._flags[slot] = staged(flags, device).bool()
        table.copy_(staged([*pages, *[0] * (len(table) - len(pages))], device))
        stops = staged(sorted(request.stop_ids), device)
        self.stops[slot].fill_(False).index_fill_(0, stops, True)

    def clear(self, slot: int) -> None:
        """Free a slot. Later steps on it write to the trash page and commit nothing."""
        self.state.alive[slot].fill_(False)
        self.state.table[slot].fill_(0)

    def map_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Write (slot, column, page) entries into the page tables."""
        if entries:
            numbers = staged(
                [number for entry in entries for number in entry], self.state.table.device
            )
            slot, column, page = numbers.view(-1, 3).unbind(1)
            self.state.table[slot, column] = page

    def read(self, rows: Tensor, columns: Tensor) -> State:
        """Copy the rows [B] of the state, and of their page tables only the `columns`."""
        taken = {
            field.name: getattr(self.state, field.name).index_select(0, rows)
            for field in fields(State)
        }
        return State(**taken | {"table": taken["table"].index_select(1, columns)})

    def write(self, rows: Tensor, **values: Tensor) -> None:
        """Write fields of the slots `rows` in place; `values` are by the name of the field."""
        for name, value in values.items():
            getattr(self.state, name).index_copy_(0, rows, value)

    def left(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the drafts left for the next windows of the slots `rows` [B]: `matched` [B], and the
        first draft [B], which is 0 where nothing is ever drafted."""
        matched, drafts = self.state.matched, self.state.drafts
        first = drafts[:, 0] if drafts.shape[1] else torch.zeros_like(matched)
        return matched.index_select(0, rows), first.index_select(0, rows)

    def laws(self, rows: Tensor, drafts: Tensor, matched: Tensor | None) -> Tensor | None:
        """The laws [B, K, V] that the `drafts` [B, K] of the slots `rows` were drawn from: point
        masses where they were looked up. `matched` [B] is None if none ever are."""
        depth, kept = drafts.shape[1], self.log_q
        kept = None if kept is None else kept.index_select(0, rows)[:, :depth]
        if matched is None:
            return kept
        wide = (*drafts.shape, self.stops.shape[1])
        point = torch.full(wide, NEVER, dtype=torch.float64, device=drafts.device)
        point = point.scatter(2, drafts[..., None].clamp(0, wide[2] - 1), 0.0)
        if kept is None:
            return point
        # at depths that MASK rows never draw, all drafts were looked up
        kept = torch.cat([kept, point[:, kept.shape[1] :]], dim=1)
        return torch.where(matched[:, None, None] > 0, point, kept)

    def keep_laws(self, rows: Tensor, log_q: Tensor) -> None:
        """Store the laws [B, K, V] that the drafts of the slots `rows` were drawn from."""
        assert self.log_q is not None  # noqa: S101
        depth = log_q.shape[1]
        self.log_q.index_copy_(
            0, rows, torch.cat([log_q, self.log_q.index_select(0, rows)[:, depth:]], dim=1)
        )


def staged(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers as int64 on the device."""
    return on_device(torch.tensor(numbers, dtype=torch.int64), device)


def select(settings: Settings, rows: Tensor, features: Features) -> Settings:
    """Copy the settings of the slots `rows`. `steps` has no row per slot and is not copied.

    Tensors as large as the logits are copied only if the `features` need them.
    """
    needed = {
        "bias": features.biased,
        "stop": features.held,
        "seen": features.penalised,
        "counts": features.penalised,
        "words": features.worded,
        "recent": features.worded,
    }
    per_slot = {
        field.name: getattr(settings, field.name)
        for field in fields(Settings)
        if field.name != "steps"
    }
    taken: dict[str, Any] = {
        name: value.index_select(0, rows) if needed.get(name, True) else None
        for name, value in per_slot.items()
        if isinstance(value, Tensor)
    }
    return replace(settings, **taken)


def store(settings: Settings, rows: Tensor, changed: Settings) -> None:
    """Write the token history of the slots `rows` back to `settings`."""
    for name in ("seen", "counts", "recent"):
        all_slots, some = getattr(settings, name), getattr(changed, name)
        if all_slots is not None and some is not None:
            all_slots.index_copy_(0, rows, some)
