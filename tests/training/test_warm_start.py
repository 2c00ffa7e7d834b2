"""`warm_start`: a run that starts from the weights of another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from idlm.errors import InputError
from idlm.models.loading import load
from idlm.training.run import train
from tests.training import tiny

LORA = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data, and a run of each method on it."""
    path = tmp_path_factory.mktemp("warm")
    tiny.model("full", torch.float32).model.save_pretrained(path / "model")
    tiny.write_jsonl(path / "data.jsonl", tiny.examples())
    for method in ("full", "lora"):
        run(path, path / method, method=method)
    return path


def run(place: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return train(tiny.config(place, **{"output_dir": str(output), "lora": LORA} | changes))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_step_is_from_those_weights(place: Path, tmp_path: Path, method: str) -> None:
    """At a rate of almost 0 the result is what it started from."""
    still = {"optimizer": {"lr": 1e-30, "warmup": 0}, "method": method}
    start = place / method / "final"
    run(place, tmp_path, warm_start=str(start), **still)
    name = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}[method]
    one, other = load_file(start / name), load_file(tmp_path / "final" / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_that_goes_on_does_not_start_again(place: Path, tmp_path: Path) -> None:
    warm = {"warm_start": str(place / "lora" / "best"), "method": "lora", "save_steps": 1}
    run(place, tmp_path, **warm)
    result = tmp_path / "final" / "adapter_model.safetensors"
    straight = result.read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-3")
    result.unlink()
    run(place, tmp_path, resume=True, **warm)
    assert result.read_bytes() == straight
    assert straight != (place / "lora" / "final" / result.name).read_bytes()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 4}, "has rank 2, and lora.rank is 4; set lora.rank"),
        ({"alpha": 8.0}, "has alpha 4, and lora.alpha is 8.0"),
        ({"targets": ["q_proj"]}, r"has targets \['q_proj', 'v_proj'\], and lora.targets is"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    place: Path, tmp_path: Path, lora: dict[str, Any], words: str
) -> None:
    start = str(place / "lora" / "final")
    with pytest.raises(InputError, match=words) as caught:
        run(place, tmp_path, method="lora", lora=LORA | lora, warm_start=start)
    assert start in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_kind_or_base_are_refused(place: Path, tmp_path: Path) -> None:
    adapter, model = place / "lora" / "final", place / "full" / "final"
    with pytest.raises(InputError, match="is an adapter; set method: lora"):
        run(place, tmp_path / "a", warm_start=str(adapter))
    with pytest.raises(InputError, match="adapter_config.json"):
        run(place, tmp_path / "b", method="lora", warm_start=str(model))
    with pytest.raises(InputError, match="cannot be used.* fingerprint"):
        changed = {"model": {"path": str(model)}, "method": "lora"}
        run(place, tmp_path / "c", warm_start=str(adapter), **changed)
    with pytest.raises(InputError, match="nowhere"):
        run(place, tmp_path / "d", warm_start=str(tmp_path / "nowhere"))
    small = tiny.model("full", torch.float32, tied=False).model
    small.save_pretrained(tmp_path / "untied")
    with pytest.raises(InputError, match="cannot be used.* another model"):
        run(place, tmp_path / "e", warm_start=str(tmp_path / "untied"))


def test_weights_that_are_not_finite_are_refused(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (place / "lora" / "final").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match="lora_A.* is not finite"):
        run(place, tmp_path / "run", method="lora", warm_start=str(broken))
    assert load(place / "model", adapter=place / "lora" / "final").gate is not None
