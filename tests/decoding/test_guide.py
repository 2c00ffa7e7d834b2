"""A guide in the law: for the oracle, for many requests at once, and what `Guide` and
`SamplingParams` refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm import Guide, InputError, SamplingParams
from idlm.decoding import reference
from idlm.decoding.law import Law, restrict
from idlm.decoding.verify import NOTHING, Drafts, draft, verify
from idlm.guides import MOST_GUIDE
from tests.decoding.laws import BOTH
from tests.decoding.test_batch import (
    K,
    Slot,
    V,
    close,
    mask_ids,
    padded,
    positions,
    random_logits,
    slots,
    table,
)
from tests.decoding.toy import Toy


def even_odd(output: Sequence[int]) -> Tensor:
    """A guide that looks at all there is: about half the tokens, others after every output; token 1
    always."""
    word = torch.tensor([17, *output]) * torch.arange(1, len(output) + 2)
    allowed = (torch.arange(V) * 7 + word.sum()) % 5 < 3
    allowed[1] = True
    return allowed


class Guided(Slot):
    """A request whose law is that of `even_odd`."""

    guide = staticmethod(even_odd)


def guided(slot: Slot) -> Guided:
    return Guided(**vars(slot))


batches = st.lists(st.tuples(slots(), st.booleans()), min_size=1, max_size=4)


def split(batch: list[tuple[Slot, bool]]) -> list[Slot | None]:
    return [guided(slot) if follows else slot for slot, follows in batch]


def allowed_rows(batch: Sequence[Slot | None], ahead: list[list[list[int]]]) -> Tensor:
    """Allowed [B, R, V] after each of a slot's R lists of tokens ahead."""
    return torch.stack(
        [
            torch.stack([even_odd(slot.output + tokens) for tokens in rows])
            if isinstance(slot, Guided)
            else torch.ones(len(rows), V, dtype=torch.bool)
            for slot, rows in zip(batch, ahead, strict=True)
        ]
    )


@settings(max_examples=100, deadline=None)
@given(batches, mask_ids, st.integers(0, 2**31))
def test_restricted_logits_are_verified_under_the_guided_law(
    pairs: list[tuple[Slot, bool]], mask_id: int, seed: int
) -> None:
    batch = split(pairs)
    logits, rows = random_logits(seed, len(batch), 1 + K, V), table(batch, mask_id)
    log_q = random_logits(seed + 1, len(batch), K, V).log_softmax(dim=-1)
    drafts, valid = padded(batch)
    ahead = [[slot.drafts[:k] for k in range(1 + K)] for slot in batch if slot]
    restricted = restrict(logits, allowed_rows(batch, ahead))
    law = Law(rows, rows.features)
    verdicts = verify(law, restricted, Drafts(drafts, valid, log_q), positions(batch))
    for b, slot in enumerate(batch):
        assert slot is not None
        count = len(slot.drafts)
        log_p = slot.laws(logits[b, : count + 1], slot.drafts, mask_id)
        committed, accepted = slot.verify(logits[b], log_q[b], mask_id)
        stuck = bool(log_p[accepted].max() == -torch.inf)  # no token is left
        committed += [NOTHING] * stuck
        assert (verdicts.accepted[b], verdicts.tokens[b, accepted]) == (accepted, committed[-1])
        if slot.params.verification != "coupled":
            rows_read = accepted + 1 - stuck
            assert verdicts.log_p is not None
            assert close(verdicts.log_p[b, :rows_read], log_p[:rows_read])


@settings(max_examples=100, deadline=None)
@given(batches, mask_ids, st.integers(0, 2**31))
def test_drafts_follow_the_guide_and_the_drafts_before_them(
    pairs: list[tuple[Slot, bool]], mask_id: int, seed: int
) -> None:
    """And those of requests without a guide are what they are without guides beside them, to the
    bit."""
    batch = split(pairs)
    logits, rows = random_logits(seed, len(batch), K, V), table(batch, mask_id)

    def allow(so_far: Tensor) -> Tensor:
        return allowed_rows(batch, [[tokens] for tokens in so_far.tolist()])

    law = Law(rows, rows.features)
    drafts, log_q = draft(law, logits, positions(batch), allow)
    free, _ = draft(law, logits, positions(batch))
    for b, slot in enumerate(batch):
        assert slot is not None
        expected, laws = slot.draft(logits[b], mask_id)  # they end where no token is left
        assert drafts[b, : len(expected)].tolist() == expected
        if slot.params.verification == "ratio":
            assert log_q is not None and close(log_q[b, : len(laws)], laws)
        if not isinstance(slot, Guided):
            assert torch.equal(drafts[b], free[b])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("branches", ["all", "chain"])
@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_drafts_and_verifies_under_one_law(
    temperature: float, branches: str, seed: int
) -> None:
    toy = Toy(V, seed=seed)
    params = SamplingParams(max_tokens=12, temperature=temperature, presence_penalty=0.3)
    request = reference.Request([0], params, toy.mask_id, (), seed, even_odd)
    ar, isd = reference.ar(toy, request), reference.isd(toy, request, 4, branches)
    free = reference.ar(toy, replace(request, allowed=None))
    assert ar.tokens == isd.tokens != free.tokens
    assert all(even_odd(ar.tokens[:at])[token] for at, token in enumerate(ar.tokens))


@pytest.mark.parametrize("law", BOTH)
def test_what_is_not_allowed_has_no_probability_whatever_its_bias(
    law: Callable[..., Tensor],
) -> None:
    allowed = torch.tensor([True, False, True, False])
    log_p = law(torch.zeros(4), SamplingParams(logit_bias={1: 50.0}, top_k=3), 4, allowed=allowed)
    assert log_p.exp().tolist() == pytest.approx([0.5, 0, 0.5, 0])


@pytest.mark.parametrize(
    "kind, text, words",
    [
        ("xml", "a", "'xml' is unknown"),
        ("regex", 7, "int"),
        ("regex", "", "'regex'"),
        ("json_object", "{}", "'json_object'"),
        ("regex", "a" * (MOST_GUIDE + 1), str(MOST_GUIDE)),
    ],
)
def test_a_wrong_guide_is_refused(kind: str, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Guide(kind, text)


def test_what_a_guide_does_not_go_with() -> None:
    with pytest.raises(InputError, match="is not a Guide"):
        SamplingParams(guide="a+")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="min_tokens=3 with a guide"):
        SamplingParams(guide=Guide("regex", "a+"), min_tokens=3)
