"""Muon gets the hidden matrices, AdamW the rest, and one schedule reaches both."""

from __future__ import annotations

import pytest
import torch

from idlm.training.config import OptimizerConfig
from idlm.training.optimizer import MuonAdamW, split_parameters
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


def test_one_learning_rate_reaches_both_parts_also_after_a_reload() -> None:
    model = tiny.model("full").model
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = MuonAdamW(model, OptimizerConfig(name="muon"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
