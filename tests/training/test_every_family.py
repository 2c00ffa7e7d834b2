"""Every family that loads is converted both ways, by a step each, and decodes as AR does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file

from benchmarks.families import CONTEXT, WINDOW, tiny_config, write_checkpoint
from idlm import LLM, Idlm, SamplingParams, load
from idlm.models.quiet import quiet
from idlm.training.run import train
from tests.training import tiny

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"
REPORT = json.loads(RESULTS.read_text())
LOADS: dict[str, dict[str, Any]] = {
    row["family"]: row for row in REPORT["families"] if row.get("loads")
}
ALWAYS = {"llama", "mistral", "qwen2", "qwen3"}
"""Families that load in every version of transformers that is supported."""
PARAMS = SamplingParams(max_tokens=12, temperature=1, seed=7, ignore_eos=True)


def write(family: str, folder: Path) -> Path:
    """A random model in float64, and texts beside it."""
    window = CONTEXT if "window" in LOADS[family] else WINDOW
    with quiet():
        write_checkpoint(tiny_config(family, window), folder / "model")
    tiny.write_jsonl(folder / "data.jsonl", tiny.examples(6))
    return folder / "model"


def converted(method: str, model: Path) -> Path:
    """The result of one step of training."""
    folder = model.parent
    changes = {
        "output_dir": str(folder / method),
        "method": method,
        "batch_size": 2,
        "stages": [{"steps": 1, "block_size": 2}],
        "model": {"path": str(model), "dtype": "float64"},
        "data": {"source": "jsonl", "path": str(folder / "data.jsonl"), "held_out": 1},
        "lora": {"rank": 2, "rslora": True},
    }
    train(tiny.config(folder, **changes))
    return folder / method / "final"


def tokens(idlm: Idlm, stride: int) -> list[int]:
    options: dict[str, Any] = {"branches": "all", "max_num_seqs": 1, "record": False, "threads": 1}
    return LLM(idlm, stride=stride, **options).generate([[5, 9, 3]], PARAMS)[0].token_ids


@pytest.mark.parametrize("family", LOADS)
def test_conversion_keeps_ar(family: str, tmp_path: Path) -> None:
    if family not in ALWAYS and transformers.__version__ != REPORT["environment"]["transformers"]:
        pytest.skip("the table of families is of another transformers")
    model = write(family, tmp_path)
    of_base = tokens(load(model, dtype="float64"), stride=1)

    adapter = converted("lora", model)
    updates = load_file(adapter / "adapter_model.safetensors")
    assert all(bool(update.any()) for update in updates.values()), "each layer was trained"
    adapted = load(model, adapter=adapter, dtype="float64")
    assert adapted.gate is not None and adapted.mask_id == load(model).mask_id
    assert tokens(adapted, stride=1) == tokens(adapted, stride=3) == of_base

    full = load(converted("full", model), dtype="float64")
    assert full.block_size == 2
    before = load(model, dtype="float64").model.state_dict()
    assert any(not weight.equal(before[name]) for name, weight in full.model.state_dict().items())
    assert tokens(full, stride=1) == tokens(full, stride=3)
