"""What FSDP gathers and what a rank holds, by type, on two ranks over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from idlm.models.gated_lora import adapter_parameters
from idlm.training import setup
from idlm.training.config import TrainConfig
from idlm.training.corpus import Corpus
from idlm.training.loop import Trainer
from idlm.training.processes import placement, processes
from tests.training import ranks, tiny

BF16, FLOAT = torch.bfloat16, torch.float32
STEP = {"lr": 1e-3, "warmup": 0}
CASES = {
    # changes: gathered, held of the base, held of what is trained
    "a frozen base, bf16": ({"method": "lora", "bf16": True}, BF16, BF16),
    "a frozen base, float32": ({"method": "lora"}, FLOAT, BF16),
    "all weights, bf16": ({"method": "full", "bf16": True}, BF16, FLOAT),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, as nearly all are."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model(dtype=torch.bfloat16).model.save_pretrained(folder)
    return folder


def config(folder: Path, model: Path, number: int, **changes: Any) -> TrainConfig:
    (folder / "run").mkdir(exist_ok=True)
    what = {"path": str(model), "dtype": changes.pop("dtype", "float32")}
    rows = {"batch_size": 4 // number, "eval_steps": 2, "stages": [{"steps": 2, "block_size": 3}]}
    return tiny.config(folder, model=what, lora={"rank": 2}, **rows, **changes, optimizer=STEP)


def work(config: TrainConfig, out: Path) -> None:
    """Train two steps; write the types that the modules' forwards see, those held, and the loss."""
    accelerator, rows = processes(config), tiny.examples()
    student = setup.trainee(config, setup.base_model(config.model, *placement(accelerator)))
    torch.manual_seed(0)
    for weight in adapter_parameters(student.idlm.model).values():
        torch.nn.init.normal_(weight, std=0.3)
    run = Trainer(config, accelerator, student, Corpus(rows[:-4], rows[-4:], 0))
    seen: dict[str, set[str]] = {}

    def look(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        for name, weight in module.named_parameters(recurse=False):
            whole = "sharded" if isinstance(weight, DTensor) else str(weight.dtype)
            seen.setdefault(f"{names[module]}.{name}", set()).add(whole)

    names = {module: name for name, module in run.objective.named_modules()}
    for module in names:
        module.register_forward_pre_hook(look)
    run.run()
    if accelerator.is_main_process:
        held = {name: weight.dtype for name, weight in run.objective.named_parameters()}
        losses = [entry["loss"] for entry in run.log.entries if "loss" in entry]
        trained = {name for name, p in run.objective.named_parameters() if p.requires_grad}
        torch.save({"seen": seen, "held": held, "trained": trained, "losses": losses}, out)


def trained(folder: Path, model: Path, number: int, **changes: Any) -> dict[str, Any]:
    ranks.run(number, work, config(folder, model, number, **changes), folder / "out.pt")
    found: dict[str, Any] = torch.load(folder / "out.pt", weights_only=False)
    return found


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_part_and_gathers_what_it_computes_in(
    case: str, tmp_path: Path, model: Path
) -> None:
    """Trained weights are held in float32; a frozen base in its files' 16 bits, whatever it is
    gathered in. With one process, where nothing is gathered, the losses are the same; in bfloat16
    that of the first step is, but for a few roundings, 2^-9 of a value each."""
    changes, gathered, base = CASES[case]
    found = trained(tmp_path, model, 2, parallel="fsdp", **changes)
    layer = "model.model.layers.1.self_attn.q_proj"
    inside = {".lora_A", ".lora_B"} if changes["method"] == "lora" else {".weight"}
    assert {f"{layer}{name}" for name in inside} < found["seen"].keys()
    assert set.union(*found["seen"].values()) == {str(gathered)}
    of_trained = {dtype for name, dtype in found["held"].items() if name in found["trained"]}
    of_base = {dtype for name, dtype in found["held"].items() if name not in found["trained"]}
    assert of_trained == {FLOAT} and of_base <= {base}
    one = trained(tmp_path, model, 1, **changes)["losses"]
    assert len(one) == 2 and one[0] != one[1]
    assert found["losses"][0] == pytest.approx(one[0], rel=2**-7)
    if gathered == FLOAT:
        assert found["losses"] == pytest.approx(one, rel=1e-5)
