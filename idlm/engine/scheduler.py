"""`Scheduler`: who waits, who sits in which slot, who holds which pages. It decides; it launches
nothing.

    waiting -> prefilling -> decoding -> gone
       ^____________|____________|
              pre-empted: its pages are taken, its text is prefilled again later

First come, first served within a priority. A request keeps its place in the order when it is
pre-empted, so it is the first to come back.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from idlm.engine.pages import PagePool, chain
from idlm.engine.prefill import Chunk
from idlm.engine.request import Request

AHEAD = 4
"""Pages that a growing request gets at once, where they are free."""


class Scheduler:
    """The host's picture of slots and pages.

    Args:
        slots: the most requests at once.
        pool: the pages.
        root: what the prefix cache's keys start from; names the weights.

    Attributes:
        prefilling, decoding: who sits, in the order they came in.
    """

    def __init__(self, slots: int, pool: PagePool, root: bytes) -> None:
        self.pool = pool
        self.root = root
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self._free_slots = list(range(slots - 1, -1, -1))
        self._waiting: list[tuple[tuple[int, int], Request]] = []

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def running(self) -> list[Request]:
        """Who has a slot."""
        return [*self.prefilling, *self.decoding]

    def columns(self, tokens: int) -> int:
        """Pages that `tokens` tokens need."""
        return -(-tokens // self.pool.page_size)

    def wait(self, request: Request) -> None:
        """Queue a request."""
        heapq.heappush(self._waiting, (request.order, request))

    def admit(self) -> Request | None:
        """Seat the next request, if there are a slot and pages for its text, cached ones too."""
        if not self._waiting or not self._free_slots:
            return None
        request = self._waiting[0][1]
        text = request.text
        cached: list[int] = []
        if request.params.prompt_logprobs is None:  # those need every row computed
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
        """Whether a text of `tokens` tokens, or as long as it may become, needs more pages than it
        has."""
        return min(tokens, request.limit) > len(request.pages) * self.pool.page_size

    def grow(self, request: Request, tokens: int) -> list[tuple[int, int, int]] | None:
        """The pages that it lacks for `tokens` tokens, as (slot, column, page); None where there
        are not enough.

        Where plenty are free it gets `AHEAD` at once, so that few steps have pages to map.
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

    def victim(self) -> Request:
        """Whose pages to take: the last in the order."""
        return max(self.running, key=lambda request: request.order)

    def chunks(self, budget: int) -> list[tuple[Request, Chunk]]:
        """Prefill work of at most `budget` tokens; who lacks only its last token after it decodes
        from this step on."""
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
        """Make the full pages of its first `tokens` tokens, all computed, findable for others."""
        for page, key in zip(request.pages, self._keys(request, tokens), strict=False):
            self.pool.publish(page, key)

    def _keys(self, request: Request, tokens: int) -> list[bytes]:
        """Of the full pages of its first `tokens` tokens; each is hashed once, however long the
        request waits."""
        size, known = self.pool.page_size, request.page_keys
        if tokens // size > len(known):
            root = known[-1] if known else self.root + request.salt
            known += chain(request.text[len(known) * size : tokens], size, root)
        return known[: tokens // size]

    def leave(self, request: Request) -> int | None:
        """Take a request out, wherever it is; returns its slot. What it has computed stays in the
        prefix cache."""
        if request.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[1] is not request]
            heapq.heapify(self._waiting)
            return None
        decoding = request in self.decoding
        (self.decoding if decoding else self.prefilling).remove(request)
        # the last token's keys are written by the step that would have come next
        self.publish(request, request.length - 1 if decoding else request.computed)
        self.pool.release(request.pages)
        slot, request.slot, request.pages, request.computed = request.slot, None, [], 0
        self._free_slots.append(slot)
        return slot

    def preempt(self, request: Request) -> int | None:
        """Take its slot and pages and let it wait again; returns the slot."""
        slot = self.leave(request)
        self.wait(request)
        return slot

    def check(self) -> None:
        """Check that slots and pages are all accounted for.

        Raises:
            RuntimeError: one is lost, held twice or held by nobody.
        """
        self.pool.check()
        seated = [request.slot for request in self.running]
        if len(set(seated)) != len(seated) or set(seated) & set(self._free_slots):
            raise RuntimeError(f"slots {seated} are taken and {self._free_slots} free")
        held = {page for request in self.running for page in request.pages}
        if len(held) != self.pool.live:
            raise RuntimeError(f"{self.pool.live} pages are live and requests hold {len(held)}")


def longest(requests: Sequence[Request]) -> int:
    """Tokens of the longest text."""
    return max(request.length for request in requests)
