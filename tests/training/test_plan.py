"""Which document is in which batch."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.training.plan import Bounds, Drawn, Plan, Share, Step, documents, pack, width

ROW_LENGTH = 64
bounds = st.builds(
    Bounds,
    rows=st.integers(1, 5),
    tokens=st.none() | st.integers(ROW_LENGTH, 3 * ROW_LENGTH),
    row_length=st.none() | st.just(ROW_LENGTH),
    batches=st.integers(1, 4),
) | st.builds(
    Bounds,
    rows=st.none(),
    tokens=st.integers(ROW_LENGTH, 3 * ROW_LENGTH),
    row_length=st.none() | st.just(ROW_LENGTH),
    batches=st.integers(1, 4),
)


def plan(lengths: list[int], of: Bounds, seed: int = 0) -> Plan:
    return Plan(torch.tensor(lengths), [Share(0, len(lengths))], of, seed)


def drawn(step: Step) -> list[Drawn]:
    return [one for batch in step.batches for row in batch for one in row]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, ROW_LENGTH), min_size=1, max_size=60),
    of=bounds,
    seed=st.integers(0, 3),
)
def test_a_step_is_a_function_of_its_number(lengths: list[int], of: Bounds, seed: int) -> None:
    """Whatever was asked before; within the bounds, no batch empty, no draw lost or doubled."""
    straight = plan(lengths, of, seed)
    steps = [straight.step(index) for index in range(40)]
    other = plan(lengths, of, seed)
    assert [other.step(index) for index in (17, 17, 3, 39, 0)] == [
        steps[index] for index in (17, 17, 3, 39, 0)
    ]
    for step in steps:
        assert len(step.batches) == of.batches
        for batch in step.batches:
            assert batch and all(batch)
            assert of.rows is None or len(batch) <= of.rows
            assert of.tokens is None or len(batch) * max(map(width, batch)) <= of.tokens
            for row in batch:
                assert len(row) == 1 or width(row) <= (of.row_length or 0)
        assert all(one.length == lengths[one.document] for one in drawn(step))
        assert step.documents == len(drawn(step))
        assert step.tokens == sum(one.length for one in drawn(step)) <= step.padded
    seen = sorted(one.draw for step in steps for one in drawn(step))
    assert len(set(seen)) == len(seen)
    # of windows that are over, only what waits for a later one is missing
    early = seen[-1] // 3
    assert sum(draw < early for draw in seen) > 0.8 * early - 20


def test_no_document_waits_forever() -> None:
    """Also the one that is the longest, or fits nothing else."""
    lengths = [32] * 40 + [64, 33]
    for of in (
        Bounds(None, 128, batches=3),
        Bounds(None, 130, 64, batches=3),
        Bounds(3, None, 64, batches=3),
        Bounds(5, None, batches=3),
    ):
        run = plan(lengths, of)
        count = Counter(one.document for index in range(600) for one in drawn(run.step(index)))
        passes = sum(count.values()) / len(lengths)
        assert passes > 20
        assert min(count[at] for at in range(len(lengths))) > 0.75 * passes


def test_passes_take_every_document_in_a_new_order() -> None:
    sources = [Share(0, 50)]
    order = list(islice(documents(sources, seed=1), 150))
    passes = [order[at : at + 50] for at in (0, 50, 100)]
    assert all(sorted(each) == list(range(50)) for each in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(50))
    assert order == list(islice(documents(sources, seed=1), 150))
    assert order != list(islice(documents(sources, seed=2), 150))


def test_sources_are_drawn_by_weight_whatever_their_size() -> None:
    sources = [Share(0, 3, 1.0), Share(3, 1003, 3.0), Share(1003, 1013, 6.0)]
    order = list(islice(documents(sources, seed=0), 20_000))
    shares = [sum(s.first <= at < s.stop for at in order) / len(order) for s in sources]
    assert shares == pytest.approx([0.1, 0.3, 0.6], abs=0.01)
    first = [at for at in order if at < 3]
    assert all(sorted(first[at : at + 3]) == [0, 1, 2] for at in range(0, 300, 3))
    assert order == list(islice(documents(sources, seed=0), 20_000))


def test_the_rows_of_a_step_do_not_depend_on_its_split() -> None:
    """So that gradients of a batch, of accumulation and of several ranks are the same."""
    rng = random.Random(0)
    lengths = [rng.randint(2, ROW_LENGTH) for _ in range(100)]
    for row_length in (None, ROW_LENGTH):
        runs = [
            plan(lengths, Bounds(rows, None, row_length, batches))
            for rows, batches in [(8, 1), (4, 2), (2, 4), (1, 8)]
        ]
        for index in range(40):
            whole, *others = ([r for b in run.step(index).batches for r in b] for run in runs)
            assert all(other == whole for other in others)


def test_windows_are_sorted_and_steps_are_not() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 60) for _ in range(400)]
    run = plan(lengths, Bounds(4))
    steps = [[one.length for one in drawn(run.step(index))] for index in range(100)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 6
    assert [step[0] for step in steps] != sorted(step[0] for step in steps)


def test_packing_fills_rows_with_whole_documents() -> None:
    rng = random.Random(0)
    given = [Drawn(at, at, rng.randint(2, 40)) for at in range(500)]
    rows = pack(given, 100)
    assert sorted(one for row in rows for one in row) == given
    assert all(width(row) <= 100 for row in rows)
    assert sum(one.length for one in given) / (100 * len(rows)) > 0.98
    assert pack([Drawn(0, 0, 60), Drawn(1, 1, 30), Drawn(2, 2, 50), Drawn(3, 3, 40)], 100) == [
        [Drawn(0, 0, 60), Drawn(3, 3, 40)],
        [Drawn(2, 2, 50), Drawn(1, 1, 30)],
    ]


def test_batches_of_tokens_are_nearly_full() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(50, 400) for _ in range(2000)]
    for row_length, padding in [(None, 0.05), (1024, 0.02)]:
        run = plan(lengths, Bounds(None, 4096, row_length, batches=2))
        steps = [run.step(index) for index in range(50)]
        padded = sum(step.padded for step in steps)
        assert 1 - sum(step.tokens for step in steps) / padded < padding
        assert padded > 0.93 * 4096 * 2 * len(steps)
