"""A run that is killed again and again ends with the weights of one that is not, bit by bit.

Where it is killed is counted in calls of the training's functions, so a seed names the places.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import idlm.training
from idlm.training.config import TrainConfig
from idlm.training.run import train
from tests.training import ranks, tiny

OURS = str(Path(idlm.training.__file__).parent)
KILLS = 5
IN_A_CHECKPOINT = 3
"""The life that ends after the weights of a checkpoint are written and before the rest is."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its data."""
    tiny.model("full", torch.float32).model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    return tmp_path


def live(config: TrainConfig, killed: int | str | None, victim: int, calls: Path) -> None:
    """Train; rank `victim` dies at that call, or at the second call of the function of that name.
    If none dies, the number of calls is written to `calls`."""
    made = named = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal made, named
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            made, named = made + 1, named + (frame.f_code.co_name == killed)
            if (made == killed or named == 2) and int(os.environ.get("RANK", "0")) == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    train(config)
    sys.setprofile(None)
    calls.write_text(str(made))


def final_weights(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "final").glob("*.safetensors"))
    return {f"{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("number", "method", "parallel"), [(1, "full", "ddp"), (2, "full", "fsdp"), (2, "lora", "ddp")]
)
def test_killed_at_random_places_it_ends_with_the_same_weights(
    folder: Path, number: int, method: str, parallel: str
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    rng = random.Random(seed)
    stages = [{"steps": 6, "block_size": 2}, {"steps": 8, "block_size": 3, "tv": 1}]
    settings = {"method": method, "parallel": parallel, "stages": stages, "save_steps": 2}
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}

    def config(name: str) -> TrainConfig:
        place = str(folder / name)
        return tiny.config(folder, output_dir=place, resume=True, lora=lora, **settings)

    ranks.run(number, live, config("straight"), None, 0, folder / "calls")
    calls = int((folder / "calls").read_text())
    places = [rng.randint(1, calls // KILLS) for _ in range(KILLS)]
    for number_of_life, place in enumerate(places, start=1):
        killed = "save_optimizers" if number_of_life == IN_A_CHECKPOINT else place
        victim = rng.randrange(number)
        print(f"seed {seed}: rank {victim} of {number} dies at call {killed} of {calls}")
        life = ranks.start(number, live, config("killed"), killed, victim, folder / "none")
        assert -signal.SIGKILL in ranks.ended(life)
        if killed == "save_optimizers":
            assert list((folder / "killed" / ".writing").glob("*/*.safetensors"))
    ranks.run(number, live, config("killed"), None, 0, folder / "none")
    straight, killed_often = final_weights(folder / "straight"), final_weights(folder / "killed")
    assert straight.keys() == killed_often.keys() and len(straight) > 1
    for name, tensor in straight.items():
        assert torch.equal(tensor, killed_often[name]), name
    assert not (folder / "killed" / ".writing").exists()
