"""The terms of the loss against loops over single numbers, and their sum against one without
chunks; in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from idlm.models.attention import NAME, attend
from idlm.models.idlm_model import Idlm
from idlm.training import losses
from idlm.training.layout import mask_rows
from idlm.training.losses import (
    RowWeights,
    chunks,
    continuation,
    sum_in_chunks,
)
from idlm.training.objective import Objective, Wanted
from tests.training import tiny
from tests.training.reference import documents, gradients, hidden_of, slow_depths, slow_terms
from tests.training.test_objective import BATCHES, PHASES, SHAPES

CPU = torch.device("cpu")


def slow_weights(q: list[float], depth: list[int], weights: RowWeights) -> list[float]:
    """The weight of each row of a text by its depth."""
    if weights.depth == "uniform":
        return [1.0] * len(q)
    if weights.depth == "exponential":
        return [math.exp(-(k - 1) / weights.gamma) for k in depth]
    found = []
    for row, k in enumerate(depth):
        weight, first, last = 0.0, row - k + 1, row
        while last < len(depth) and depth[last] == k + last - row:
            smoothed = [(1 - weights.alpha) * x + weights.alpha for x in q[first : last + 1]]
            weight += math.prod(smoothed)
            last += 1
        found.append(weight)
    return found


@pytest.mark.parametrize("layout", BATCHES)
def test_depths_count_from_the_start_of_a_block_or_of_an_answer(layout: str) -> None:
    rows = mask_rows(BATCHES[layout], 3)
    expected = [depth for text in documents(BATCHES[layout]) for depth in slow_depths(text, 3)]
    assert (rows.depth[rows.real] + 1).tolist() == expected


def test_continuation_is_the_expected_length() -> None:
    accepted = torch.tensor([0.5, 0.4, 0.25, 0.1, 0.8], dtype=torch.float64)
    found = continuation(accepted, torch.tensor([0, 1, 2, 0, 1]), 4)
    assert found.tolist() == pytest.approx([0.75, 0.25, 0.05, 0.18, 0.08])


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize(
    ("depth", "gamma", "alpha"),
    [("exponential", 1.7, 0.5), ("dpace", 4.0, 0.5), ("dpace", 4.0, 0.2), ("dpace", 4.0, 1.0)],
)
def test_loss_and_gradient_with_weights_by_depth(
    depth: Any, gamma: float, alpha: float, layout: str
) -> None:
    weights, block_size = RowWeights(0.3, 0.5, 0.7, depth, gamma, alpha), 4
    idlm, batch = tiny.model("lora"), BATCHES[layout]
    fast = Objective(idlm, trains_clean=False)(batch, Wanted(block_size, False, True, weights))
    slow = torch.zeros((), dtype=torch.float64)
    rows = slow_terms(idlm, batch, block_size)[1:]
    at = 0
    for document in documents(batch):
        depth_of = slow_depths(document, block_size)
        part = slice(at, at := at + len(depth_of))
        q = [math.exp(-x) for x in rows[0][part].tolist()]
        by_depth = slow_weights(q, depth_of, weights)
        mixed = 0.3 * rows[0][part] + 0.5 * rows[1][part] + 0.7 * rows[2][part]
        slow = slow + (torch.tensor(by_depth, dtype=torch.float64) * mixed).sum()
    assert fast.noisy.item() == pytest.approx(slow.item(), rel=1e-12)
    reference = gradients(idlm, slow)
    for name, mine in gradients(idlm, fast.noisy).items():
        torch.testing.assert_close(mine, reference[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("depth", ["uniform", "dpace"])
@pytest.mark.parametrize(("method", "tied"), [("full", True), ("full", False), ("lora", True)])
def test_gradients_do_not_depend_on_the_chunks(
    method: str, tied: bool, depth: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is ordinary autograd over all rows at once."""
    idlm, batch = tiny.model(method, tied=tied), tiny.texts(SHAPES, PHASES)
    objective = Objective(idlm, trains_clean=method == "full")
    weights = RowWeights(0.3, 0.5, 0.7, depth)
    clean = method == "full"

    def total() -> Tensor:
        terms = objective(batch, Wanted(3, clean, True, weights))
        return (terms.noisy + 0.2 * terms.clean) / 7

    monkeypatch.setitem(losses.CHUNK, "cpu", rows * idlm.vocab_size)
    chunked = total()
    mine = gradients(idlm, chunked)

    def whole(loss: losses.ChunkLoss, hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return loss(hidden, slice(None))

    monkeypatch.setattr("idlm.training.objective.sum_in_chunks", whole)
    reference = total()
    assert chunked.item() == pytest.approx(reference.item(), rel=1e-12)
    for name, gradient in gradients(idlm, reference).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("depth", ["uniform", "dpace"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_tensor_has_rows_times_vocabulary(
    method: str, depth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    idlm, batch = tiny.model(method), tiny.texts([(4, 40)] * 4, [0, 1, 2, 3])
    objective = Objective(idlm, trains_clean=method == "full")
    half, _ = objective.clean_half(batch)
    _, noisy, clean = hidden_of(objective, batch, 3)
    wanted = Wanted(3, method == "full", True, RowWeights(0.3, 0.5, 0.7, depth))
    monkeypatch.setitem(losses.CHUNK, "cpu", 2 * tiny.VOCAB)
    monkeypatch.setattr(objective, "clean_half", lambda *_: (half, clean))
    monkeypatch.setattr(objective, "mask_half", lambda *_: noisy)
    with Largest() as largest:
        terms = objective(batch, wanted)
        objective.measure(batch, 3)
    assert terms.noisy > 0
    hidden_rows, head = clean.numel(), tiny.VOCAB * tiny.KEYS["hidden_size"]
    assert largest.elements <= max(hidden_rows, head) < len(noisy) * tiny.VOCAB


class Made(TorchDispatchMode):
    """The operations that make a tensor with so many elements in memory of its own."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.by = elements, list[str]()

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {place(each) for each in tree_leaves(args) if isinstance(each, Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.numel() == self.elements:
                self.by += [str(function)] * (place(each) not in given)
        return made


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_the_gradient_of_the_head_exists_once(monkeypatch: pytest.MonkeyPatch) -> None:
    idlm = tiny.model(tied=False)
    objective, batch = Objective(idlm, trains_clean=True), tiny.texts([(4, 40)] * 4, [0] * 4)
    monkeypatch.setitem(losses.CHUNK, "cpu", 8 * tiny.VOCAB)
    (head,) = idlm.head_parameters()
    rows = objective.noisy_rows(objective.clean_half(batch)[0], Wanted(3, False))
    hidden = rows.hidden.detach().requires_grad_()
    with Made(head.numel()) as made:
        objective._noisy_loss(rows._replace(hidden=hidden), None, Wanted(3, False))[0].backward()
    assert head.grad is not None and len(objective.parts(hidden)) > 10
    assert made.by == ["aten.zeros_like.default"]


def test_the_clean_half_has_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def keep(*args: Any) -> Tensor:
        masks.append(args[3])
        return attend(*args)

    monkeypatch.setattr("idlm.training.attention.attend", keep)
    batch = tiny.texts(SHAPES, PHASES)
    hidden_of(Objective(tiny.model(), trains_clean=True), batch, 3)
    assert [mask is None for mask in masks] == [True, True, False, False]  # two layers


@pytest.mark.parametrize("rows", [1, 4])
def test_hidden_states_and_head_get_their_gradient(rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(5, 11, dtype=torch.float64)
    target = torch.randint(11, (9,))

    def loss(each: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(head(each), target[part], reduction="none").square().sum()
        return total, total[None]

    inputs = (hidden, *head.parameters())
    parts = [slice(i, i + rows) for i in range(0, 9, rows)]
    total, sums = sum_in_chunks(loss, hidden, parts, head.parameters())
    reference = loss(hidden, slice(None))[0]
    assert total.item() == pytest.approx(reference.item(), rel=1e-13) and sums.tolist() == [total]
    assert not sums.requires_grad
    for mine, slow in zip(
        torch.autograd.grad(3 * total, inputs),
        torch.autograd.grad(3 * reference, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-12)


def test_scaled_logits_are_the_model_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cohere scales its logits."""
    torch.manual_seed(0)
    keys = AutoConfig.for_model("cohere", **tiny.KEYS, logit_scale=0.3)
    stock = AutoModelForCausalLM.from_config(
        keys, attn_implementation=NAME, dtype=torch.float64
    ).eval()
    idlm, batch = Idlm(stock, None, tiny.MASK, name="tiny"), tiny.texts([(3, 9)], [0])
    monkeypatch.setitem(losses.CHUNK, "cpu", 2 * tiny.VOCAB)
    mine = Objective(idlm, trains_clean=True, emits_mask=True)(batch, Wanted(0, clean=True)).clean
    logits = stock(batch.tokens).logits[0]
    theirs = F.cross_entropy(logits[2:-1], batch.tokens[0, 3:], reduction="sum")
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    names = dict(stock.named_parameters())
    ours, reference = (torch.autograd.grad(loss, list(names.values())) for loss in (mine, theirs))
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_chunks_cover_all_rows_and_are_bounded() -> None:
    for rows, columns in [(2048, 4096), (2048, 49152), (2048, 151936), (3, 10**9), (0, 7)]:
        parts = chunks(rows, columns, CPU)
        assert [i for part in parts for i in range(rows)[part]] == list(range(rows)) and parts
        assert all(
            (part.stop - part.start) * columns <= max(losses.CHUNK["cpu"], columns)
            for part in parts
        )
