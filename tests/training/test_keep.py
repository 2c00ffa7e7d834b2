"""The best and the last checkpoint: which stay, and the links that name them, after a kill too."""

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

from idlm.models.loading import load
from idlm.training.checkpoint import checkpoints
from idlm.training.config import TrainConfig
from idlm.training.run import train
from idlm.training.strict import as_tree
from tests.training import tiny
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
KILLED = """
import os
import signal
import sys
from pathlib import Path
from idlm.training import keep
from idlm.training.read_config import load_config
from idlm.training.run import train

symlink_to, rmtree = Path.symlink_to, keep.shutil.rmtree

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def link_or_die(link, target):
    symlink_to(link, target)
    if (link.name, target) == (".last", "checkpoint-2"):
        die()

if sys.argv[2] == "link":
    Path.symlink_to = link_or_die
else:
    keep.shutil.rmtree = die
train(load_config(sys.argv[1]))
"""
"""Within the links of a checkpoint, or before the first old one is removed."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its data."""
    tiny.model("full", torch.float32).model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    return tmp_path


def config(folder: Path, **changes: Any) -> TrainConfig:
    """A run that is best after its second step: the rate is far too high."""
    tree: dict[str, Any] = {
        "method": "lora",
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]},
        "stages": [{"steps": 8, "block_size": 2}],
        "optimizer": {"lr": 0.01, "warmup": 0},
        "data": {"source": "jsonl", "path": str(folder / "data.jsonl"), "held_out": 8},
        "eval_steps": 1,
        "keep_checkpoints": 1,
    }
    return tiny.config(folder, **tree | changes)


def measured(run: Path, key: str = "tpf") -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry[key] for entry in lines if key in entry}


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def test_the_best_and_the_last_stay_and_load_as_they_are(folder: Path) -> None:
    train(config(folder))
    run, scores = folder / "run", measured(folder / "run")
    best = max(scores, key=lambda step: (scores[step], -step))
    assert list(scores) == list(range(1, 9)) and best == 2
    assert names(run) == [f"checkpoint-{best}", "checkpoint-8"]
    assert os.readlink(run / "best") == f"checkpoint-{best}"
    assert os.readlink(run / "last") == "checkpoint-8"
    one, other = (load(folder / "model", adapter=run / name) for name in ("best", "last"))
    a, b = (dict(idlm.model.named_parameters()) for idlm in (one, other))
    assert one.block_size == 2 and any(not torch.equal(a[name], b[name]) for name in a)


def test_the_best_of_an_ar_model_has_the_lowest_loss(folder: Path) -> None:
    ar = {"objective": "ar", "method": "full", "stages": [{"steps": 6}]}
    train(config(folder, **ar, optimizer={"lr": 0.05, "warmup": 0}))
    losses = measured(folder / "run", "held_out_ce")
    assert (
        os.readlink(folder / "run" / "best") == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    )
    assert load(folder / "run" / "best").block_size is None


def test_several_of_the_newest_stay(folder: Path) -> None:
    train(config(folder, eval_steps=100, save_steps=2, keep_checkpoints=3))
    assert names(folder / "run") == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_without_its_folder_the_best_is_forgotten(folder: Path) -> None:
    train(config(folder, save_steps=1, keep_checkpoints=2))
    best = (folder / "run" / "best").resolve()
    shutil.rmtree(folder / "run" / "checkpoint-8")
    shutil.rmtree(best)
    train(config(folder, save_steps=1, keep_checkpoints=2, resume=True))
    assert os.readlink(folder / "run" / "best") == "checkpoint-8"


@pytest.mark.parametrize("at", ["link", "remove"])
def test_killed_within_keeping_it_goes_on_to_the_same(folder: Path, at: str) -> None:
    straight = config(folder, output_dir=str(folder / "straight"))
    killed = config(folder, output_dir=str(folder / "killed"))
    train(straight)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_tree(killed)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder / "config.yaml"), at],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == -9, done.stderr
    for name in ("best", "last"):
        link = folder / "killed" / name
        assert not link.is_symlink() or (link / "adapter_model.safetensors").exists()
    train(config(folder, output_dir=str(folder / "killed"), resume=True))
    one, other = folder / "straight", folder / "killed"
    assert names(one) == names(other) and measured(one) == measured(other)
    for name in ("best", "last"):
        assert os.readlink(one / name) == os.readlink(other / name)
    for file in ("best", "final"):
        weights = [path / file / "adapter_model.safetensors" for path in (one, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
