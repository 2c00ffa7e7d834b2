"""Late entry in training: MASK rows skip the lower layers, and the adapter keeps their entry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from idlm import InputError, load
from idlm.models.adapter import read
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach
from idlm.models.idlm_model import Idlm
from idlm.models.recomputation import recompute_layers
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from idlm.training.run import train
from tests.models import tiny as checkpoints
from tests.training import tiny
from tests.training.reference import equals_the_loops, gradients
from tests.training.test_objective import BATCHES

LATE = replace(tiny.SPEC, entry=1)


def late(**keys: Any) -> Idlm:
    return tiny.model("lora", spec=LATE, **keys)


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("window", [None, 4])
def test_loss_and_gradient_equal_the_slow_ones(layout: str, window: int | None) -> None:
    weights = RowWeights(1.0, 0.3, 0.4)
    wanted = Wanted(4, clean=True, soft=True, weights=weights, phases=1)
    equals_the_loops(late(window=window), "lora", BATCHES[layout], wanted)


def test_activation_checkpointing_changes_no_gradient() -> None:
    """With two phases, each forward of MASK rows is computed again after the other has run."""
    wanted, batch = Wanted(4, clean=False, phases=2), BATCHES["alone"]
    found = []
    for again in (False, True):
        idlm = late()
        if again:
            recompute_layers(idlm)
        idlm.model.train()
        loss = Objective(idlm, trains_clean=False)(batch, wanted).noisy
        found.append(gradients(idlm, loss))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_the_lower_layers_do_not_run_on_mask_rows() -> None:
    idlm, batch = late(), BATCHES["alone"]
    objective = Objective(idlm, trains_clean=False)
    half, _ = objective.clean_half(batch)
    objective.noisy_rows(half, Wanted(3, clean=False))
    calls = list[int]()
    for index, layer in enumerate(idlm.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    objective.noisy_rows(half, Wanted(3, clean=False))
    assert calls == [1]


def config(folder: Path, **changes: Any) -> Any:
    if not (folder / "data.jsonl").exists():
        checkpoints.write(folder / "model", mask="<mask>", num_hidden_layers=3)
        tiny.write_jsonl(folder / "data.jsonl", tiny.examples())
    lora = {"rank": 2, "entry": 2}
    return tiny.config(folder, **{"method": "lora", "lora": lora, **changes})


def test_peft_adapts_the_same_layers(tmp_path: Path) -> None:
    """And a list of other layers than those from the entry on is refused."""
    train(config(tmp_path))
    final = tmp_path / "run" / "final"
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), final
    )
    stored = load_file(final / "adapter_model.safetensors")
    assert {n: t.tolist() for n, t in get_peft_model_state_dict(theirs).items()} == {
        n: t.tolist() for n, t in stored.items()
    }
    checkpoints.edit(final / "adapter_config.json", layers_to_transform=[1, 2])
    with pytest.raises(InputError, match=r"has layers_to_transform \[1, 2\]"):
        read(final)
    checkpoints.edit(final / "adapter_config.json", layers_to_transform=None)
    checkpoints.edit(final / "idlm.json", entry="2")
    with pytest.raises(InputError, match="has entry '2'; it must be a layer"):
        read(final)
    checkpoints.edit(final / "idlm.json", entry=1)
    with pytest.raises(InputError, match="lacks 14 tensors"):
        load(tmp_path / "model", adapter=final)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_trained_saved_and_loaded_with_its_entry(tmp_path: Path, dtype: str) -> None:
    model = {"path": str(tmp_path / "model"), "dtype": dtype}
    train(config(tmp_path, model=model, head={"kind": "mlp", "size": 4}))
    final = tmp_path / "run" / "final"
    assert read(final).spec.entry == 2
    assert inspect_checkpoint(final).adapter_entry == 2
    tensors = load_file(final / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 and all(".layers.2." in name for name in tensors)
    loaded = load(tmp_path / "model", adapter=final)
    assert loaded.entry == 2 and 0 in loaded.draft_heads
    trained = adapter_parameters(loaded.model)
    assert len(trained) == 2 * 7 + 1 and all(bool(weight.any()) for weight in trained.values())
    again = {**model, "dtype": "float32"}
    warm = config(tmp_path, warm_start=str(final), output_dir=str(tmp_path / "more"), model=again)
    train(warm)
    with pytest.raises(InputError, match="has entry 2, and lora.entry is 0"):
        train(replace(warm, lora=replace(warm.lora, entry=0), output_dir=str(tmp_path / "other")))


def test_training_resumes_with_its_entry(tmp_path: Path) -> None:
    stages = [{"steps": 4, "block_size": 2}]
    finals = []
    for folder in (tmp_path / "whole", tmp_path / "halves"):
        train(config(folder, stages=stages, save_steps=2))
        finals.append(folder / "run" / "final" / "adapter_model.safetensors")
    whole = load_file(finals[0])
    latest = sorted((tmp_path / "halves" / "run").glob("checkpoint-*"))
    assert len(latest) == 2
    latest[-1].rename(tmp_path / "away")
    train(config(tmp_path / "halves", stages=stages, save_steps=2, resume=True))
    again = load_file(finals[1])
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "llama": ({}, 2, "entry 2 is no layer of this model; give 0 to 1"),
    "opt": ({"ffn_dim": 24}, 1, "its layers have no rotary embeddings"),
    "falcon": (
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        1,
        "its layers give more than hidden states",
    ),
    "gemma3n_text": (
        {
            "layer_types": ["full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 2,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": tiny.VOCAB,
        },
        1,
        "its layers have 3 arguments without names",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_is_refused(family: str) -> None:
    keys, entry, words = REFUSED[family]
    model = tiny.family(family, keys).model
    with pytest.raises(InputError, match=words):
        attach(model, LoraSpec(2, 4.0, all_linear(model, entry), entry=entry), tiny.MASK)
    assert not adapter_parameters(model)
