"""Layers that are computed again for their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from idlm.errors import InputError
from idlm.models.recomputation import recompute_layers
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from tests.training import tiny
from tests.training.reference import gradients
from tests.training.test_attention import FAMILIES, loss_and_gradients
from tests.training.test_objective import BATCHES


class Calls:
    """How often the layers of a model run."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                next(layer.children()).register_forward_pre_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", BATCHES)
def test_gradients_of_a_full_fine_tune(family: str, layout: str) -> None:
    idlm = tiny.family(*FAMILIES[family])
    idlm.model.train()
    calls = Calls(idlm.model)
    objective = Objective(idlm, trains_clean=True)
    torch.manual_seed(1)  # GPT-2 drops out
    reference = loss_and_gradients(objective, BATCHES[layout])
    assert calls.count == 4  # two layers, two halves
    recompute_layers(idlm)
    torch.manual_seed(1)
    mine = loss_and_gradients(objective, BATCHES[layout])
    assert calls.count == 4 + 8
    for name, gradient in mine.items():
        assert torch.equal(gradient, reference[name]), name


def test_gradients_of_a_gated_lora() -> None:
    idlm = tiny.model("lora")
    objective = Objective(idlm, trains_clean=False).train()
    wanted = Wanted(3, False, True, RowWeights(1.0, 0.5, 0.5, "dpace"))
    reference = gradients(idlm, objective(BATCHES["packed"], wanted).noisy)
    recompute_layers(idlm)
    for name, mine in gradients(idlm, objective(BATCHES["packed"], wanted).noisy).items():
        assert torch.equal(mine, reference[name]), name


def test_a_family_without_it_is_refused() -> None:
    idlm = tiny.model()
    idlm.model = torch.nn.Module()  # type: ignore[assignment]
    idlm.model.config = type("Config", (), {"model_type": "other"})  # type: ignore[assignment]
    with pytest.raises(InputError, match="other has no activation checkpointing"):
        recompute_layers(idlm)
