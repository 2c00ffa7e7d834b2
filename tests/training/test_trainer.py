"""The loop: gradients, curriculum, the stop at NaN, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from idlm.errors import InputError
from idlm.models.adapter import fingerprint
from idlm.models.idlm_model import Idlm
from idlm.training.config import TrainConfig
from idlm.training.corpus import Corpus
from idlm.training.loop import NotFinite, Trainer
from idlm.training.objective import Objective, Wanted
from idlm.training.processes import processes
from idlm.training.setup import Trainee
from tests.training import tiny

AUTO = {
    "steps": 2,
    "block_size": 3,
    "ce": [1, 0],
    "kl": 0.5,
    "tv": [0, 1],
    "lk": 3,
    "depth_weights": "dpace",
    "lambda": "auto",
}


def trainer(config: TrainConfig, idlm: Idlm) -> Trainer:
    rows = tiny.examples()
    Path(config.output_dir).mkdir(exist_ok=True)
    student = Trainee(idlm)
    if config.method == "lora":
        student = Trainee(idlm, tiny.SPEC, fingerprint(idlm.model))
    return Trainer(
        config, processes(config), student, Corpus(rows[:-4], rows[-4:], limit=tiny.CONTEXT)
    )


def log(folder: Path) -> list[dict[str, Any]]:
    """Every report of the run, without what depends on the clock and the process."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        measured = {entry.pop("tokens_per_second", 1.0), entry.pop("memory_gib", 1.0)}
        assert ("loss" in entry) == (measured != {1.0}) and min(measured) > 0
    return entries


def gradients(folder: Path, method: str, **keys: Any) -> list[dict[str, Tensor]]:
    """The gradients of every step."""
    stage = AUTO if method == "full" else {k: v for k, v in AUTO.items() if k != "lambda"}
    config = tiny.config(folder, method=method, stages=[stage], **keys)
    run = trainer(config, tiny.model(method))
    steps: list[dict[str, Tensor]] = []

    def keep(*_: Any) -> None:
        parameters = run.objective.named_parameters()
        steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    run.optimizers[0].optimizer.register_step_pre_hook(keep)
    run.run()
    return steps


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("keys", [{}, {"phases": 2}, {"packing": True}], ids=str)
def test_gradient_does_not_depend_on_the_split_over_accumulation(
    tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    whole, *splits = (
        gradients(tmp_path, method, batch_size=b, accumulation=a, **keys)
        for b, a in [(8, 1), (4, 2), (1, 8)]
    )
    assert len(whole) == 2
    for split in splits:
        for step, (one, other) in enumerate(zip(whole, split, strict=True)):
            assert one.keys() == other.keys() and len(one) > 5
            for name in one:
                # after the first step the weights differ in their last bits already
                torch.testing.assert_close(
                    other[name], one[name], rtol=1e-7, atol=1e-12 if step == 0 else 1e-9
                )


def test_the_loss_is_the_mean_over_phases(tmp_path: Path) -> None:
    stages = [{"steps": 1, "block_size": 2, "kl": 0.5}]
    first = {}
    for phases in (1, 2, 3):  # of 2 there are
        run = trainer(tiny.config(tmp_path, stages=stages, phases=phases), tiny.model())
        single = run.micro_batches()[0].texts
        run.run()
        first[phases] = next(e["ce_noisy"] for e in log(tmp_path) if "ce_noisy" in e)
    objective, means = Objective(tiny.model(), True), []
    for shift in (0, 1):
        texts = single._replace(phase=single.phase + shift)
        terms = objective(texts, Wanted(2, clean=True, soft=True))
        means.append(float(terms.ce) / int(texts.masked.sum()))
    assert first[1] == pytest.approx(means[0], rel=1e-12)
    assert first[2] == pytest.approx(sum(means) / 2, rel=1e-12)
    assert first[3] == first[2]


def test_a_curriculum_switches_stages_in_one_run(tmp_path: Path) -> None:
    stages = [{"steps": 2, "block_size": 1}, {"steps": 1, "block_size": 4, "kl": 1}]
    run = trainer(tiny.config(tmp_path, stages=stages, eval_steps=1), tiny.model())
    run.run()
    entries = log(tmp_path)
    measured = [e for e in entries if "alpha" in e]
    assert [(e["step"], e["block_size"], len(e["alpha"])) for e in measured] == [
        (1, 1, 1),
        (2, 1, 1),
        (3, 4, 4),
    ]
    assert ["kl" in e for e in entries if "loss" in e] == [False, False, True]
    assert all(1 <= e["tpf_chain"] <= e["tpf"] <= e["block_size"] + 1 for e in measured)
    assert [len(e["acceptance_reached"]) for e in measured] == [1, 1, 4]


def test_the_loss_falls_and_the_schedule_spans_all_stages(tmp_path: Path) -> None:
    stages = [{"steps": 20, "block_size": 1}, {"steps": 20, "block_size": 2}]
    run = trainer(tiny.config(tmp_path, stages=stages), tiny.model())
    run.run()
    losses = [e["ce_noisy"] for e in log(tmp_path) if "ce_noisy" in e]
    rates = [e["learning_rate"] for e in log(tmp_path) if "learning_rate" in e]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.01 * rates[0]


def test_wsd_stays_and_falls(tmp_path: Path) -> None:
    optimizer = {"lr": 1e-3, "schedule": "wsd", "decay": 0.5, "warmup": 2}
    run = trainer(tiny.config(tmp_path, stages=[{"steps": 12}], optimizer=optimizer), tiny.model())
    run.run()
    rates = [e["learning_rate"] for e in log(tmp_path) if "learning_rate" in e]
    assert rates[2:6] == [1e-3] * 4
    assert rates[6:] == sorted(rates[6:], reverse=True) and rates[-1] < 2.1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_nan_stops_before_the_step_and_names_the_batch(
    tmp_path: Path, method: str, optimizer: str
) -> None:
    idlm = tiny.model(method, tied=False)
    config = tiny.config(
        tmp_path,
        method=method,
        stages=[{"steps": 30, "block_size": 2}],
        optimizer={"name": optimizer},
    )
    run = trainer(config, idlm)
    poisoned, broken = (
        run.plan.step(3).batches[0][1][0].document,
        tiny.MASK - 1,
    )  # a token that no other example has
    example = run.data.training[poisoned]
    example.tokens[example.answers[0][0]] = broken
    with torch.no_grad():
        idlm.model.get_input_embeddings().weight[broken] = torch.nan
    before: list[dict[str, Tensor]] = []

    def snapshot(*_: Any) -> None:
        before.append({n: p.detach().clone() for n, p in idlm.model.named_parameters()})

    run.objective.register_forward_pre_hook(snapshot)
    with pytest.raises(NotFinite) as caught:
        run.run()
    message = str(caught.value)
    assert (
        f"step {len(before) - 1}" in message
        and f"row {poisoned}" in message
        and "\n" not in message
    )
    assert run.state.step == len(before) - 1
    for name, p in idlm.model.named_parameters():
        assert torch.equal(p.detach().nan_to_num(), before[-1][name].nan_to_num()), name


def test_infinite_gradient_of_a_finite_loss_stops_before_the_step(tmp_path: Path) -> None:
    idlm = tiny.model()
    run = trainer(tiny.config(tmp_path, stages=[{"steps": 3, "block_size": 2}]), idlm)
    weight = idlm.model.get_input_embeddings().weight
    weight.register_hook(lambda gradient: gradient * torch.inf if run.state.step == 1 else gradient)
    with pytest.raises(NotFinite, match="gradient norm of step 1 .* examples"):
        run.run()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_resume_is_bit_identical_and_checkpoints_hold_only_what_is_trained(
    tmp_path: Path, method: str, optimizer: str
) -> None:
    stage = {k: v for k, v in AUTO.items() if method == "full" or k != "lambda"} | {"steps": 9}
    config = tiny.config(
        tmp_path,
        method=method,
        stages=[stage],
        save_steps=3,
        optimizer={"name": optimizer, "lr": 1e-2},
    )
    straight = tiny.model(method)
    trainer(config, straight).run()
    reports = log(tmp_path)
    checkpoints = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-6", "checkpoint-9"]
    saved = tmp_path / "run" / "checkpoint-6"
    tensors = {file.name: set(load_file(file)) for file in saved.glob("*.safetensors")}
    trained = {n for n, p in straight.model.named_parameters() if p.requires_grad}
    files = (saved / "optimizer").glob("*.safetensors")
    state = {name.rpartition(".")[0] for file in files for name in load_file(file)}
    assert state == {f"model.{n}" for n in trained}
    names = {n.removeprefix("base_model.model.") for each in tensors.values() for n in each}
    if method == "lora":
        assert all(n.endswith(("lora_A", "lora_B", "mask_row")) for n in trained)
        names = {
            n.removesuffix(".weight").replace("mask_row", "model.embed_tokens.mask_row")
            for n in names
        }
    assert names == trained
    assert ("balance" in json.loads((saved / "state.json").read_text())) and not (
        saved / ".writing"
    ).exists()
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    resumed = tiny.model(method)
    again = trainer(config, resumed)
    again.load(saved)
    again.run()
    for (name, one), other in zip(
        straight.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    steps = [entry["step"] for entry in log(tmp_path)]
    assert steps == sorted(steps)
    assert log(tmp_path) == reports


@pytest.mark.parametrize("keys", [
    {"batch_size": 2, "packing": True},
    {"batch_size": None, "batch_tokens": 100, "accumulation": 3},
    {"batch_size": None, "batch_tokens": 100, "packing": True, "accumulation": 2},
])  # fmt: skip
def test_packed_and_uneven_batches_resume_bit_identical(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Batches of tokens have different numbers of rows, and steps of documents."""
    stages = [{"steps": 8, "block_size": 2}]
    config = tiny.config(tmp_path, stages=stages, save_steps=3, **keys)
    straight, resumed = tiny.model(), tiny.model()
    first = trainer(config, straight)
    first.run()
    reports = log(tmp_path)
    assert all(0 <= entry["padding"] < 0.4 for entry in reports if "loss" in entry)
    steps = [first.plan.step(index) for index in range(8)]
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "state.json").read_text())
    assert state["documents"] == sum(step.documents for step in steps[:6])
    assert state["tokens"] == sum(step.tokens for step in steps[:6])
    assert len({step.documents for step in steps}) > 1
    second = trainer(config, resumed)
    second.load(tmp_path / "run" / "checkpoint-6")
    second.run()
    assert log(tmp_path) == reports and second.state == first.state
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_document_longer_than_a_batch_is_refused(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, batch_size=None, batch_tokens=8)
    with pytest.raises(InputError, match="batch_tokens is 8 but a document has 1. tokens; raise"):
        trainer(config, tiny.model())


def test_a_resumed_run_drops_out_the_same_and_reports_the_same(tmp_path: Path) -> None:
    """Dropout uses random numbers, and the run resumes between two reports."""
    config = tiny.config(
        tmp_path, stages=[{"steps": 6, "block_size": 2}], save_steps=4, log_steps=3
    )

    def model() -> Idlm:
        idlm = tiny.model()
        for layer in idlm.model.model.layers:
            layer.residual_dropout = layer.mlp.residual_dropout = 0.3
        return idlm

    trainer(config, tiny.model()).run()
    without = log(tmp_path)
    straight, resumed = model(), model()
    trainer(config, straight).run()
    reports = log(tmp_path)
    assert reports[0]["ce_noisy"] != without[0]["ce_noisy"]  # there is dropout
    again = trainer(config, resumed)
    again.load(tmp_path / "run" / "checkpoint-4")
    again.run()
    assert [entry["step"] for entry in reports] == [3, 6, 6] and log(tmp_path) == reports
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
