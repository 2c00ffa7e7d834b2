"""A document's loss and gradient do not depend on what is packed beside it, nor those of several
phases on whether they share a clean half."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm.training.data import Draw, Example, collate
from idlm.training.layout import Texts
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from tests.training import tiny
from tests.training.reference import gradients, hidden_of
from tests.training.test_attention import FAMILIES, loss_and_gradients

SHAPES: list[tuple[int, ...]] = [(3, 9), (1, 7), (2, 3, 4, 5, 1), (6, 1), (4, 8, 0, 3), (2, 12)]
ROWS = [[0, 1, 2], [3, 4], [5]]


def documents() -> list[Draw]:
    rng = random.Random(0)
    return [Draw(i, tiny.document(rng, shape), 7 * i) for i, shape in enumerate(SHAPES)]


def in_rows(draws: list[Draw], rows: list[list[int]]) -> Texts:
    return collate([[draws[i] for i in row] for row in rows]).texts


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_equal_packed_and_unpacked(family: str) -> None:
    objective, draws = Objective(tiny.family(*FAMILIES[family]), trains_clean=True), documents()
    packed = loss_and_gradients(objective, in_rows(draws, ROWS))
    alone = loss_and_gradients(objective, in_rows(draws, [[i] for i in range(len(draws))]))
    single = [loss_and_gradients(objective, in_rows(draws, [[i]])) for i in range(len(draws))]
    exact = family in ("plain", "window")  # norms of the others compute in float32
    for name, mine in packed.items():
        for other in (alone[name], torch.stack([one[name] for one in single]).sum(0)):
            torch.testing.assert_close(
                mine,
                other,
                rtol=1e-10 if exact else 1e-4,
                atol=1e-10 if exact else 1e-5,
                msg=name,
            )


@pytest.mark.parametrize("weights", [RowWeights(1.0, 0.3, 0.5, "dpace"), RowWeights()])
def test_a_gated_lora_learns_the_same_packed(weights: RowWeights) -> None:
    idlm, draws = tiny.model("lora"), documents()
    found = []
    for rows in (ROWS, [[5, 4, 3, 2, 1, 0]]):
        loss = Objective(idlm, False)(in_rows(draws, rows), Wanted(4, False, True, weights)).noisy
        trained = [p for p in idlm.model.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def hidden_rows(objective: Objective, draws: list[Draw], document: int) -> list[Tensor]:
    """The hidden states of a document's MASK rows and supervised clean rows, in a row of all."""
    texts = in_rows(draws, [list(range(len(draws)))])
    with torch.no_grad():
        rows, noisy, clean = hidden_of(objective, texts, 4)
    assert rows is not None
    of_rows = texts.document.gather(1, rows.column)[rows.real]
    return [noisy[of_rows == document], clean[texts.document[texts.supervised] == document]]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("document", [0, 2, 5])
def test_neighbours_change_nothing(method: str, window: Any, document: int) -> None:
    objective, draws = Objective(tiny.model(method, window=window), False), documents()
    before = hidden_rows(objective, draws, document)
    others = [
        draw
        if i == document
        else Draw(0, Example([9] * draw.example.length, draw.example.answers), 5)
        for i, draw in enumerate(draws)
    ]
    for one, other in zip(before, hidden_rows(objective, others, document), strict=True):
        assert len(one) and torch.equal(one, other)
    others[document - 1] = Draw(0, Example([9] * 20, ((1, 2), (5, 15))), 1)  # other lengths
    for one, other in zip(before, hidden_rows(objective, others, document), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("block_size", "phases"), [(4, 2), (4, 4), (3, 2), (3, 8), (1, 2)])
def test_several_phases_are_the_sum_of_each(method: str, block_size: int, phases: int) -> None:
    idlm, texts = tiny.model(method), in_rows(documents(), ROWS)
    runs: list[int] = []
    next(idlm.model.base_model.layers[0].children()).register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    objective = Objective(idlm, trains_clean=method == "full")
    weights = RowWeights(1.0, 0.3, 0.5, "dpace")
    several = objective(texts, Wanted(block_size, False, True, weights, phases))
    count = min(block_size, phases)
    assert len(runs) == 1 + count
    single = [
        objective(
            texts._replace(phase=texts.phase + shift), Wanted(block_size, False, True, weights)
        )
        for shift in {number * block_size // count for number in range(count)}
    ]
    assert len(single) == count
    for mine, parts in zip(several, zip(*single, strict=True), strict=True):
        assert mine.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-12)
    reference = gradients(idlm, torch.stack([each.noisy for each in single]).sum())
    for name, mine in gradients(idlm, several.noisy).items():
        torch.testing.assert_close(mine, reference[name], rtol=1e-10, atol=1e-10)
