"""`PagePool` against an obvious model, and the hashes it is keyed by."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from idlm.engine.pages import DIGEST_BYTES, TRASH, PagePool, chain

PAGE = 3
HASHES = [bytes([number]) for number in range(6)]


class Against(RuleBasedStateMachine):
    """Random use of a pool beside a model: a list of owners, a map of what is findable, and an
    order of disuse."""

    @initialize(pages=st.integers(2, 9))
    def start(self, pages):
        self.pool = PagePool(pages, PAGE)
        self.total = pages - 1
        self.owners: list[list[int]] = []
        self.published: dict[bytes, int] = {}
        self.unused: list[int] = []
        self.evicted = 0

    def held(self, page):
        return sum(owner.count(page) for owner in self.owners)

    def live(self):
        return {page for owner in self.owners for page in owner}

    @rule(number=st.integers(0, 9))
    def allocate(self, number):
        room = self.total - len(self.live())
        assert self.pool.can_allocate(number) == (number <= room)
        if number > room:
            with pytest.raises(RuntimeError, match="pages wanted"):
                self.pool.allocate(number)
            return
        evicted = max(0, number - (room - len(self.unused)))
        pages = self.pool.allocate(number)
        gone = self.unused[:evicted]
        assert len(set(pages)) == number and TRASH not in pages
        assert not set(pages) & (self.live() | (set(self.unused) - set(gone)))
        self.unused = self.unused[evicted:]
        self.published = {key: page for key, page in self.published.items() if page not in gone}
        self.evicted += evicted
        self.owners.append(pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data):
        pages = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.release(pages)
        for page in reversed(pages):
            if not self.held(page) and page in self.published.values() and page not in self.unused:
                self.unused.append(page)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def share(self, data):
        page = data.draw(st.sampled_from(sorted(self.live())))
        self.pool.share(page)
        self.owners.append([page])

    @precondition(lambda self: self.live())
    @rule(data=st.data(), key=st.sampled_from(HASHES))
    def publish(self, data, key):
        page = data.draw(st.sampled_from(sorted(self.live())))
        known = [other for other, owner in self.published.items() if owner == page]
        if known and known != [key]:
            with pytest.raises(ValueError, match="another hash"):
                self.pool.publish(page, key)
        else:
            self.pool.publish(page, key)
            self.published.setdefault(key, page)

    @rule(keys=st.lists(st.sampled_from(HASHES), max_size=5, unique=True))
    def match(self, keys):
        expected = []
        for key in keys:
            if key not in self.published:
                break
            expected.append(self.published[key])
        assert self.pool.match(keys) == expected
        self.unused = [page for page in self.unused if page not in expected]
        self.owners.append(expected)

    @rule(page=st.integers(-1, 10))
    def touch_what_nobody_holds(self, page):
        if page in self.live():
            return
        for wrong in (lambda: self.pool.release([page]), lambda: self.pool.share(page)):
            with pytest.raises(ValueError, match="held"):
                wrong()
        with pytest.raises(ValueError, match="held by nobody"):
            self.pool.publish(page, HASHES[0])

    @invariant()
    def same_as_the_model(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.live == len(self.live())
        assert self.pool.cached == len(self.unused)
        assert self.pool.free + self.pool.cached + self.pool.live == self.pool.total == self.total
        assert all(self.pool.references(page) == self.held(page) for page in range(self.total + 1))
        assert self.pool.evictions == self.evicted


TestAgainstModel = Against.TestCase
TestAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_finished_request_is_found_again_until_its_pages_are_needed():
    pool = PagePool(6, PAGE)
    hashes = chain(range(9), PAGE, b"weights")
    pages = pool.allocate(4)
    for page, key in zip(pages, hashes, strict=False):
        pool.publish(page, key)
    pool.release(pages)
    assert (pool.free, pool.cached, pool.live) == (2, 3, 0)
    assert pool.match(hashes) == pages[:3]
    pool.release(pages[:3])
    pool.allocate(3)
    assert pool.evictions == 1
    assert pool.match(hashes) == pages[:2], "the end of a chain is evicted before its beginning"


def test_of_two_pages_with_the_same_tokens_one_is_kept():
    pool = PagePool(4, PAGE)
    first, second = pool.allocate(2)
    pool.publish(first, b"same")
    pool.publish(second, b"same")
    pool.release([first, second])
    assert (pool.free, pool.cached) == (2, 1)
    assert pool.match([b"same"]) == [first]


def test_a_release_of_too_much_changes_nothing():
    pool = PagePool(4, PAGE)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="released 2 times and held 1 times"):
        pool.release([*pages, pages[0]])
    assert pool.live == 2


@pytest.mark.parametrize("pages", [0, 1])
def test_a_pool_needs_a_page_beside_the_trash_page(pages):
    with pytest.raises(ValueError, match="needs the trash page"):
        PagePool(pages, PAGE)


@pytest.mark.parametrize(
    "breakage", ["lost", "twice", "swapped", "reference", "hash", "unfindable"]
)
def test_the_check_notices_a_broken_pool(breakage):
    pool = PagePool(6, PAGE)
    page, other = pool.allocate(2)
    pool.publish(page, b"key")
    pool.release([page])
    pool.check()
    if breakage == "lost":
        pool._free.pop()
    elif breakage == "twice":
        pool._free.append(page)
    elif breakage == "swapped":
        pool._free[0] = other
    elif breakage == "reference":
        pool._references[other] = 0
    elif breakage == "hash":
        pool._page[b"key"] = other
    else:
        del pool._hash[page], pool._page[b"key"]
    with pytest.raises(RuntimeError):
        pool.check()


tokens = st.lists(st.integers(0, 2**31), max_size=20)


@given(tokens, st.integers(1, 5))
def test_one_hash_for_each_full_page_and_none_for_the_rest(ids, size):
    hashes = chain(ids, size, b"root")
    assert len(hashes) == len(ids) // size == len(set(hashes))
    assert all(len(key) == DIGEST_BYTES for key in hashes)


@given(tokens, st.integers(1, 5), st.data())
def test_a_change_shows_from_its_page_on_and_not_before(ids, size, data):
    if not ids:
        return
    place = data.draw(st.integers(0, len(ids) - 1))
    changed = [*ids[:place], ids[place] + 1, *ids[place + 1 :]]
    for number, (old, new) in enumerate(
        zip(chain(ids, size, b"r"), chain(changed, size, b"r"), strict=True)
    ):
        assert (old == new) == (number < place // size)


@given(tokens, st.integers(1, 5), st.integers(0, 4))
def test_a_chain_goes_on_from_its_last_hash(ids, size, pages):
    whole = chain(ids, size, b"root")
    head = whole[:pages]
    assert head + chain(ids[len(head) * size :], size, head[-1] if head else b"root") == whole


def test_another_root_is_another_chain():
    assert not set(chain(range(9), PAGE, b"one")) & set(chain(range(9), PAGE, b"two"))


def test_the_root_may_be_long():
    assert chain(range(3), PAGE, b"a" * 200) != chain(range(3), PAGE, b"a" * 201)
