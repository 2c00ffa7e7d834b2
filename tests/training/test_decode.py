"""The short real decode of an evaluation: right figures, and a training that does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from idlm.evaluation.parity import compare
from idlm.models.loading import load
from idlm.params import SamplingParams
from idlm.training.decode import decode
from idlm.training.run import train
from tests.training import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its data."""
    tiny.model().model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    return tmp_path


def run(folder: Path, name: str, method: str, **changes: Any) -> list[dict[str, Any]]:
    """The measurements of a run."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / name),
        "method": method,
        "lora": {"rank": 2},
        "model": {"path": str(folder / "model"), "dtype": "float64"},
        "stages": [{"steps": 6, "block_size": 2}, {"steps": 2, "block_size": 3}],
        "eval_steps": 3,
    }
    train(tiny.config(folder, **tree | changes))
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "tpf" in entry]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_figures_are_those_of_the_exported_model(folder: Path, method: str) -> None:
    measured = run(folder, "run", method, eval_decode=3)
    assert [entry["step"] for entry in measured] == [3, 6, 8]
    assert all(entry["decode_identical"] == entry["decode_prompts"] == 3 for entry in measured)
    final = folder / "run" / "final"
    idlm = load(final) if method == "full" else load(folder / "model", adapter=final)
    prompts = [tiny.prompt(example) for example in tiny.examples()[-4:-1]]
    params = [SamplingParams(temperature=0, max_tokens=48 - len(prompt)) for prompt in prompts]
    results = [
        result
        for prompt, one in zip(prompts, params, strict=True)
        for result in compare(idlm, [prompt], one, stride=4).results
    ]
    tokens, forwards = sum(len(r.token_ids) for r in results), sum(r.forwards for r in results)
    assert measured[-1]["decode_tpf"] == pytest.approx(tokens / forwards) and tokens > 20
    reached, accepted = (
        [sum(counts) for counts in zip(*(getattr(r, name) for r in results), strict=True)]
        for name in ("reached", "accepted")
    )
    shares = [a / max(r, 1) for a, r in zip(accepted, reached, strict=True)]
    assert measured[-1]["decode_acceptance"] == pytest.approx(shares) and len(shares) == 3


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_training_is_the_same_with_and_without(folder: Path, method: str) -> None:
    with_it = run(folder, "with", method, eval_decode=2)
    without = run(folder, "without", method)
    for one, other in zip(with_it, without, strict=True):
        assert {key: value for key, value in one.items() if "decode" not in key} == other
    (file,) = ({"full": "model", "lora": "adapter_model"}[method],)
    bytes_of = [
        (folder / name / "final" / f"{file}.safetensors").read_bytes()
        for name in ("with", "without")
    ]
    assert bytes_of[0] == bytes_of[1]


def test_the_model_is_left_as_it_was() -> None:
    """Also one whose adapter is trained in another type than the base has."""
    idlm = tiny.model("lora", torch.float32).limited(40)
    idlm.model.train()
    trained = {name: p for name, p in idlm.model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.double()
    values = {name: p.detach().clone() for name, p in trained.items()}
    seeded, threads = torch.random.get_rng_state(), torch.get_num_threads()
    figures = decode(
        idlm, [tiny.prompt(example) for example in tiny.examples(3)], 2, Accelerator(cpu=True)
    )
    assert figures["decode_identical"] == 3
    assert torch.equal(torch.random.get_rng_state(), seeded) and idlm.model.training
    assert torch.get_num_threads() == threads
    assert {name for name, p in idlm.model.named_parameters() if p.requires_grad} == set(trained)
    for name, value in values.items():
        assert trained[name].dtype == torch.float64 and torch.equal(trained[name], value)
