"""`PagePool`: the pages of the KV cache that requests hold, and those that the prefix cache finds.

Page 0 is the trash page: rows that are never read are written there. It is never allocated. Each
other page is in exactly one region:

    free      never used, or forgotten     allocate -> live live      1 or more requests hold it
    release  -> cached where it was published, else free cached    nobody holds it, findable
    match    -> live; evicted, the longest unused first -> live under a new owner

So free + cached + live == total at all times. A page is published once it is full of committed
tokens, which do not change any more. Its key is the hash of its tokens and of all tokens before
them (`chain`).

The pool only counts pages; keys and values are in `KVCache`. Its errors are bugs of the caller, not
errors of a user.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

TRASH = 0
DIGEST_BYTES = 16


def chain(tokens: Sequence[int], page_size: int, root: bytes) -> list[bytes]:
    """The hash of each full page of `tokens`: of its tokens and the hash before it.

    Args:
        root: identifies all that keys and values depend on apart from the tokens, such as the
            weights. To continue a chain: the hash of the page before the first of `tokens`.
    """
    hashes = [root]
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = array("q", tokens[start : start + page_size]).tobytes()
        hashes.append(blake2b(hashes[-1] + page, digest_size=DIGEST_BYTES).digest())
    return hashes[1:]


class PagePool:
    """Allocates the pages of one cache and counts their owners.

    Args:
        pages: P, the number of pages of the cache, including the trash page.
        page_size: the tokens of a page.

    Attributes:
        total: the pages that can be allocated, P - 1.
        evictions: how many cached pages have been evicted so far.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 2 or page_size < 1:
            raise ValueError(
                f"{pages} pages of {page_size} tokens; "
                "a pool needs the trash page, another, and a token"
            )
        self.page_size = page_size
        self.total = pages - 1
        self.evictions = 0
        self._free = list(range(self.total, TRASH, -1))
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """The number of pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """The number of pages without an owner that `match` can find."""
        return len(self._cached)

    @property
    def live(self) -> int:
        """The number of pages with at least one owner."""
        return len(self._references)

    def references(self, page: int) -> int:
        """The number of owners of a page."""
        return self._references.get(page, 0)

    def can_allocate(self, number: int) -> bool:
        return number <= self.free + self.cached

    def allocate(self, number: int) -> list[int]:
        """Allocate `number` pages for one owner. Cached pages are evicted if there are not enough
        free pages.

        Raises:
            RuntimeError: there are fewer free and cached pages. Nothing has changed.
        """
        if not self.can_allocate(number):
            raise RuntimeError(
                f"{number} pages wanted; {self.free} are free and {self.cached} cached"
            )
        pages = [self._free.pop() if self._free else self._evict() for _ in range(number)]
        self._references.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, page: int) -> None:
        """Add an owner to a live page."""
        self._references[self._live(page)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Release a request's pages, given in the order of their tokens. The last of them will be
        evicted first.

        Raises:
            ValueError: a page has fewer owners than it has entries in `pages`. Nothing has changed.
        """
        for page, number in Counter(pages).items():
            if number > self.references(page):
                raise ValueError(
                    f"page {page} released {number} times and held {self.references(page)} times"
                )
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                self._retire(page)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Find the pages of `hashes`, up to the first hash that no page has. The caller becomes an
        owner of each page returned."""
        pages: list[int] = []
        for page in map(self._page.get, hashes):
            if page is None:
                break
            pages.append(page)
            self._cached.pop(page, None)
            self._references[page] = self.references(page) + 1
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Make a live page, full of committed tokens, findable by its hash. If another page is
        published under the hash, `match` continues to find that page.

        Raises:
            ValueError: the page is not live, or is published under another hash.
        """
        if self._hash.get(self._live(page), key) != key:
            raise ValueError(
                f"page {page} is published under another hash; a full page does not change"
            )
        if self._page.setdefault(key, page) == page:
            self._hash[page] = key

    def check(self) -> None:
        """Check that each page is in exactly one region, and `match` finds the published pages.

        Raises:
            RuntimeError: the pool is inconsistent; the message says how.
        """
        regions = [*self._free, *self._cached, *self._references]
        if sorted(regions) != list(range(1, self.total + 1)):
            raise RuntimeError(
                f"free {self.free} + cached {self.cached} + live {self.live} "
                f"are not the {self.total} pages, each once"
            )
        if any(count < 1 for count in self._references.values()):
            raise RuntimeError(f"a live page is held by nobody: {self._references}")
        if {page: key for key, page in self._page.items()} != self._hash or len(self._page) != len(
            self._hash
        ):
            raise RuntimeError("the pages found by hash are not those published under it")
        if not set(self._cached) <= set(self._hash) or set(self._hash) & set(self._free):
            raise RuntimeError("a cached page cannot be found, or a free one can")

    def _live(self, page: int) -> int:
        if page not in self._references:
            raise ValueError(f"page {page} is held by nobody")
        return page

    def _evict(self) -> int:
        """Take the least recently used cached page and delete its hash."""
        page, _ = self._cached.popitem(last=False)
        del self._page[self._hash.pop(page)]
        self.evictions += 1
        return page

    def _retire(self, page: int) -> None:
        """Move a page without owners to the cached pages if it is published, else to the free."""
        del self._references[page]
        if page in self._hash:
            self._cached[page] = None
        else:
            self._free.append(page)
