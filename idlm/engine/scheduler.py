"""`Scheduler`: gives slots and pages to requests, and decides what each step prefills.

    waiting -> prefilling -> decoding -> ended
       ^____________|____________|
              pre-empted: it loses its pages; its text is prefilled again later

Requests of a priority are served in the order of arrival. A pre-empted request keeps its order, so
it comes back before later requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from idlm.engine.pages import TRASH, PagePool, chain
from idlm.engine.prefill import Chunk
from idlm.engine.request import Request

AHEAD = 4
"""The pages that a growing request gets at once if enough are free."""


class Scheduler:
    """The slots, pages and states of all requests, on the host.

    Args:
        slots: the most running requests.
        pool: the pages of the KV cache.
        root: the start of all prefix-cache keys; it identifies the weights.
        window: if every layer has a sliding window the largest of them: pages before it are freed.

    Attributes:
        prefilling, decoding: the running requests, in the order in which they came to the list.
    """

    def __init__(self, slots: int, pool: PagePool, root: bytes, window: int | None = None) -> None:
        self.pool = pool
        self.root = root
        self.window = window
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._free_slots = list(range(slots - 1, -1, -1))
        self._waiting: list[tuple[tuple[int, int], Request]] = []

    @property
    def waiting(self) -> int:
        """The number of requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> list[Request]:
        """The requests that have a slot."""
        return [*self.prefilling, *self.decoding]

    def columns(self, tokens: int) -> int:
        """The number of pages that `tokens` tokens need."""
        return -(-tokens // self.pool.page_size)

    def wait(self, request: Request) -> None:
        """Queue a request by its order."""
        heapq.heappush(self._waiting, (request.order, request))

    def admit(self) -> Request | None:
        """Seat the next request if a slot is free and there are pages for its text. Pages of the
        prefix cache are used first."""
        if not self._waiting or not self._free_slots:
            return None
        request = self._waiting[0][1]
        text = request.text
        cached: list[int] = []
        if request.params.prompt_logprobs is None:  # these need all hidden states
            cached = self.pool.match(self._keys(request, len(text) - 1))
        missing = self.columns(len(text)) - len(cached)
        if not self.pool.can_allocate(missing):
            self.pool.release(cached)
            return None
        heapq.heappop(self._waiting)
        request.pages = cached + self.pool.allocate(missing)
        request.computed = len(cached) * self.pool.page_size
        if not request.result.token_ids:
            request.result.cached_tokens = request.computed
        request.slot = self._free_slots.pop()
        self.prefilling.append(request)
        return request

    def lacks(self, request: Request, tokens: int) -> bool:
        """Whether the request needs more pages to reach `tokens` tokens, or its limit if that is
        less."""
        return min(tokens, request.limit) > len(request.pages) * self.pool.page_size

    def grow(self, request: Request, tokens: int) -> list[tuple[int, int, int]] | None:
        """Give a request the pages that it lacks for `tokens` tokens; returns them as (slot,
        column, page), or None if there are too few.

        If many pages are free, a request that lacks any gets up to `AHEAD`, so that few steps have
        to change page tables.
        """
        assert request.slot is not None  # noqa: S101
        held = len(request.pages)
        missing = max(0, self.columns(min(tokens, request.limit)) - held)
        if missing and self.pool.free >= AHEAD * len(self.running):
            missing = max(missing, min(AHEAD, self.columns(request.limit) - held))
        if not self.pool.can_allocate(missing):
            return None
        fresh = self.pool.allocate(missing)
        request.pages += fresh
        return [(request.slot, held + index, page) for index, page in enumerate(fresh)]

    def trim(self, request: Request) -> list[tuple[int, int, int]]:
        """Release a request's pages that are wholly before every layer's sliding window at the
        lowest position still to be computed. Returns their entries of the page table, which now
        have the trash page; see `grow`."""
        if self.window is None:
            return []
        assert request.slot is not None  # noqa: S101
        position = request.length - 1 if request in self.decoding else request.computed
        first = max(request.trimmed, (position + 1 - self.window) // self.pool.page_size)
        gone = range(request.trimmed, first)
        if gone:
            self.publish(request, position)
            self.pool.release([request.pages[column] for column in gone])
            request.pages[gone.start : gone.stop] = [TRASH] * len(gone)
            request.trimmed = first
        return [(request.slot, column, TRASH) for column in gone]

    def victim(self) -> Request:
        """The request to pre-empt: the last running request in the order."""
        return max(self.running, key=lambda request: request.order)

    def chunks(self, budget: int) -> list[tuple[Request, Chunk]]:
        """The chunks of the next step, at most `budget` tokens in all. A request whose remaining
        prefill is just its last token moves to `decoding` in this step."""
        work = []
        for request in list(self.prefilling):
            assert request.slot is not None  # noqa: S101
            text, start = request.text, request.computed
            size = min(len(text) - 1 - start, budget)
            if size:
                work.append((request, Chunk(request.slot, text[start : start + size], start)))
            request.computed += size
            budget -= size
            if request.computed < len(text) - 1:
                break
            self.prefilling.remove(request)
            self.decoding.append(request)
            self.publish(request, request.computed)
        return work

    def publish(self, request: Request, tokens: int) -> None:
        """Publish the full pages that the request holds of its first `tokens` tokens, which must
        be computed."""
        keys = self._keys(request, tokens)[request.trimmed :]
        for page, key in zip(request.pages[request.trimmed :], keys, strict=False):
            self.pool.publish(page, key)

    def _keys(self, request: Request, tokens: int) -> list[bytes]:
        """The hashes of the full pages of the request's first `tokens` tokens. They are kept in the
        request, so that each page is hashed once."""
        size, known = self.pool.page_size, request.page_keys
        if tokens // size > len(known):
            root = known[-1] if known else self.root + request.salt
            known += chain(request.text[len(known) * size : tokens], size, root)
        return known[: tokens // size]

    def leave(self, request: Request) -> int | None:
        """Remove a request, whether it waits or runs; returns its slot, if any. Its full computed
        pages stay in the prefix cache."""
        if request.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[1] is not request]
            heapq.heapify(self._waiting)
            return None
        decoding = request in self.decoding
        (self.decoding if decoding else self.prefilling).remove(request)
        # the last token is pending: its keys and values are not in the cache
        self.publish(request, request.length - 1 if decoding else request.computed)
        self.pool.release(request.pages[request.trimmed :])
        slot, request.slot, request.pages = request.slot, None, []
        request.computed = request.trimmed = request.matched = 0
        self._free_slots.append(slot)
        return slot

    def preempt(self, request: Request) -> int | None:
        """Take a request's slot and pages and queue it again; returns the slot."""
        slot = self.leave(request)
        self.wait(request)
        return slot

    def check(self) -> None:
        """Check that slots and pages are consistent.

        Raises:
            RuntimeError: a slot is taken twice, or both taken and free; or the number of live pages
                is not that of the running requests.
        """
        self.pool.check()
        seated = [request.slot for request in self.running]
        if len(set(seated)) != len(seated) or set(seated) & set(self._free_slots):
            raise RuntimeError(f"slots {seated} are taken and {self._free_slots} free")
        held = {page for request in self.running for page in request.pages[request.trimmed :]}
        if len(held) != self.pool.live:
            raise RuntimeError(f"{self.pool.live} pages are live and requests hold {len(held)}")


def longest(requests: Sequence[Request]) -> int:
    """The number of tokens of the longest text."""
    return max(request.length for request in requests)
