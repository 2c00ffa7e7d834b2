"""Muon gets the hidden matrices, AdamW the rest, and one schedule reaches both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import get_scheduler

from idlm.training.checkpoint import load_optimizers, save_optimizers
from idlm.training.config import OptimizerConfig
from idlm.training.muon import Muon
from idlm.training.optimizer import learning_rate, optimizers, split_by_decay, split_parameters
from tests.training import tiny


@pytest.mark.parametrize(("method", "tied"), [("full", True), ("full", False), ("lora", True)])
def test_split(method: str, tied: bool) -> None:
    model = tiny.model(method, tied=tied).model
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, rest = ({names[id(p)] for p in part} for part in split_parameters(model))
    assert matrices | rest == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not matrices & rest
    if method == "lora":
        assert rest == {"model.embed_tokens.mask_row"}
    else:
        assert all("_proj" in name or "c_fc" in name for name in matrices)
        assert ("lm_head.weight" in rest) == (not tied) and "model.embed_tokens.weight" in rest


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_learning_rate_reaches_all_parts_also_after_a_reload(tmp_path: Path, name: str) -> None:
    model = tiny.model("full").model
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    parts = optimizers(model, OptimizerConfig(name=name))
    assert len(parts) == (2 if name == "muon" else 1)
    for part in parts:
        part.step()
    save_optimizers(model, parts, tmp_path)
    loaded = optimizers(model, OptimizerConfig(name=name))
    load_optimizers(model, loaded, tmp_path)
    for part, other in zip(parts, loaded, strict=True):
        assert len(part.state) == len(other.state) > 0
        for p, state in part.state.items():
            assert state.keys() == other.state[p].keys()
            assert all(torch.equal(state[key], other.state[p][key]) for key in state)
    before = [p.detach().clone() for p in model.parameters()]
    take_step(loaded, 0.0)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    take_step(loaded, 0.1)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_step_of_muon_is_pytorchs_bit_by_bit() -> None:
    torch.manual_seed(0)
    shapes, ours, theirs = [(8, 24), (24, 8), (16, 16)], list[nn.Parameter](), list[nn.Parameter]()
    for shape in shapes:
        ours.append(nn.Parameter(torch.randn(shape)))
        theirs.append(nn.Parameter(ours[-1].detach().clone()))
    muon = Muon(ours, 0.1, 0.01)
    stock = torch.optim.Muon(theirs, 0.1, 0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        muon.step()
        stock.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


def take_step(parts: list[Optimizer], rate: float) -> None:
    for part in parts:
        for group in part.param_groups:
            group["lr"] = rate
        part.step()


def test_norms_and_biases_do_not_decay() -> None:
    for method in ("full", "lora"):
        model = tiny.model(method).model
        decayed, rest = split_by_decay(model)
        names = {id(p): name for name, p in model.named_parameters()}
        assert len(decayed) + len(rest) == sum(p.requires_grad for p in model.parameters())
        assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in rest)
        assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_are_those_of_transformers(schedule: str, warmup: int) -> None:
    config = OptimizerConfig(lr=0.3, schedule=schedule, warmup=warmup, decay=0.4)  # type: ignore[arg-type]
    stock = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    kind = "warmup_stable_decay" if schedule == "wsd" else schedule
    more = {"num_decay_steps": 12, "decay_type": "linear"} if schedule == "wsd" else None
    scheduler = get_scheduler(kind, stock, warmup, 30, more)
    for step in range(30):
        assert learning_rate(config, step, 30) == pytest.approx(
            scheduler.get_last_lr()[0], rel=1e-15, abs=1e-16
        )
        stock.step()
        scheduler.step()
