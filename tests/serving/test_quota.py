from __future__ import annotations

import pytest

from idlm.errors import InputError
from idlm.serving import quota
from idlm.serving.config import Limits
from idlm.serving.quota import LONGEST_WAIT, Busy, Quota

LIMITS = Limits(queue_requests=4, queue_tokens=100)


def test_a_request_gets_all_its_room_or_none() -> None:
    it = Quota(LIMITS)
    it.take(3, 60)
    for samples, tokens in ((2, 2), (1, 41)):
        with pytest.raises(Busy) as busy:
            it.take(samples, tokens)
        assert busy.value.retry_after == 1
        assert (it.samples, it.tokens) == (3, 60)
    it.take(1, 40)
    it.give_back(60)
    assert (it.samples, it.tokens) == (3, 40)


@pytest.mark.parametrize(("samples", "tokens"), [(5, 5), (1, 101)])
def test_what_never_fits_is_not_told_to_come_back(samples: int, tokens: int) -> None:
    with pytest.raises(InputError, match=f"{samples} samples and {tokens} tokens"):
        Quota(LIMITS).take(samples, tokens)


def test_the_wait_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(quota, "monotonic", lambda: now)
    it = Quota(LIMITS)
    it.take(4, 100)
    for _ in range(2):
        it.give_back(10)
        it.take(1, 10)
    now = 12.0  # two samples and 20 tokens in 12 s
    with pytest.raises(Busy) as busy:
        it.take(1, 0)
    assert busy.value.retry_after == 6
    with pytest.raises(Busy) as busy:
        it.take(1, 15)
    assert busy.value.retry_after == 9
    now = 30.0
    with pytest.raises(Busy) as busy:
        it.take(4, 100)
    assert busy.value.retry_after == LONGEST_WAIT
    now = 43.0  # too long ago to say anything
    with pytest.raises(Busy) as busy:
        it.take(1, 0)
    assert busy.value.retry_after == 1
