"""Draft heads in training: the loss of their corrected law, and their way to the disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from idlm import InputError, load
from idlm.models.heads import KINDS, HeadSpec
from idlm.models.idlm_model import Idlm
from idlm.training import losses
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from idlm.training.run import train
from tests.heads import random_head
from tests.models import tiny as checkpoints
from tests.training import tiny
from tests.training.reference import (
    documents,
    equals_the_loops,
    slow_logits,
    slow_terms,
)
from tests.training.test_objective import BATCHES

TOP = 7
HEAD = {"kind": "mlp", "size": 4, "top": TOP}


def with_head(method: str, kind: str, tied: bool = True) -> Idlm:
    idlm = tiny.model(method, tied=tied)
    idlm.draft_heads[0] = random_head(idlm.model, HeadSpec(kind, 5, TOP)).requires_grad_(True)
    return idlm


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize(("method", "tied"), [("full", True), ("full", False), ("lora", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_the_slow_ones(
    kind: str, method: str, tied: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of a few rows, each given the text's token at its place."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 3 * (tiny.VOCAB + TOP * 16))
    idlm, batch, weights = with_head(method, kind, tied), BATCHES[layout], (1.0, 0.3, 0.4)
    wanted = Wanted(4, clean=True, soft=True, weights=RowWeights(*weights))
    equals_the_loops(idlm, method, batch, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_measurement_is_of_the_corrected_law(kind: str) -> None:
    idlm, batch = with_head("lora", kind), BATCHES["alone"]
    objective = Objective(idlm, trains_clean=False)
    found = objective.measure(batch, 3)
    tv = slow_terms(idlm, batch, 3)[3].detach()
    assert float(found[1].sum()) == pytest.approx(float((1 - tv).sum()), rel=1e-12)
    objective.draft_head = None
    assert not torch.allclose(objective.measure(batch, 3), found)


def test_dpace_weighs_rows_by_the_corrected_law() -> None:
    idlm, batch = with_head("lora", "mlp"), BATCHES["alone"]
    wanted = Wanted(3, clean=False, weights=RowWeights(depth="dpace"))
    with_it = Objective(idlm, trains_clean=False)
    rows = with_it.noisy_rows(with_it.clean_half(batch)[0], wanted)
    weights = with_it._weights_of_rows(rows, wanted)
    with_it.draft_head = None
    assert not torch.allclose(with_it._weights_of_rows(rows, wanted), weights)


def run(folder: Path, **changes: Any) -> Path:
    if not (folder / "data.jsonl").exists():
        checkpoints.write(folder / "model", mask="<mask>")
        tiny.write_jsonl(folder / "data.jsonl", tiny.examples())
    train(tiny.config(folder, **changes))
    return folder / "run" / "final"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_head_is_trained_and_saved_with_its_adapter_or_model(
    tmp_path: Path, method: str, kind: str
) -> None:
    final = run(tmp_path, method=method, head={**HEAD, "kind": kind})
    loaded = (
        load(tmp_path / "model", adapter=final) if method == "lora" else load(final)
    ).draft_heads[0]
    assert loaded.spec == HeadSpec(kind, 4, TOP)
    assert all(bool(weight.any()) for weight in loaded.parameters())


def test_training_goes_on_with_the_head_of_a_checkpoint(tmp_path: Path) -> None:
    stages = [{"steps": 4, "block_size": 2}]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finals = [run(whole, method="lora", head=HEAD, stages=stages, save_steps=2)]
    run(halves, method="lora", head=HEAD, stages=stages, save_steps=2)
    latest = sorted((halves / "run").glob("checkpoint-*"))
    assert latest
    for folder in latest[1:]:
        folder.rename(halves / f"away-{folder.name}")
    finals.append(run(halves, method="lora", head=HEAD, stages=stages, save_steps=2, resume=True))
    heads = [
        load(folder / "model", adapter=final).draft_heads[0].state_dict()
        for folder, final in zip((whole, halves), finals, strict=True)
    ]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_a_model_trained_without_a_head_has_none(tmp_path: Path) -> None:
    first = run(tmp_path, head=HEAD)
    final = run(tmp_path, model={"path": str(first)}, output_dir=str(tmp_path / "run2"))
    assert load(final).draft_heads
    again = load(tmp_path / "run2" / "final")
    assert again.draft_heads == {} and "draft_head" not in again.model.config.to_dict()


def test_a_head_without_drafts_is_refused(tmp_path: Path) -> None:
    for head, words in (({"kind": "mlp"}, "objective: ar"), ({"top": 0}, "head.top")):
        with pytest.raises(InputError, match=words):
            tiny.config(tmp_path, objective="ar", head=head)


def test_slow_logits_know_the_token_before() -> None:
    """The reference itself: another token before changes a MASK row."""
    idlm = with_head("lora", "markov")
    document = documents(BATCHES["alone"])[0]
    noisy, _ = slow_logits(idlm, document, 3)
    place = document.masked[0]
    document.tokens[place] = (document.tokens[place] + 1) % (tiny.VOCAB - 1)
    assert not torch.allclose(slow_logits(idlm, document, 3)[0][place], noisy[place])
