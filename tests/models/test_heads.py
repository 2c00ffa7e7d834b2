"""Draft heads: their formulas, and their files beside an adapter or a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import idlm
from idlm.errors import InputError
from idlm.models import adapter, heads, loading
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.heads import KINDS, HeadSpec, RowsBefore
from idlm.models.idlm_model import Idlm
from idlm.models.more_adapters import attach_loaded, detach_loaded, read_more
from tests.heads import random_head, slow_head
from tests.models import tiny
from tests.models.test_adapter import save, trained

TOP = 6


def drafting(folder: Path, kind: str) -> Idlm:
    """A model with a random adapter and a random head."""
    model = trained(folder)
    model.draft_heads[0] = random_head(model.model, HeadSpec(kind, 5, TOP))
    return model


def scores(model: Idlm, hidden: Tensor, before: Tensor) -> Tensor:
    rows = RowsBefore(model.head(hidden), hidden, before)
    return heads.corrected(model.model, model.draft_heads[0], rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_computes_its_formula(tmp_path: Path, kind: str, tied: bool) -> None:
    """Against the oracle's loops over candidates; the other tokens keep the model's scores."""
    model = drafting(tiny.write(tmp_path, tie_word_embeddings=tied), kind)
    hidden = torch.randn(7, 32, dtype=torch.float64)
    before = torch.tensor([3, 1, 5, tiny.VOCAB - 1, 7, 7, 9])
    found, plain = scores(model, hidden, before), model.head(hidden)
    slow = slow_head(model)
    for row, token in enumerate(before.tolist()):
        expected = slow(torch.cat([plain[row], hidden[row]]), token)
        torch.testing.assert_close(found[row], expected, atol=1e-10, rtol=0)
        assert int((found[row] != plain[row]).sum()) == TOP
        assert torch.equal(slow(torch.cat([plain[row], hidden[row]]), None), plain[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_changes_nothing_and_every_matrix_can_learn(tmp_path: Path, kind: str) -> None:
    model = trained(tiny.write(tmp_path))
    head = model.draft_heads[0] = heads.new_head(model.model, HeadSpec(kind, 5, TOP))
    hidden, before = torch.randn(7, 32, dtype=torch.float64), torch.arange(7)
    assert torch.equal(scores(model, hidden, before), model.head(hidden))
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    for _ in range(2):  # the last matrix first: the others follow once it is not 0
        scores(model, hidden, before).log_softmax(-1)[:, 3].sum().backward()
        optimizer.step()
    assert all(bool(p.grad is not None and p.grad.any()) for p in head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_saved_beside_its_adapter(tmp_path: Path, kind: str) -> None:
    base = tiny.write(tmp_path / "base")
    model = drafting(base, kind)
    folder = save(model, tmp_path / "adapter")
    again = idlm.load(base, adapter=folder, dtype="float64")
    hidden, before = torch.randn(7, 32, dtype=torch.float64), torch.arange(7)
    assert torch.equal(scores(again, hidden, before), scores(model, hidden, before))
    assert not any(p.requires_grad for p in again.draft_heads[0].parameters())
    assert adapter.read(folder).head == HeadSpec(kind, 5, TOP)
    assert inspect_checkpoint(base, folder).draft_head == kind


def test_an_adapter_without_a_head_has_none(tmp_path: Path) -> None:
    base = tiny.write(tmp_path / "base")
    folder = save(trained(base), tmp_path / "adapter")
    assert not (folder / heads.FILE).exists() and "head" not in (folder / "idlm.json").read_text()
    assert idlm.load(base, adapter=folder).draft_heads == {}


def test_a_further_adapter_brings_its_own_head_and_takes_it_away(tmp_path: Path) -> None:
    base = tiny.write(tmp_path / "base")
    plain = save(trained(base), tmp_path / "plain")
    folder = save(drafting(base, "mlp"), tmp_path / "adapter")
    model = idlm.load(base, adapter=plain, dtype="float64")
    index = attach_loaded(model, read_more(model, folder))
    assert list(model.draft_heads) == [index] == [1]
    detach_loaded(model, index)
    assert model.draft_heads == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_model_keeps_its_head(tmp_path: Path, kind: str) -> None:
    model = idlm.load(tiny.write(tmp_path / "base"), dtype="float64")
    loading.ensure_mask_row(model)
    model.draft_heads[0] = random_head(model.model, HeadSpec(kind, 5, TOP))
    loading.save_full(model, tmp_path / "full", block_size=3)
    again = idlm.load(tmp_path / "full")
    assert inspect_checkpoint(tmp_path / "full").draft_head == kind
    hidden, before = torch.randn(7, 32, dtype=torch.float64), torch.arange(7)
    assert torch.equal(scores(again, hidden, before), scores(model, hidden, before))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("eagle", "'eagle', not markov, selector, mlp"),
        ({"kind": "eagle"}, "'eagle', not markov"),
        ({"kind": "mlp", "size": 0, "top": 3}, "size 0"),
        ({"kind": "mlp", "size": 4, "top": True}, "top True"),
        ({"kind": "mlp", "size": 7, "top": TOP}, r"shape \[5, 32\], not \[7, 32\]"),
        ({"kind": "markov", "size": 5, "top": TOP}, r"hidden.weight has shape .*, not None"),
    ],
)
def test_a_head_that_cannot_be_read_is_refused(tmp_path: Path, head: object, words: str) -> None:
    base = tiny.write(tmp_path / "base")
    folder = save(drafting(base, "mlp"), tmp_path / "adapter")
    tiny.edit(folder / "idlm.json", draft_head=head)
    with pytest.raises(InputError, match=words) as caught:
        idlm.load(base, adapter=folder)
    assert "\n" not in str(caught.value)


def test_missing_or_broken_tensors_of_a_head_are_refused(tmp_path: Path) -> None:
    base = tiny.write(tmp_path / "base")
    folder = save(drafting(base, "mlp"), tmp_path / "adapter")
    tensors = load_file(folder / heads.FILE)
    save_file(tensors | {"up.weight": tensors["up.weight"] * math.nan}, folder / heads.FILE)
    with pytest.raises(InputError, match=r"up\.weight is not finite"):
        idlm.load(base, adapter=folder)
    (folder / heads.FILE).unlink()
    with pytest.raises(InputError, match=f"no {heads.FILE}"):
        idlm.load(base, adapter=folder)


def test_the_file_is_small(tmp_path: Path) -> None:
    """At any vocabulary: no matrix has a row for each token."""
    base = tiny.write(tmp_path / "base")
    folder = save(drafting(base, "selector"), tmp_path / "adapter")
    assert all(tiny.VOCAB not in t.shape for t in load_file(folder / heads.FILE).values())
    assert json.loads((folder / "idlm.json").read_text())["draft_head"]["kind"] == "selector"
