"""The Trainer: gradients, curriculum, the stop at NaN, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from idlm.models.idlm_model import Idlm
from idlm.training.config import TrainConfig
from idlm.training.data import Corpus
from idlm.training.measure import tpf
from idlm.training.objective import Objective
from idlm.training.setup import training_arguments
from idlm.training.trainer import IdlmTrainer, NotFinite
from tests.training import tiny

AUTO = {"steps": 2, "block_size": 3, "lambda": "auto", "soft": "tv", "soft_weight": 0.5}


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


def trainer(config: TrainConfig, idlm: Idlm) -> IdlmTrainer:
    rows = tiny.examples()
    objective = Objective(idlm, trains_clean=config.method == "full")
    Path(config.output_dir).mkdir(exist_ok=True)
    return IdlmTrainer(config, training_arguments(config), objective, Corpus(rows[:-4], rows[-4:], 0))


def gradients(folder: Path, method: str, batch: int, accumulation: int) -> list[dict[str, Tensor]]:
    stage = AUTO if method == "full" else {k: v for k, v in AUTO.items() if k != "lambda"}
    config = tiny.config(folder, method=method, stages=[stage], batch_size=batch, accumulation=accumulation)
    run = trainer(config, tiny.model(method))
    kept = Gradients()
    run.add_callback(kept)
    run.train()
    return kept.steps


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_does_not_depend_on_the_split_over_accumulation(tmp_path: Path, method: str) -> None:
    whole, *splits = (gradients(tmp_path, method, b, a) for b, a in [(8, 1), (4, 2), (1, 8)])
    assert len(whole) == 2
    for split in splits:
        for step, (one, other) in enumerate(zip(whole, split, strict=True)):
            assert one.keys() == other.keys() and len(one) > 5
            for name in one:
                # after the first step the weights differ in their last bits already
                torch.testing.assert_close(other[name], one[name], rtol=1e-7, atol=1e-12 if step == 0 else 1e-9)


def test_a_curriculum_switches_stages_in_one_run(tmp_path: Path) -> None:
    stages = [{"steps": 2, "block_size": 1}, {"steps": 1, "block_size": 4, "soft": "kl"}]
    run = trainer(tiny.config(tmp_path, stages=stages, eval_steps=1), tiny.model())
    run.train()
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [e for e in entries if "alpha" in e]
    assert [(e["step"], e["block_size"], len(e["alpha"])) for e in measured] == [(1, 1, 1), (2, 1, 1), (3, 4, 4)]
    assert ["kl" in e for e in entries if "loss" in e] == [False, False, True]
    assert all(e["tpf"] == pytest.approx(tpf(e["acceptance"])) for e in measured)


def test_the_loss_falls_and_the_schedule_spans_all_stages(tmp_path: Path) -> None:
    stages = [{"steps": 20, "block_size": 1}, {"steps": 20, "block_size": 2}]
    run = trainer(tiny.config(tmp_path, stages=stages), tiny.model())
    run.train()
    losses = [e["ce_noisy"] for e in run.state.log_history if "ce_noisy" in e]
    rates = [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.01 * rates[0]


def test_wsd_stays_and_falls(tmp_path: Path) -> None:
    optimizer = {"lr": 1e-3, "schedule": "wsd", "decay": 0.5, "warmup": 2}
    run = trainer(tiny.config(tmp_path, stages=[{"steps": 12}], optimizer=optimizer), tiny.model())
    run.train()
    rates = [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e]
    assert rates[2:6] == [1e-3] * 4
    assert rates[6:] == sorted(rates[6:], reverse=True) and rates[-1] < 2.1e-4


def test_tpf_is_the_sum_of_products() -> None:
    assert tpf([0.5, 0.4]) == pytest.approx(1 + 0.5 + 0.5 * 0.4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_nan_stops_before_the_step_and_names_the_batch(tmp_path: Path, method: str, optimizer: str) -> None:
    idlm = tiny.model(method, tied=False)
    config = tiny.config(
        tmp_path, method=method, stages=[{"steps": 30, "block_size": 2}], optimizer={"name": optimizer}
    )
    run = trainer(config, idlm)
    poisoned, broken = run.train_dataset[13]["example"], tiny.MASK - 1  # a token that no other example has
    run.data.training[poisoned].response[0] = broken
    with torch.no_grad():
        idlm.model.get_input_embeddings().weight[broken] = torch.nan
    before: list[dict[str, Tensor]] = []

    class Snapshot(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before.append({n: p.detach().clone() for n, p in idlm.model.named_parameters()})

    run.add_callback(Snapshot())
    with pytest.raises(NotFinite) as caught:
        run.train()
    message = str(caught.value)
    assert f"step {len(before) - 1}" in message and f"row {poisoned}" in message and "\n" not in message
    assert run.state.global_step == len(before) - 1
    for name, p in idlm.model.named_parameters():
        assert torch.equal(p.detach().nan_to_num(), before[-1][name].nan_to_num()), name


def test_infinite_gradient_of_a_finite_loss_stops_before_the_step(tmp_path: Path) -> None:
    idlm = tiny.model()
    run = trainer(tiny.config(tmp_path, stages=[{"steps": 3, "block_size": 2}]), idlm)
    weight = idlm.model.get_input_embeddings().weight
    weight.register_hook(lambda gradient: gradient * torch.inf if run.state.global_step == 1 else gradient)
    with pytest.raises(NotFinite, match="gradient norm of step 1 .* examples"):
        run.train()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_resume_is_bit_identical_and_checkpoints_hold_only_what_is_trained(
    tmp_path: Path, method: str, optimizer: str
) -> None:
    stage = {"steps": 9, "block_size": 3, "soft": "kl"} | ({"lambda": "auto"} if method == "full" else {})
    config = tiny.config(
        tmp_path, method=method, stages=[stage], save_steps=3, optimizer={"name": optimizer, "lr": 1e-2}
    )
    straight = tiny.model(method)
    trainer(config, straight).train()
    checkpoints = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-6", "checkpoint-9"]
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / "checkpoint-6" / "trainable.safetensors", "pt") as saved:
        names = set(saved.keys())
    trained = {f"model.{n}" for n, p in straight.model.named_parameters() if p.requires_grad}
    assert names == trained | {"balance"}
    if method == "lora":
        assert all(n.endswith(("lora_A", "lora_B", "mask_row", "balance")) for n in names)
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    resumed = tiny.model(method)
    trainer(config, resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    for (name, one), other in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
