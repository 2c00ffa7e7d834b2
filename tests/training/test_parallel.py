"""Several processes compute what one does: DDP and FSDP2, in float64 over gloo; checkpoints go from
one number of ranks to another."""

from __future__ import annotations

import errno
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm.errors import InputError
from idlm.models.adapter import fingerprint
from idlm.models.loading import load
from idlm.models.weights import whole
from idlm.training.config import TrainConfig
from idlm.training.corpus import Corpus
from idlm.training.loop import NotFinite, Trainer
from idlm.training.objective import Terms
from idlm.training.processes import alone, cannot_write, processes
from idlm.training.run import train as train_config
from idlm.training.setup import Trainee
from tests.training import ranks, tiny

STAGE: dict[str, Any] = {
    "steps": 3,
    "block_size": 3,
    "ce": [1, 0],
    "kl": 0.5,
    "tv": [0, 1],
    "depth_weights": "dpace",
}
KINDS = {
    "full": {**STAGE, "lambda": "auto"},
    "full without clean rows": {**STAGE, "lambda": 0},
    "lora": STAGE,
    "full by Muon": {**STAGE, "lambda": 0.2},
    "lora with a late entry": STAGE,
}
TEXTS = 8
"""Texts of a step, however many ranks there are."""


def config(folder: Path, kind: str, ranks: int, **changes: Any) -> TrainConfig:
    """Two micro-batches a step and rank; gradients are clipped."""
    return tiny.config(
        folder,
        **{
            "method": kind.split()[0],
            "model": {"path": "tiny", "dtype": "float64"},
            "stages": [KINDS[kind]],
            "lora": {"entry": int("late" in kind)},
            "batch_size": TEXTS // ranks // 2,
            "accumulation": 2,
            "eval_steps": 2,
            "optimizer": {
                "name": "muon" if "Muon" in kind else "adamw",
                **{"lr": 1e-2, "warmup": 0, "grad_clip": 0.5},
            },
            **changes,
        },
    )


def trainer(config: TrainConfig) -> Trainer:
    spec = replace(tiny.SPEC, entry=config.lora.entry)
    idlm = tiny.model(config.method, spec=spec)
    rows = tiny.examples()
    student = Trainee(idlm)
    if config.method == "lora":
        student = Trainee(idlm, spec, fingerprint(idlm.model))
    return Trainer(config, processes(config), student, Corpus(rows[:-4], rows[-4:], 0))


def gathered(run: Trainer) -> dict[str, Tensor]:
    """Weights and the optimizers' tensors, gathered."""
    names = {p: name for name, p in run.objective.named_parameters()}
    state = {name: whole(p) for p, name in names.items() if p.requires_grad}
    for optimizer in run.optimizers:
        for p, tensors in optimizer.state.items():
            state |= {f"{names[p]}.{key}": whole(t) for key, t in tensors.items()}
    return {name: tensor.clone() for name, tensor in state.items()}


def train(config: TrainConfig, out: Path) -> None:
    """Train, and write gradients, reports and the final state."""
    run, steps = trainer(config), []

    def keep(*_: Any) -> None:
        parameters = run.objective.named_parameters()
        steps.append({name: whole(p.grad).clone() for name, p in parameters if p.grad is not None})

    run.optimizers[0].optimizer.register_step_pre_hook(keep)
    run.run()
    state = gathered(run)
    if run.accelerator.is_main_process:
        torch.save({"gradients": steps, "reports": run.log.entries, "state": state}, out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path


def trained(folder: Path, kind: str, number: int, **changes: Any) -> dict[str, Any]:
    ranks.run(number, train, config(folder, kind, number, **changes), folder / "out.pt")
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_norms_and_reports_do_not_depend_on_the_ranks(folder: Path, kind: str) -> None:
    one = trained(folder, kind, 1)
    assert len(one["gradients"]) == 3
    assert [e["grad_norm"] > 0.5 for e in one["reports"] if "loss" in e] == [True] * 3  # clipped
    for parallel in ("ddp", "fsdp"):
        two = trained(folder, kind, 2, parallel=parallel)
        for mine, theirs in zip(one["gradients"], two["gradients"], strict=True):
            assert mine.keys() == theirs.keys() and len(mine) > 5
            difference = max(float((mine[n] - theirs[n]).abs().max()) for n in mine)
            assert difference < 1e-10, (parallel, difference)
        for mine, theirs in zip(one["reports"], two["reports"], strict=True):
            # FSDP without clean rows reports them all the same
            for key in set(mine) - {"tokens_per_second", "memory_gib"}:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-9), (parallel, key)
        if "Muon" in kind:  # whose updates are of one size, however small a gradient is
            assert one["state"].keys() == two["state"].keys()
            for name, tensor in one["state"].items():
                assert torch.allclose(tensor, two["state"][name], rtol=0, atol=1e-10), name


def resume(config: TrainConfig, saved: Path, out: Path) -> None:
    """Load a checkpoint and write the state as it is then; then train to the end."""
    run = trainer(config)
    run.load(saved)
    state = gathered(run)
    run.load(saved)
    run.run()
    last = gathered(run)
    if run.accelerator.is_main_process:
        torch.save({"state": state, "last": last}, out)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_moves_to_another_number_of_ranks(
    folder: Path, kind: str, before: int, after: int
) -> None:
    """The state is equal bit by bit; the steps after it, to the order of sums."""
    stop = {"stages": [{**KINDS[kind], "steps": 2}]}
    written = trained(folder, kind, before, parallel="fsdp", **stop)
    saved = folder / "run" / "checkpoint-2"
    again = config(folder, kind, after, parallel="fsdp", **stop)
    ranks.run(after, resume, again, saved, folder / "resumed.pt")
    read = torch.load(folder / "resumed.pt")
    assert read["state"].keys() == written["state"].keys()
    for name, tensor in written["state"].items():
        assert torch.equal(tensor, read["state"][name]), name
    if kind == "full":
        stored = dict(load(saved).model.named_parameters())
        for name, tensor in stored.items():
            assert torch.equal(tensor, written["state"][f"model.{name}"]), name


def poisoned(config: TrainConfig, folder: Path) -> None:
    """Train with a NaN in the second step of the second rank; write the error of each rank."""
    run, states = trainer(config), []
    rank = run.accelerator.process_index

    def poison(*arguments: Any) -> Terms:
        terms: Terms = arguments[-1]
        broken = rank == 1 and run.state.step == 1
        return Terms(*(term * torch.nan for term in terms)) if broken else terms

    run.objective.register_forward_hook(poison)
    run.optimizers[0].optimizer.register_step_post_hook(lambda *_: states.append(gathered(run)))
    with pytest.raises(NotFinite) as caught:
        run.run()
    assert len(states) == 1 and run.state.step == 1
    for name, tensor in gathered(run).items():
        assert torch.equal(tensor, states[0][name]), name
    (folder / f"error-{rank}").write_text(str(caught.value))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_rank_stops_all_before_the_step(
    folder: Path, parallel: str
) -> None:
    ranks.run(2, poisoned, config(folder, "lora", 2, parallel=parallel), folder)
    one, two = ((folder / f"error-{rank}").read_text() for rank in (0, 1))
    assert one == two and one.startswith("the loss of step 1 is nan in the batch of examples [")


def test_two_runs_do_not_write_to_one_folder(folder: Path) -> None:
    run = tiny.config(folder)
    kept = {file.name: file.read_bytes() for file in (folder / "run").iterdir()}
    with alone(folder / "run", processes(run)):
        with pytest.raises(InputError, match="another run writes to output_dir '.*/run'; wait"):
            train_config(run)
        left = {file.name: file.read_bytes() for file in (folder / "run").iterdir()}
    assert left.keys() - kept.keys() == {".lock"}


def test_what_a_launcher_would_change_unseen_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="the launcher sets ACCELERATE_USE_FSDP, which .* fsdp"):
        processes(tiny.config(folder))


def with_a_full_disk(config: TrainConfig, full: int, folder: Path) -> None:
    """Train; after the first checkpoint no file of rank `full` may be long. Write the error."""
    run = trainer(config)
    rank, save = run.accelerator.process_index, run.save

    def saved() -> None:
        save()
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    run.save = saved  # type: ignore[method-assign]
    with pytest.raises(InputError) as caught:
        run.run()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / f"error-{rank}").write_text(str(caught.value))


@pytest.mark.parametrize(
    ("kind", "number", "parallel"), [("lora", 1, "ddp"), ("full", 2, "ddp"), ("full", 2, "fsdp")]
)
def test_a_full_disk_of_one_rank_stops_all_and_leaves_the_checkpoint_before(
    folder: Path, kind: str, number: int, parallel: str
) -> None:
    settings = {"parallel": parallel, "save_steps": 1, "log_steps": 100}
    run = config(folder, kind, number, **settings)
    ranks.run(number, with_a_full_disk, run, number - 1, folder)
    errors = {(folder / f"error-{rank}").read_text() for rank in range(number)}
    (error,) = errors
    assert "cannot write" in error and "checkpoint-2" in error and "File too large" in error
    assert "make room" in error and "\n" not in error
    left = {file.name for file in (folder / "run").iterdir()}
    assert "checkpoint-1" in left and not left & {"checkpoint-2", ".writing"}
    ranks.run(number, resume, run, folder / "run" / "checkpoint-1", folder / "resumed.pt")


def test_a_disk_without_space_is_named() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    assert cannot_write("run/checkpoint-3", error) == (
        "cannot write 'run/checkpoint-3' (No space left on device); make room, then continue with "
        "resume: true"
    )
