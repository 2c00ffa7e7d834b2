"""The files of a folder that count: what transformers loads is what is described, hashed and
checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import idlm
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.weights import INDEX, SINGLE, fingerprint, folder_fingerprint
from tests.models import tiny

TOKENS = torch.tensor([5, 7, 9, 30, 11])


def shards_of_another(folder: Path) -> None:
    """A complete sharded checkpoint of other weights in the same folder."""
    single = (folder / SINGLE).read_bytes()
    tiny.tiny_model("llama", seed=9).save_pretrained(folder, max_shard_size="20KB")
    (folder / SINGLE).write_bytes(single)


def index_of_lost_shards(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def named_in_the_config(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "mine.safetensors")
    tiny.tiny_model("llama", seed=9).save_pretrained(folder)
    tiny.edit(folder / "config.json", transformers_weights="mine.safetensors")


def named_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "mine.safetensors")
    names = load_file(folder / "mine.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "mine.safetensors")}
    (folder / "mine.safetensors.index.json").write_text(json.dumps(index))
    tiny.tiny_model("llama", seed=9).save_pretrained(folder)
    tiny.edit(folder / "config.json", transformers_weights="mine.safetensors.index.json")


def shards_alone(folder: Path) -> None:
    (folder / SINGLE).unlink()
    tiny.tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / SINGLE).exists()


@pytest.mark.parametrize(
    "change",
    [
        shards_of_another,
        index_of_lost_shards,
        broken_index,
        named_in_the_config,
        named_index,
        shards_alone,
    ],
)
def test_the_fingerprint_is_that_of_the_weights_that_run(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    plain, folder = tiny.write(tmp_path / "plain"), tiny.write(tmp_path / "changed")
    change(folder)
    expected, loaded = idlm.load(plain), idlm.load(folder)
    for a, b in zip(expected.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert fingerprint(loaded.model) == folder_fingerprint(folder) == folder_fingerprint(plain)
    described = inspect_checkpoint(folder).parameters
    assert described == sum(p.numel() for p in expected.model.parameters())
    other = tiny.write(tmp_path / "other", seed=9)
    assert folder_fingerprint(other) != folder_fingerprint(folder)


def test_a_relative_path_stays_that_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    loaded = idlm.load("model", dtype="float64")
    monkeypatch.chdir(tmp_path.parent)
    assert loaded.name == "model"
    assert fingerprint(loaded.model) == folder_fingerprint(tmp_path / "model")


ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    "name, shape",
    [
        (f"{ATTENTION}.rotary_emb.inv_freq", (4,)),
        (f"{ATTENTION}.rotary_emb.cos_cached", (1, 1, 64, 8)),
        (f"{ATTENTION}.rotary_emb.sin_cached", (64, 8)),
        (f"{ATTENTION}.masked_bias", ()),
        (f"{ATTENTION}.bias", (1, 1, 64, 64)),
        ("model.embeddings.position_ids", (1, 64)),
        ("freqs_cis", (64, 4)),
        ("rope.freqs", (4,)),
    ],
)
def test_buffers_of_old_exports_are_no_weights(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    folder = tiny.write(tmp_path)
    expected = idlm.load(folder, dtype="float64")
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {name: torch.ones(shape)}, folder / SINGLE, metadata={"format": "pt"})
    loaded = idlm.load(folder, dtype="float64")
    rows = len(TOKENS)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    logits = [m.forward(TOKENS, torch.arange(rows), causal) for m in (expected, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "name", ["LLaMAForCausalLM", "LlamaModel", "MyLlamaForCausalLM", "LlamaLMHeadModel", None]
)
def test_class_names_of_exports_and_forks_load_by_their_model_type(
    tmp_path: Path, name: str | None
) -> None:
    folder = tiny.write(tmp_path)
    tiny.edit(folder / "config.json", architectures=None if name is None else [name])
    assert type(idlm.load(folder).model).__name__ == "LlamaForCausalLM"
    assert not inspect_checkpoint(folder).reason.startswith("refused")
