"""`idlm export`: what it writes loads as it is, says what it is, and replaces nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from idlm.cli import app
from idlm.models.loading import load
from idlm.training.run import train
from tests.training import tiny
from tests.training.hub import Hub, hub

STAGES = [{"steps": 2, "block_size": 2}, {"steps": 2, "block_size": 3}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune in `full/run` and a gated LoRA in `lora/run`, of the base `model`."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.model("full", torch.float32).model.save_pretrained(folder / "model")
    card = "---\nlicense: apache-2.0\n---\nA base.\n"
    (folder / "model" / "README.md").write_text(card)
    rows = tiny.write_jsonl(folder / "data.jsonl", tiny.examples())
    for method in ("full", "lora"):
        place = {"output_dir": str(folder / method / "run"), "eval_steps": 2, "save_steps": 2}
        data = {"source": "jsonl", "path": str(rows), "held_out": 4}
        train(tiny.config(folder, method=method, stages=STAGES, data=data, **place))
    return folder


def export(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def exported(*arguments: Any) -> dict[str, str]:
    done = export(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    report: dict[str, str] = json.loads(done.stdout)
    return report


def refused(*arguments: Any) -> str:
    done = export(*arguments)
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    return done.stderr


def test_a_full_fine_tune_is_a_plain_model(runs: Path, tmp_path: Path) -> None:
    report = exported(runs / "full" / "run", "-o", tmp_path / "out")
    assert report["from"] == str(runs / "full" / "run" / "final")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mask_token_id"] == tiny.VOCAB and config["block_size"] == 3  # an added row
    assert config["vocab_size"] == tiny.VOCAB + 1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = load_file(runs / "full" / "run" / "final" / "model.safetensors")
    for name, tensor in trained.items():
        assert torch.equal(stock.state_dict()[name], tensor), name
    assert load(tmp_path / "out").block_size == 3
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.library_name == "transformers" and data.license == "apache-2.0"
    assert "idlm" in data.tags and data.base_model is None  # a folder is none for the hub


def test_a_gated_lora_is_a_peft_folder(runs: Path, tmp_path: Path) -> None:
    exported(runs / "lora" / "run", "-o", tmp_path / "out")
    assert load(runs / "model", adapter=tmp_path / "out").block_size == 3
    base = AutoModelForCausalLM.from_pretrained(runs / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").state_dict()
    trained = load_file(runs / "lora" / "run" / "final" / "adapter_model.safetensors")
    for name, tensor in trained.items():
        assert torch.equal(adapted[name.replace(".weight", ".default.weight")], tensor), name
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert f"idlm verify {runs / 'model'} --adapter out" in card.text


def test_an_adapter_can_be_rounded(runs: Path, tmp_path: Path) -> None:
    exported(runs / "lora" / "run", "-o", tmp_path / "exact")
    exported(runs / "lora" / "run", "-o", tmp_path / "half", "--dtype", "bfloat16")
    for file in (tmp_path / "exact").glob("*.safetensors"):
        rounded = load_file(tmp_path / "half" / file.name)
        for name, weight in load_file(file).items():
            assert torch.equal(rounded[name], weight.to(torch.bfloat16))
    assert load(str(runs / "model"), str(tmp_path / "half")).block_size == 3
    error = refused(runs / "full" / "run", "-o", tmp_path / "full", "--dtype", "bfloat16")
    assert "is a whole model, and a dtype is for adapters" in error


def test_the_card_has_the_recipe_the_data_and_the_acceptance_of_its_step(
    runs: Path, tmp_path: Path
) -> None:
    run = runs / "lora" / "run"
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for source, step in ((run, 4), (run / "checkpoint-2", 2)):
        exported(source, "-o", tmp_path / "out")
        assert not (tmp_path / "out" / "optimizer").exists()
        assert not (tmp_path / "out" / "state.json").exists()
        text = (tmp_path / "out" / "README.md").read_text()
        measured = next(e for e in reversed(reports) if "alpha" in e and e["step"] <= step)
        assert measured["step"] == step and len(measured["acceptance"]) == (3 if step == 4 else 2)
        for depth, (greedy, alpha) in enumerate(
            zip(measured["acceptance"], measured["alpha"], strict=True), start=1
        ):
            assert f"| {depth} | {greedy:.3f} | {alpha:.3f} |" in text
        assert f"{runs / 'data.jsonl'}" in text and f"torch {torch.__version__}" in text
        recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert recipe == yaml.safe_load((run / "config.yaml").read_text())


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lora" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    report = exported(tmp_path / "run", "-o", tmp_path / "out")
    assert report["from"] == str(tmp_path / "run" / "checkpoint-4")


def test_what_is_there_stays_unless_it_is_an_export(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exported(runs / "lora" / "run", "-o", tmp_path / "out")
    exported(runs / "full" / "run", "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    error = refused(runs / "lora" / "run", "-o", other)
    assert "holds something else" in error and str(other) in error
    assert [file.name for file in other.iterdir()] == ["README.md"]
    assert "holds something else" in refused(runs / "lora" / "run", "-o", other / "README.md")
    assert (other / "README.md").read_text() == "mine"


def test_what_has_no_weights_is_refused(runs: Path, tmp_path: Path) -> None:
    assert "no weights in" in refused(tmp_path, "-o", tmp_path / "out")
    assert "no weights in" in refused(tmp_path / "none", "-o", tmp_path / "out")
    assert "--push-to-hub" in refused(runs / "lora" / "run", "-o", tmp_path / "out", "--private")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.mark.parametrize("private", [False, True])
def test_push_makes_a_repository_and_commits_the_folder(
    runs: Path, tmp_path: Path, online: Hub, private: bool
) -> None:
    options = ("--push-to-hub", "me/small", *(["--private"] if private else []))
    report = exported(runs / "lora" / "run", "-o", tmp_path / "out", *options)
    assert report["address"] == f"{online.address}/me/small"
    assert online.repositories == {"me/small": private}
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert online.files == written and "adapter_model.safetensors" in written
    assert "--adapter me/small" in written["README.md"].decode()


@pytest.mark.parametrize(
    ("status", "words"), [(401, "HF_TOKEN"), (403, "may write"), (404, "check the name")]
)
def test_what_the_hub_refuses_is_one_line(
    runs: Path, tmp_path: Path, online: Hub, status: int, words: str
) -> None:
    online.refusal = status
    error = refused(runs / "lora" / "run", "-o", tmp_path / "out", "--push-to-hub", "me/small")
    assert f"status {status}" in error and words in error and "me/small" in error


def test_a_hub_that_cannot_be_reached_is_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: Hub
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    error = refused(runs / "lora" / "run", "-o", tmp_path / "out", "--push-to-hub", "me/small")
    assert "the hub did not take 'me/small'" in error and "HF_ENDPOINT" in error
    bad = refused(runs / "lora" / "run", "-o", tmp_path / "out", "--push-to-hub", "a b")
    assert "'a b'" in bad
