"""`Slots`: the state of the running requests, on the device, one row each; requests do not move
while they run.

    x_0 ... x_{n-2}    in the KV pages that the slot's page table names x_{n-1}            the
    pending token d_1 .. d_valid     the drafts, claims of the tokens at n, n+1, ...; what lies past
    them is left over

The last row is spare: it is never alive, its page table names the trash page alone, and it stands
in where a step of fixed size has fewer requests.

Shapes: B slots, K drafts, M page-table columns, V logit columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from idlm.decoding.settings import Features, Settings, on_device
from idlm.engine.request import Request


@dataclass(frozen=True)
class State:
    """The rows of some slots.

    Attributes:
        length: int64 [B], n; pending: int64 [B].
        limit: int64 [B], the length at which the request ends.
        alive: bool [B], still decoding, as the device knows it.
        drafting: bool [B], wants drafts; False is plain AR.
        drafts: int64 [B, K]; valid: int64 [B], how many of them stand for anything.
        adapter: int64 [B], which adapter drafts.
        table: int64 [B, M], the page of each stretch of positions.
    """

    length: Tensor
    pending: Tensor
    limit: Tensor
    alive: Tensor
    drafting: Tensor
    drafts: Tensor
    valid: Tensor
    adapter: Tensor
    table: Tensor


class Slots:
    """All rows, and how they are read and written.

    Attributes:
        stops: bool [B, V], the tokens that end each request.
        log_q: [B, K, V], the laws the drafts were drawn from; kept only once a request asks for the
            ratio rule.
    """

    def __init__(
        self, number: int, depth: int, columns: int, vocab_size: int, device: torch.device
    ):
        rows = number + 1

        def whole(*shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=torch.int64, device=device)

        # a request's row is written at once: the numbers of all slots are columns of two tables
        self._numbers = torch.tensor([1, 0, 1, 0, 0], device=device).repeat(rows, 1)
        self._flags = torch.zeros(rows, 2, dtype=torch.bool, device=device)
        length, pending, limit, valid, adapter = self._numbers.unbind(1)
        alive, drafting = self._flags.unbind(1)
        self.spare = number
        self.log_q: Tensor | None = None
        self.state = State(
            length,
            pending,
            limit,
            alive,
            drafting,
            whole(depth),
            valid,
            adapter,
            table=whole(columns),
        )
        self.stops = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def put(self, request: Request) -> None:
        """Seat a request: its committed tokens, the last of which is pending, its end and pages."""
        slot, text, pages = request.slot, request.text, request.pages
        assert slot is not None  # noqa: S101
        table, device = self.state.table[slot], self.state.table.device
        numbers = [len(text), text[-1], request.limit, 0, request.adapter]
        self._numbers[slot] = staged(numbers, device)
        self._flags[slot] = staged([True, request.drafting], device).bool()
        table.copy_(staged([*pages, *[0] * (len(table) - len(pages))], device))
        stops = staged(sorted(request.stop_ids), device)
        self.stops[slot].fill_(False).index_fill_(0, stops, True)

    def clear(self, slot: int) -> None:
        """Free a slot: a step still under way writes to the trash page and commits nothing."""
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
        """Copies of the rows [B]; of their page tables only the columns [M]."""
        taken = {
            field.name: getattr(self.state, field.name).index_select(0, rows)
            for field in fields(State)
        }
        return State(**taken | {"table": taken["table"].index_select(1, columns)})

    def write(self, rows: Tensor, **values: Tensor) -> None:
        """Put rows back, in place."""
        for name, value in values.items():
            getattr(self.state, name).index_copy_(0, rows, value)

    def keep_laws(self, rows: Tensor, log_q: Tensor) -> None:
        """Remember what the drafts of the slots `rows` were drawn from, [B, K, V]."""
        assert self.log_q is not None  # noqa: S101
        depth = log_q.shape[1]
        self.log_q.index_copy_(
            0, rows, torch.cat([log_q, self.log_q.index_select(0, rows)[:, depth:]], dim=1)
        )


def staged(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The numbers as int64 on the device."""
    return on_device(torch.tensor(numbers, dtype=torch.int64), device)


def select(settings: Settings, rows: Tensor, features: Features) -> Settings:
    """The settings of some slots, copied; `steps` is about the vocabulary and stays.

    Of what is as large as the logits, only what the `features` need.
    """
    needed = {
        "bias": features.biased,
        "stop": features.held,
        "seen": features.penalised,
        "counts": features.penalised,
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
    """Put the history of some slots back."""
    for all_slots, some in ((settings.seen, changed.seen), (settings.counts, changed.counts)):
        if all_slots is not None and some is not None:
            all_slots.index_copy_(0, rows, some)
