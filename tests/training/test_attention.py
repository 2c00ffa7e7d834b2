"""Attention of the objective in tiles, by document and by blocks, against one dense mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idlm.decoding.scores import Scores
from idlm.models.attention import attend
from idlm.training import attention, blocks, tiles
from idlm.training.blocks import attend_in_blocks
from idlm.training.layout import Seen, Texts, dense, mask_rows, seen_by_masks, seen_by_text
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from idlm.training.tiles import Part, attend_in_tiles
from tests.training import tiny
from tests.training.reference import gradients
from tests.training.test_objective import BATCHES

WANTED = Wanted(4, clean=True, soft=True, weights=RowWeights(1.0, 0.5, 0.5))
KINDS = {
    "plain": Scores(0.4),
    "window": Scores(0.4, window=3),
    "softcap": Scores(0.4, softcap=1.5),
    "sinks": Scores(0.4, window=4, sinks=torch.tensor([0.3, -2.0, 4.0, 0.0])),
}


def ranges(rows: int, keys: int, own: bool) -> Seen:
    """Random ranges, empty ones among them; `own` has each row's key."""
    at = torch.arange(rows).expand(2, -1)
    if own:
        return Seen(at - torch.randint(6, (2, rows)).clamp(max=at), at + 1, at)
    first = torch.randint(keys, (2, rows))
    return Seen(first, (first + torch.randint(keys, (2, rows))).clamp(max=keys), first + keys // 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [2, 4])
def test_tiles_are_attention_under_a_mask(
    kind: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "ROWS", 4)
    monkeypatch.setattr(tiles, "COLUMNS", 5)
    torch.manual_seed(0)
    rows, keys, scores = 11, 17, KINDS[kind]
    if scores.sinks is not None:
        scores = scores._replace(sinks=scores.sinks.double().requires_grad_())
    shapes = [(4, rows), (heads, rows), (heads, rows), (heads, keys), (heads, keys)]
    tensors = [
        torch.randn(2, h, n, 8, dtype=torch.float64).mul_(2).requires_grad_() for h, n in shapes
    ]
    query, key, value, far_key, far_value = tensors
    seen = [ranges(rows, rows, own=True), ranges(rows, keys, own=False)]
    mine = attend_in_tiles(
        query, [Part(key, value, seen[0]), Part(far_key, far_value, seen[1])], scores
    )
    masks = [
        dense(each.within(scores.window), n) for each, n in zip(seen, (rows, keys), strict=True)
    ]
    joined = torch.cat([key, far_key], 2), torch.cat([value, far_value], 2)
    theirs = attend(query, *joined, torch.cat(masks, 2)[:, None], scores)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    inputs = [*tensors, *([] if scores.sinks is None else [scores.sinks])]
    back = torch.randn_like(mine)
    for one, other in zip(
        torch.autograd.grad(mine, inputs, back),
        torch.autograd.grad(theirs, inputs, back),
        strict=True,
    ):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("starcoder2", {}),
    "window": ("starcoder2", {"sliding_window": 5}),
    "softcap and windows": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "sliding_window": 4, "head_dim": 4},
    ),
    "sinks and windows": (
        "gpt_oss",
        {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 4},
    ),
    "learned positions": ("gpt2", {}),
    "sdpa": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def loss_and_gradients(objective: Objective, texts: Texts) -> dict[str, Tensor]:
    """The loss and the gradients of a full fine-tune by name."""
    terms = objective(texts, WANTED)
    loss = terms.noisy + 0.2 * terms.clean
    return {"loss": loss.detach(), **gradients(objective.idlm, loss)}


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_tiles_are_one_dense_mask(
    family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one run all masks are dense; in the other they have at most 7 columns."""
    objective = Objective(tiny.family(*FAMILIES[family]), trains_clean=True)
    reference = loss_and_gradients(objective, BATCHES[layout])
    monkeypatch.setattr(attention, "DENSE", 7)
    monkeypatch.setattr(tiles, "ROWS", 4)
    monkeypatch.setattr(tiles, "COLUMNS", 5)
    exact = family in ("plain", "window")  # norms of the others compute in float32
    for name, mine in loss_and_gradients(objective, BATCHES[layout]).items():
        torch.testing.assert_close(
            mine,
            reference[name],
            rtol=1e-10 if exact else 1e-4,
            atol=1e-10 if exact else 1e-5,
            msg=name,
        )


class Widest(TorchDispatchMode):
    """The columns of the widest matrix that an operation makes. One of few rows is no mask: heads,
    or hidden values by position."""

    columns = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.dim() >= 2 and each.shape[-2] > 64:
                self.columns = max(self.columns, each.shape[-1])
        return made


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("plain", (900, 1700, 100, 300)),
        ("window", (900, 1700, 100, 300)),
        ("sinks and windows", (700, 500)),  # whose dense reference is slow
    ],
)
def test_a_long_text_has_no_wide_mask(
    family: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, keys = FAMILIES[family]
    window = {"sliding_window": 1200} if "sliding_window" in keys else {}
    keys = keys | window | {"max_position_embeddings": 3000, "num_hidden_layers": 1}
    objective = Objective(tiny.family(kind, keys), trains_clean=True)
    batch = tiny.packed([[shape]], [1])
    with Widest() as widest:
        mine = loss_and_gradients(objective, batch)
    assert widest.columns <= 1024
    monkeypatch.setattr(attention, "DENSE", 10**9)
    with Widest() as widest:
        reference = loss_and_gradients(objective, batch)
    assert widest.columns > sum(shape)  # the test would see one
    exact = kind == "starcoder2"
    for name, gradient in mine.items():
        scale = reference[name].abs().max()
        error = (gradient - reference[name]).abs().max() / scale
        assert error < (1e-10 if exact else 1e-4), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", ["clean", "masks"])
def test_blocks_are_attention_under_a_mask(
    kind: str, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    torch.manual_seed(0)
    texts, scores = BATCHES["packed"], KINDS[kind]
    rows = mask_rows(texts, 4)
    seen = [seen_by_text(texts)] if half == "clean" else list(seen_by_masks(rows))
    seen = [each.within(scores.window) for each in seen]
    keys = (
        [texts.tokens.shape[1]] if half == "clean" else [rows.real.shape[1], texts.tokens.shape[1]]
    )
    count = seen[0].first.shape[1]
    query, key, value = (
        torch.randn(2, h, n, 8, dtype=torch.float64)
        for h, n in [(4, count), (2, sum(keys)), (2, sum(keys))]
    )
    if scores.sinks is not None:
        scores = scores._replace(sinks=scores.sinks.double())
    mask = torch.cat([dense(each, n) for each, n in zip(seen, keys, strict=True)], 2)
    mine = attend_in_blocks(query, key, value, blocks.block_mask(seen, keys), scores)
    torch.testing.assert_close(
        mine, attend(query, key, value, mask[:, None], scores), rtol=1e-11, atol=1e-12
    )


def test_blocks_that_are_skipped_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention on a CPU does not skip any, so their lists are tested by themselves."""
    monkeypatch.setattr(blocks, "BLOCK", 4)
    batch = tiny.packed([[(3, 30), (2, 12, 3, 25)], [(20, 40)]], [1, 2, 3])
    rows = mask_rows(batch, 4)
    seen, keys = list(seen_by_masks(rows)), [rows.real.shape[1], batch.tokens.shape[1]]
    found = blocks.block_mask(seen, keys)
    mask = torch.cat([dense(each, n) for each, n in zip(seen, keys, strict=True)], 2)
    pad = [-size % 4 for size in mask.shape[:0:-1]]
    mask = torch.nn.functional.pad(mask, (0, pad[0], 0, pad[1])).unfold(1, 4, 4).unfold(2, 4, 4)
    some, every = mask.any(-1).any(-1), mask.all(-1).all(-1)
    partial, full = (torch.zeros_like(some) for _ in range(2))
    assert found.full_kv_num_blocks is not None and found.full_kv_indices is not None
    for listed, count, index in [
        (partial, found.kv_num_blocks, found.kv_indices),
        (full, found.full_kv_num_blocks, found.full_kv_indices),
    ]:
        for b in range(2):
            for row in range(some.shape[1]):
                listed[b, row, index[b, 0, row, : int(count[b, 0, row])].long()] = True
    assert not (partial & full).any() and not (full & ~every).any() and full.any()
    assert not (some & ~(partial | full)).any()
    assert (partial | full).float().mean() < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["plain", "window", "softcap and windows", "sinks and windows"])
def test_a_gpu_learns_what_a_cpu_learns(family: str) -> None:
    kind, keys = FAMILIES[family]
    keys = keys | {"max_position_embeddings": 300, "hidden_size": 64, "head_dim": 16}
    idlm = tiny.family(kind, keys)
    idlm.model.float()
    batch = tiny.packed([[(30, 70), (20, 100, 20, 60)], [(1, 250)]], [1, 2, 3])
    reference = loss_and_gradients(Objective(idlm, trains_clean=True), batch)
    idlm.model.cuda()
    on_gpu = Texts(*(each.cuda() for each in batch))
    for name, mine in loss_and_gradients(Objective(idlm, trains_clean=True), on_gpu).items():
        error = (mine.cpu() - reference[name]).norm() / reference[name].norm()
        assert error < 1e-2, name
