"""`train` from config to exported model: killed and resumed, reloaded, in two processes;
refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

import idlm.nano.source  # noqa: F401  # registers `source: nano`
from idlm.cli import app
from idlm.errors import InputError
from idlm.models.loading import load
from idlm.nano.tokenizer import train_tokenizer
from idlm.training.config import TrainConfig, as_tree
from idlm.training.layout import Texts
from idlm.training.objective import Objective
from idlm.training.run import train
from tests.training import tiny
from tests.training.reference import hidden_of
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from idlm.training.config import load_config
from idlm.training.run import train
train(load_config(sys.argv[1]))
"""
KILLED = """
import os
import signal
import sys
from idlm.training import checkpoint
from idlm.training.config import load_config
from idlm.training.run import train

save_file = checkpoint.save_file

def save_and_die(tensors, path):
    save_file(tensors, path)
    if "checkpoint-24" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_and_die
train(load_config(sys.argv[1]))
"""
"""By itself, within a checkpoint: whoever watches from outside may come too late."""
LORA = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its data."""
    tiny.model("full", torch.float32).model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small tokenizer, made like the project's own."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(vocab_size=300, problems=50).save_pretrained(path)
    return str(path)


def config(folder: Path, method: str, **changes: Any) -> TrainConfig:
    return tiny.config(folder, method=method, lora=LORA, **changes)


def start(
    run: TrainConfig, folder: Path, launcher: tuple[str, ...] = ("-c", RUN)
) -> subprocess.Popen[bytes]:
    """Start the run in a process of its own."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(as_tree(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launcher, str(path)],
        env=environment,
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an exported model or adapter."""
    from safetensors.torch import load_file

    return {
        f"{p.name}/{k}": t
        for p in sorted(folder.glob("*.safetensors"))
        for k, t in load_file(p).items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return (
        one.keys() == other.keys()
        and len(one) > 1
        and all(torch.equal(one[k], other[k]) for k in one)
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_and_resumed_is_bit_identical(folder: Path, method: str) -> None:
    long = {
        "stages": [{"steps": 30, "block_size": 2}, {"steps": 30, "block_size": 3, "tv": 1}],
        "save_steps": 3,
    }
    train(config(folder, method, output_dir=str(folder / "straight"), **long))
    killed = config(folder, method, output_dir=str(folder / "killed"), **long)
    assert start(killed, folder, ("-c", KILLED)).wait(HANG_SECONDS) == -9
    assert list((folder / "killed" / ".writing" / "checkpoint-24").iterdir())
    assert not (folder / "killed" / "checkpoint-24").exists()
    assert not (folder / "killed" / "final").exists()
    with pytest.raises(InputError, match="holds checkpoint-"):
        train(killed)
    result = train(config(folder, method, output_dir=str(folder / "killed"), resume=True, **long))
    assert result["steps"] == 60
    assert same(weights(folder / "straight" / "final"), weights(folder / "killed" / "final"))
    assert not same(weights(folder / "straight" / "final"), weights(folder / "model"))


def test_resume_needs_the_same_config(folder: Path) -> None:
    train(config(folder, "lora", save_steps=2))
    with pytest.raises(InputError, match="cannot resume: optimizer.lr was 0.01, now it is 0.02"):
        train(
            config(folder, "lora", save_steps=2, resume=True, optimizer={"lr": 0.02, "warmup": 0})
        )
    assert train(config(folder, "lora", save_steps=1, resume=True))["steps"] == 3


def test_resume_without_a_checkpoint_starts(folder: Path) -> None:
    assert train(config(folder, "lora", resume=True))["steps"] == 3


def laws(objective: Objective, texts: Texts, block_size: int) -> list[Tensor]:
    """Log-probabilities of the supervised MASK rows and clean rows."""
    return [objective.log_law(rows) for rows in hidden_of(objective, texts, block_size)[1:]]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_exported_model_gives_the_trained_logits(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Objective] = []
    original = Objective.__init__

    def keep(self: Objective, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        trained.append(self)

    monkeypatch.setattr(Objective, "__init__", keep)
    result = train(
        config(
            folder, method, stages=[{"steps": 4, "block_size": 1}, {"steps": 4, "block_size": 3}]
        )
    )
    final = Path(result["output"])
    again = load(folder / "model", adapter=final) if method == "lora" else load(final)
    assert again.block_size == 3
    batch = tiny.texts([(2, 8), (3, 5)], [0, 1])
    with torch.no_grad():
        mine = laws(trained[0].eval(), batch, 3)
        theirs = laws(Objective(again, trains_clean=False).eval(), batch, 3)
    assert mine[0].shape[0] == 11
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
    base = laws(Objective(load(folder / "model"), trains_clean=False), batch, 0)[1]
    assert torch.equal(base, theirs[1]) == (method == "lora")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_is_loadable_as_it_is(folder: Path, method: str) -> None:
    stages = [{"steps": 2, "block_size": 2}, {"steps": 2, "block_size": 3}]
    final = Path(train(config(folder, method, stages=stages, save_steps=2))["output"])
    for step, block_size in ((2, 2), (4, 3)):
        saved = folder / "run" / f"checkpoint-{step}"
        again = load(folder / "model", adapter=saved) if method == "lora" else load(saved)
        assert again.block_size == block_size
    end = load(folder / "model", adapter=final) if method == "lora" else load(final)
    for (name, one), other in zip(
        end.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert not same(
        weights(folder / "run" / "checkpoint-2"), weights(folder / "run" / "checkpoint-4")
    )


def test_plain_ar_from_scratch(folder: Path, tokenizer: str) -> None:
    architecture = {k: v for k, v in tiny.KEYS.items() if not k.endswith("_token_id")} | {
        "vocab_size": 320
    }
    run = tiny.config(
        folder,
        objective="ar",
        stages=[{"steps": 12}],
        data={"source": "nano", "examples": 48, "held_out": 4, "max_length": 400},
        model={
            "architecture": {"model_type": "qwen3", **architecture, "max_position_embeddings": 512},
            "tokenizer": tokenizer,
        },
    )
    result = train(run)
    losses = [
        json.loads(line).get("loss")
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert result["held_out_ce"] < [x for x in losses if x][0]
    final = load(result["output"])
    assert final.tokenizer is not None and final.mask_id == final.tokenizer.mask_token_id
    assert final.block_size is None


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bf16_keeps_float32_weights(folder: Path, method: str) -> None:
    result = train(config(folder, method, bf16=True))
    assert {t.dtype for t in weights(Path(result["output"])).values()} == {torch.float32}


def test_a_frozen_base_in_bfloat16_has_an_adapter_in_float32(folder: Path) -> None:
    """A run in bfloat16 learns what a run in float32 learns, up to rounding, and resumes."""
    half, whole = ({"path": str(folder / "model"), "dtype": d} for d in ("bfloat16", "float32"))
    first = train(config(folder, "lora", model=half, log_steps=1, save_steps=2))
    log = (folder / "run" / "metrics.jsonl").read_text()
    adapter = weights(Path(first["output"]))
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    assert any(bool((t != t.bfloat16()).any()) for t in adapter.values()), "masters"
    for end in ("final", "checkpoint-3"):
        shutil.rmtree(folder / "run" / end)
    train(config(folder, "lora", model=half, log_steps=1, save_steps=2, resume=True))
    again = load(folder / "model", adapter=folder / "run" / "final", dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert same(weights(folder / "run" / "final"), adapter)
    reference = train(config(folder, "lora", model=whole, output_dir=str(folder / "float32")))
    assert abs(first["loss"] - reference["loss"]) < 0.05 * reference["loss"], log


def test_a_full_fine_tune_in_bfloat16_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="set bf16: true"):
        config(folder, "full", model={"path": str(folder / "model"), "dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"model_type": "qwenn"}, ["model_type", "'qwenn'"]),
        (
            {"model_type": "qwen3", "hiden_size": 8},
            [
                "model.architecture.hiden_size",
                "nearest known key is model.architecture.hidden_size",
            ],
        ),
        ({"model_type": "qwen3", "vocab_size": 5}, ["vocab_size is 5"]),
        ({"model_type": "qwen3", "num_attention_heads": "x"}, ["model.architecture is refused"]),
        ({}, ["model_type is None"]),
    ],
)
def test_bad_architectures_are_refused(
    folder: Path, tokenizer: str, architecture: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        train(
            tiny.config(
                folder, objective="ar", model={"architecture": architecture, "tokenizer": tokenizer}
            )
        )
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_the_command_prints_one_json_object(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(as_tree(config(folder, "lora"))))
    done = CliRunner().invoke(app, ["train", str(path), "--stages.0.steps=2", "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and len(result["acceptance"]) == 2
    wrong = CliRunner().invoke(app, ["train", str(path), "--stages.0.stepps=2"])
    assert wrong.exit_code == 2
    assert wrong.stdout == "" and "stages.0.steps" in wrong.stderr and wrong.stderr.count("\n") == 1


UNEVEN = {"batch_size": None, "batch_tokens": 60}


@pytest.mark.parametrize("keys", [
    ({"batch_size": 8}, {"batch_size": 4}),
    ({**UNEVEN, "packing": True, "accumulation": 4}, {**UNEVEN, "packing": True, "accumulation": 2})
], ids=["rows", "packed"])  # fmt: skip
def test_two_processes_train_as_one(
    folder: Path, keys: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    stage = {"steps": 4, "block_size": 3, "lambda": "auto", "tv": 1, "depth_weights": "dpace"}
    alone = config(folder, "full", output_dir=str(folder / "one"), stages=[stage], **keys[0])
    train(alone)
    both = config(folder, "full", output_dir=str(folder / "two"), stages=[stage], **keys[1])
    (folder / "run.py").write_text(RUN)
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(folder / "run.py"),
    )
    assert start(both, folder, launcher).wait(HANG_SECONDS) == 0
    one, two = weights(folder / "one" / "final"), weights(folder / "two" / "final")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_an_unknown_source_is_refused_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(InputError, match="data.source is 'nanno'; expected"):
        train(tiny.config(folder, data={"source": "nanno"}))
    assert not (folder / "run").exists()


@pytest.mark.parametrize("module", ["idlm.training", "idlm.training.config", "idlm.training.run"])
def test_without_accelerate_there_is_one_clear_error(module: str) -> None:
    code = f"""
import sys
sys.modules["accelerate"] = None
from idlm.errors import InputError
try:
    import {module}
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (
        done.stdout
        == "training needs the package accelerate; install it with pip install 'idlm[train]'\n"
    )
