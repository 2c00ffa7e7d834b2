"""The law, verification and drafting of a batch against the oracle, slot by slot, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from idlm import SamplingParams
from idlm.decoding import reference
from idlm.decoding.law import Law
from idlm.decoding.settings import Features, Settings
from idlm.decoding.verify import NOTHING, Drafts, draft, logprobs, verify
from tests.decoding.toy import Toy

V, K = 11, 3
STOPS = (2, 7)


@dataclass
class Slot:
    """One request between two windows: what the batch sees as one row, and the oracle alone."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]
    drafts: list[int]
    guide = None

    @property
    def first(self) -> int:
        return len(self.prompt) + len(self.output)

    def oracle(self, mask_id: int) -> reference.Request:
        stops = frozenset(STOPS)
        return reference.Request(self.prompt, self.params, mask_id, stops, self.seed, self.guide)

    def laws(self, logits: Tensor, drafts: list[int], mask_id: int) -> Tensor:
        oracle = self.oracle(mask_id)
        return torch.stack(
            [oracle.law(row, self.output + drafts[:k]) for k, row in enumerate(logits)]
        )

    def verify(self, logits: Tensor, log_q: Tensor, mask_id: int) -> tuple[list[int], int]:
        return self.oracle(mask_id).verify(self.output, self.drafts, list(log_q), logits)

    def draft(self, logits: Tensor, mask_id: int) -> tuple[list[int], Tensor]:
        drafts, laws = self.oracle(mask_id).draft(self.output, logits)
        return drafts, torch.stack(laws) if laws else torch.empty(0, V, dtype=torch.float64)


def some_params(draw: st.DrawFn) -> SamplingParams:
    rule = draw(st.sampled_from(["coupled", "ratio", "relaxed"]))
    wishes: dict[str, st.SearchStrategy[Any]] = {
        "top_k": st.sampled_from([1, 3, 100]),
        "top_p": st.sampled_from([0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.1, 0.6]),
        "repetition_penalty": st.sampled_from([1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.5, -0.5]),
        "frequency_penalty": st.sampled_from([0.4, -0.2]),
        "logit_bias": st.sampled_from([{1: 3.1, 4: -2.0}, {7: 5.3}]),
        "banned_tokens": st.sampled_from([(0, 5), (3,)]),
        "allowed_token_ids": st.sampled_from([(1, 3, 4, 8), STOPS]),
        "bad_words": st.sampled_from([((4, 1), (3,)), ((1, 1), (0, 1, 4), (9, 8))]),
        "min_tokens": st.sampled_from([2, 3, 4, 100]),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(wishes)), max_size=4))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        verification=rule,
        tau=draw(st.sampled_from([0.3, 0.75])) if rule == "relaxed" else None,
        **{name: draw(wishes[name]) for name in sorted(chosen)},
    )


@st.composite
def slots(draw: st.DrawFn) -> Slot:
    tokens = st.lists(st.integers(0, V - 2), max_size=6)
    drafts = draw(st.lists(st.integers(0, V - 2), max_size=K))
    return Slot(
        some_params(draw), draw(st.integers(0, 2**63 - 1)), [1, *draw(tokens)], draw(tokens), drafts
    )


batches = st.lists(st.none() | slots(), min_size=1, max_size=5)
mask_ids = st.sampled_from([V - 1, V])


def table(batch: list[Slot | None], mask_id: int) -> Settings:
    """Settings with the batch in them; each row was another request's before."""
    rows = Settings.empty(len(batch), V, mask_id)
    other = SamplingParams(
        top_k=2,
        min_p=0.5,
        presence_penalty=2.0,
        logit_bias={3: 9.0},
        min_tokens=50,
        bad_words=((4, 5), (4, 4, 6)),
    )
    for index, slot in enumerate(batch):
        rows.put(index, other, 5, [1, 2, 3], [4, 4], [6])
        if slot is None:
            rows.clear(index)
        else:
            rows.put(index, slot.params, slot.seed, slot.prompt, slot.output, STOPS)
    return rows


def positions(batch: list[Slot | None]) -> Tensor:
    return torch.tensor([slot.first if slot else 0 for slot in batch])


def padded(batch: list[Slot | None]) -> tuple[Tensor, Tensor]:
    """Drafts [B, K], with ids that are no tokens past the valid ones; and how many are valid."""
    rows = [
        (slot.drafts if slot else []) + [99, -1, V][: K - (len(slot.drafts) if slot else 0)]
        for slot in batch
    ]
    return torch.tensor(rows), torch.tensor([len(slot.drafts) if slot else 0 for slot in batch])


def random_logits(seed: int, *shape: int) -> Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    )


def close(ours: Tensor, expected: Tensor) -> bool:
    return torch.allclose(ours.exp(), expected.exp(), atol=1e-12, rtol=0) and bool(
        ((ours - expected).abs() < 1e-12)[expected > -1e300].all()
        and torch.equal(ours == -torch.inf, expected == -torch.inf)
    )


@settings(max_examples=250, deadline=None)
@given(batches, mask_ids, st.integers(0, 2**31))
def test_verification_equals_the_single_request_functions(
    batch: list[Slot | None], mask_id: int, seed: int
) -> None:
    logits = random_logits(seed, len(batch), 1 + K, V)
    log_q = random_logits(seed + 1, len(batch), K, V).log_softmax(dim=-1)
    rows = table(batch, mask_id)
    drafts, valid = padded(batch)
    law = Law(rows, rows.features)
    verdicts = verify(law, logits, Drafts(drafts, valid, log_q), positions(batch))
    for b, slot in enumerate(batch):
        if slot is None:
            continue
        count = len(slot.drafts)
        log_p = slot.laws(logits[b, : count + 1], slot.drafts, mask_id)
        committed, accepted = slot.verify(logits[b], log_q[b], mask_id)
        stuck = bool(log_p[accepted].max() == -torch.inf)
        committed += [NOTHING] * stuck
        assert committed[:-1] == slot.drafts[:accepted] and len(committed) == accepted + 1
        assert (verdicts.accepted[b], verdicts.tokens[b, accepted]) == (accepted, committed[-1])
        assert verdicts.tokens[b, : len(committed)].tolist() == committed
        if slot.params.verification != "coupled":
            assert verdicts.log_p is not None
            assert close(verdicts.log_p[b, : accepted + 1 - stuck], log_p[: accepted + 1 - stuck])


@settings(max_examples=150, deadline=None)
@given(batches, mask_ids, st.integers(0, 2**31))
def test_drafts_equal_the_single_request_ones(
    batch: list[Slot | None], mask_id: int, seed: int
) -> None:
    logits = random_logits(seed, len(batch), K, V)
    rows = table(batch, mask_id)
    drafts, log_q = draft(Law(rows, rows.features), logits, positions(batch))
    for b, slot in enumerate(batch):
        if slot is not None:
            expected, laws = slot.draft(logits[b], mask_id)
            assert drafts[b, : len(expected)].tolist() == expected
            assert len(expected) == K or slot.params.allowed_token_ids or slot.params.bad_words
            if slot.params.verification == "ratio":
                assert log_q is not None and close(log_q[b, : len(expected)], laws)


@settings(max_examples=150, deadline=None)
@given(batches, mask_ids, st.integers(0, 2**31), st.integers(0, 3))
def test_the_law_and_the_reported_logprobs(
    batch: list[Slot | None], mask_id: int, seed: int, top: int
) -> None:
    logits = random_logits(seed, len(batch), 1 + K, V)
    rows = table(batch, mask_id)
    tokens = torch.randint(
        V - 1, (len(batch), 1 + K), generator=torch.Generator().manual_seed(seed)
    )
    law = Law(rows, rows.features)
    laws = law.log_p(law.scores(logits, positions(batch), tokens[:, :-1]))
    reported = logprobs(law, logits, tokens, positions(batch), top)
    for b, slot in enumerate(batch):
        if slot is None:
            continue
        log_p = slot.laws(logits[b], tokens[b].tolist(), mask_id)
        if (log_p.amax(dim=-1) == -torch.inf).any():
            continue  # nothing is chosen from such a row, nor reported
        assert close(laws[b], log_p)
        if slot.params.greedy:
            log_p = greedy_logprobs(slot, logits[b], tokens[b].tolist(), mask_id)
        chosen = log_p.gather(1, tokens[b, :, None])
        assert close(reported.chosen[b], chosen[:, 0])
        assert torch.equal(reported.rank[b], 1 + (log_p > chosen).sum(dim=1))
        assert close(reported.values[b], log_p.topk(top).values)
        assert close(reported.values[b], log_p.gather(1, reported.ids[b]))


def greedy_logprobs(slot: Slot, logits: Tensor, tokens: list[int], mask_id: int) -> Tensor:
    rows = []
    for k, row in enumerate(logits):
        output = slot.output + tokens[:k]
        banned = (mask_id, *(STOPS if len(output) < slot.params.min_tokens else ()))
        rows.append(reference.adjusted(row, slot.params, slot.prompt, output, banned))
    return torch.stack(rows).log_softmax(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None)
@given(batch=batches, seed=st.integers(0, 2**31))
def test_a_slot_does_not_see_its_neighbours(
    dtype: torch.dtype, batch: list[Slot | None], seed: int
) -> None:
    """The same tokens to the last bit, whichever parts of the law the others make a step run."""
    logits = random_logits(seed, len(batch), 1 + K, V).to(dtype)
    log_q = random_logits(seed + 1, len(batch), K, V).log_softmax(dim=-1)
    rows, first = table(batch, V), positions(batch)
    together = Law(rows, rows.features)
    drafts, valid = padded(batch)
    verdicts = verify(together, logits, Drafts(drafts, valid, log_q), first)
    proposed = draft(together, logits[:, 1:], first)[0]
    for b, slot in enumerate(batch):
        if slot is not None:
            rows, this = table([slot], V), slice(b, b + 1)
            alone = Law(rows, rows.features)
            single = verify(
                alone, logits[this], Drafts(drafts[this], valid[this], log_q[this]), first[this]
            )
            assert torch.equal(single.accepted, verdicts.accepted[this])
            end = single.accepted[:, None]
            assert torch.equal(single.tokens.gather(1, end), verdicts.tokens[this].gather(1, end))
            assert torch.equal(draft(alone, logits[this, 1:], first[this])[0], proposed[this])


class Requests:
    """Several requests decoded together: the toy model slot by slot, all else as one batch."""

    def __init__(self, toy: Toy, batch: list[Slot], depth: int) -> None:
        self.toy, self.batch, self.depth = toy, batch, depth
        self.rows = Settings.empty(len(batch), V, toy.mask_id)
        for index, slot in enumerate(batch):
            self.rows.put(index, slot.params, slot.seed, slot.prompt, (), STOPS)
        self.first = positions(list(batch))
        self.drafts = torch.full((len(batch), depth), -1)
        self.valid = torch.zeros(len(batch), dtype=torch.int64)
        self.log_q: Tensor | None = None

    def step(self) -> None:
        """One window of every slot, with masks for the outcome that comes true: what all outcomes
        give."""
        law = Law(self.rows, self.rows.features)
        windows = [
            self.logits(b, [*self.drafts[b, : self.valid[b]].tolist()])
            for b in range(len(self.batch))
        ]
        padding = [
            torch.cat([rows, torch.zeros(1 + self.depth - len(rows), V)]) for rows in windows
        ]
        verdicts = verify(
            law, torch.stack(padding), Drafts(self.drafts, self.valid, self.log_q), self.first
        )
        count = verdicts.accepted + 1
        masks = [
            self.mask_logits(b, verdicts.tokens[b, : verdicts.accepted[b]].tolist())
            for b in range(len(self.batch))
        ]
        for slot, tokens, committed in zip(
            self.batch, verdicts.tokens.tolist(), count.tolist(), strict=True
        ):
            slot.output += tokens[:committed]
        self.rows.record(verdicts.tokens, count)
        self.first = self.first + count
        self.drafts, self.log_q = draft(law, torch.stack(masks), self.first)
        self.valid = torch.full_like(self.valid, self.depth)

    def run(self, text: list[int], rows: int) -> Tensor:
        return self.toy(
            torch.tensor(text), torch.arange(len(text)), torch.ones(len(text), len(text)).tril() > 0
        )[-rows:]

    def logits(self, b: int, drafts: list[int]) -> Tensor:
        return self.run(self.batch[b].prompt + self.batch[b].output + drafts, 1 + len(drafts))

    def mask_logits(self, b: int, accepted: list[int]) -> Tensor:
        text = self.batch[b].prompt + self.batch[b].output + accepted
        return self.run(text + [self.toy.mask_id] * self.depth, self.depth)


@settings(max_examples=30, deadline=None)
@given(st.lists(slots(), min_size=1, max_size=4), st.integers(0, 100), st.integers(1, 3))
def test_decoding_a_batch_equals_the_reference(batch: list[Slot], model: int, depth: int) -> None:
    toy = Toy(V, seed=model)
    for slot in batch:
        slot.output = []
    requests = Requests(toy, batch, depth)
    for _ in range(6):
        requests.step()
    for slot in batch:
        params = shorter(slot.params, len(slot.output))
        request = reference.Request(slot.prompt, params, toy.mask_id, STOPS, slot.seed)
        result = reference.isd(toy, request, depth + 1)
        stuck, expected = result.stuck, result.tokens
        assert slot.output[: len(expected)] == expected
        assert not stuck or slot.output[len(expected)] == NOTHING
        if params.verification == "coupled":
            assert reference.ar(toy, request).tokens == expected


def shorter(params: SamplingParams, tokens: int) -> SamplingParams:
    """The same wishes for `tokens` tokens."""
    return replace(params, max_tokens=tokens, min_tokens=min(params.min_tokens, tokens))


def test_a_recorded_step_follows_the_settings() -> None:
    """A trace holds the tensors, not their values: new requests in the same slots need no new
    trace."""
    rows = Settings.empty(2, V, V)
    for slot in range(2):
        rows.put(slot, SamplingParams(temperature=0.7), seed=slot, prompt=[1])
    law, first = Law(rows, rows.features), torch.tensor([3, 9])
    drafts, valid = torch.zeros(2, K, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    logits = random_logits(0, 2, 1 + K, V)

    def step(logits: Tensor, first: Tensor) -> Tensor:
        return verify(law, logits, Drafts(drafts, valid), first).tokens

    with torch.inference_mode():
        recorded = torch.jit.trace(step, (logits, first), check_trace=False)
        before = [recorded(logits, first) for _ in range(4)][-1]
        rows.put(0, SamplingParams(temperature=1.5), seed=77, prompt=[1])
        rows.put(1, SamplingParams(temperature=3.0), seed=78, prompt=[1])
        after = recorded(logits, first)
        assert torch.equal(after, step(logits, first)) and not torch.equal(after, before)


def test_features_are_those_of_the_live_slots() -> None:
    rows = Settings.empty(3, V, V)
    assert rows.features == Features()
    rows.put(0, SamplingParams(temperature=0, top_k=5, min_tokens=3), 0, [1])
    assert rows.features == Features(), (
        "nothing to filter when greedy, nothing to hold back without stop ids"
    )
    rows.put(1, SamplingParams(min_p=0.1), 0, [1], stop_ids=[4])
    rows.put(
        2,
        SamplingParams(temperature=0, presence_penalty=1.0, banned_tokens=(4,), min_tokens=3),
        0,
        [1],
        [],
        [4],
    )
    assert rows.features == Features(
        sampled=True, filtered=True, penalised=True, biased=True, held=True
    )
    rows.clear(2)
    assert rows.features == Features(sampled=True, filtered=True)


def test_large_tables_wait_for_a_request_that_needs_them() -> None:
    rows = Settings.empty(1, V, V)
    rows.put(0, SamplingParams(top_p=0.5), 0, [1])
    assert rows.bias is rows.stop is rows.seen is rows.counts is None
    rows.put(0, SamplingParams(logit_bias={1: 0.5}), 0, [1])
    assert rows.bias is not None and rows.seen is None
    rows.put(0, SamplingParams(frequency_penalty=0.5), 0, [1, V], [2, 2])
    assert rows.seen is not None and rows.seen[0].nonzero().flatten().tolist() == [1, 2]
    assert rows.counts is not None and rows.counts[0, 2] == 2 and not rows.bias[0].any()


def test_only_the_committed_tokens_are_counted() -> None:
    rows = Settings.empty(2, V, V)
    for slot in range(2):
        rows.put(slot, SamplingParams(presence_penalty=1.0), 0, [1])
    rows.record(torch.tensor([[5, 5, 6], [7, 99, -1]]), torch.tensor([2, 1]))
    assert rows.counts is not None and rows.seen is not None
    assert rows.counts.nonzero().tolist() == [[0, 5], [1, 7]] and rows.counts[0, 5] == 2
    assert rows.seen.nonzero().tolist() == [[0, 1], [0, 5], [1, 1], [1, 7]]
