"""Adapter folders: ours there and back, ours read by peft, peft's read by us."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import idlm
from idlm.errors import InputError
from idlm.models import adapter
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.idlm_model import Idlm
from idlm.models.weights import embedding_rows
from tests.models import tiny

SPEC = LoraSpec(4, 8.0, tuple(tiny.TARGETS))


def trained(base: Path, spec: LoraSpec = SPEC, mask_id: int | None = None) -> Idlm:
    """The base with a random adapter in the place of a trained one."""
    model = idlm.load(base, dtype="float64")
    model.mask_id = model.mask_id if mask_id is None else mask_id
    model.gate = attach(model.model, spec, model.mask_id)
    torch.manual_seed(3)
    for parameter in adapter_parameters(model.model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save(model: Idlm, folder: Path, spec: LoraSpec = SPEC, block_size: int | None = 3) -> Path:
    adapter.save(model, spec, folder, adapter.fingerprint(model.model), model.mask_id, block_size)
    return folder


def window(model: Idlm, mask_id: int) -> Tensor:
    """Logits of three clean rows and two MASK rows, causal."""
    tokens = torch.tensor([5, 7, 9, mask_id, mask_id])
    return model.forward(tokens, torch.arange(5), torch.ones(5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_adapter_gives_the_same_bits_again(tmp_path: Path, family: str, tied: bool) -> None:
    base = tiny.write(tmp_path / "base", family, tie_word_embeddings=tied)
    model = trained(base)
    folder = save(model, tmp_path / "adapter")
    again = idlm.load(base, adapter=folder, dtype="float64")
    assert (again.mask_id, again.block_size) == (tiny.VOCAB, 3)
    assert torch.equal(window(again, again.mask_id), window(model, model.mask_id))
    assert not any(
        p.requires_grad
        for n, p in again.model.named_parameters()
        if n not in adapter_parameters(again.model)
    )


@pytest.mark.parametrize("mask_id", [None, 8])
def test_mask_row_is_the_adapters_own(llama: Path, tmp_path: Path, mask_id: int | None) -> None:
    model = trained(llama, mask_id=mask_id)
    again = idlm.load(llama, adapter=save(model, tmp_path / "adapter"), dtype="float64")
    assert again.mask_id == (tiny.VOCAB if mask_id is None else mask_id)
    assert torch.equal(window(again, again.mask_id), window(model, model.mask_id))
    assert embedding_rows(again.model).shape[0] == tiny.VOCAB


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(8.0, False, 2.0), (5.5, False, 1.375), (5.5, True, 2.75)]
)
def test_peft_loads_our_folder(
    llama: Path, tmp_path: Path, alpha: float, rslora: bool, scale: float
) -> None:
    spec = LoraSpec(4, alpha, SPEC.targets, rslora)
    model = trained(llama, spec)
    folder = save(model, tmp_path / "adapter", spec)
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64), folder
    )
    theirs = get_peft_model_state_dict(peft)
    ours = {n: p for n, p in adapter_parameters(model.model).items() if not n.endswith("mask_row")}
    assert set(theirs) == {f"base_model.model.{name}.weight" for name in ours}
    for name, parameter in ours.items():
        assert torch.equal(theirs[f"base_model.model.{name}.weight"], parameter)
    scales = {m.scaling["default"] for m in peft.modules() if isinstance(m, LoraLayer)}
    assert scales == {scale}
    again = idlm.load(llama, adapter=folder, dtype="float64")
    assert torch.equal(window(again, again.mask_id), window(model, model.mask_id))
    masks = torch.full((4,), model.mask_id)  # gate 1 on all rows
    row = load_file(folder / "mask_row.safetensors")["mask_row"]
    with torch.no_grad():
        expected = peft(inputs_embeds=row.expand(1, 4, -1)).logits[0]
    rows = torch.ones(4, 4, dtype=torch.bool).tril()
    got = again.forward(masks, torch.arange(4), rows)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rank", "rslora"), [(1, False), (4, False), (128, False), (4, True)])
def test_foreign_adapter_does_to_mask_rows_what_peft_does(
    tmp_path: Path, rank: int, rslora: bool
) -> None:
    base = tiny.write(tmp_path / "base", "qwen3", mask_token_id=3)
    folder = tiny.write_peft(base, tmp_path / "adapter", rank=rank, use_rslora=rslora)
    model = idlm.load(base, adapter=folder, dtype="float64")
    assert model.block_size is None
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder
    )
    with torch.no_grad():
        expected = peft(torch.tensor([[3, 3, 3, 3]])).logits[0]
    tokens, rows = torch.tensor([3, 3, 3, 3]), torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(
        model.forward(tokens, torch.arange(4), rows), expected, rtol=1e-9, atol=1e-9
    )


def test_foreign_adapter_takes_the_tokenizers_mask(tmp_path: Path) -> None:
    base = tiny.write(tmp_path / "base", mask="<mask>")
    model = idlm.load(base, adapter=tiny.write_peft(base, tmp_path / "adapter"))
    assert model.mask_id == tiny.VOCAB - 1
    row = adapter_parameters(model.model)["model.embed_tokens.mask_row"]
    assert torch.equal(row, embedding_rows(model.model)[model.mask_id])


def test_foreign_adapter_of_a_stock_qwen3_takes_the_row_published_adapters_take(
    tmp_path: Path,
) -> None:
    base = tiny.write(
        tmp_path / "base", "qwen3", vocab_size=151936, hidden_size=8, tie_word_embeddings=True
    )
    assert idlm.load(base).mask_id == 151936
    assert idlm.load(base, adapter=tiny.write_peft(base, tmp_path / "adapter")).mask_id == 151669


def test_published_checkpoint_with_an_adapter(tmp_path: Path) -> None:
    base = tiny.write_sdar(tmp_path / "base")
    model = trained(base)
    again = idlm.load(
        base, adapter=save(model, tmp_path / "adapter", block_size=7), dtype="float64"
    )
    assert (again.mask_id, again.block_size) == (tiny.VOCAB - 3, 7)
    assert torch.equal(window(again, again.mask_id), window(model, model.mask_id))


def test_fingerprint_holds_in_every_dtype(llama: Path, tmp_path: Path) -> None:
    folder = save(trained(llama), tmp_path / "adapter")
    for dtype in ("float64", "float32", "bfloat16"):
        assert idlm.load(llama, adapter=folder, dtype=dtype).gate is not None


def test_adapter_for_another_base_is_refused(llama: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "other", seed=9, tie_word_embeddings=True)
    folder = save(trained(llama), tmp_path / "adapter")
    prints = [adapter.fingerprint(idlm.load(base).model)[:16] for base in (llama, other)]
    with pytest.raises(
        InputError, match="is for base .*; give the base it was trained on"
    ) as caught:
        idlm.load(other, adapter=folder)
    assert all(text in str(caught.value) for text in [*prints, str(llama), str(other)])


def test_refused_adapter_leaves_the_model_as_it_was(llama: Path, tmp_path: Path) -> None:
    folder = save(trained(llama), tmp_path / "adapter")
    (folder / "mask_row.safetensors").unlink()
    model = idlm.load(llama)
    with pytest.raises(InputError, match=re.escape("mask_row.safetensors")):
        adapter.load_into(model.model, folder)
    assert not adapter_parameters(model.model)
    assert all(p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": 2}, "format 2, not 1"),
        ({"gated": False}, "gated False"),
        ({"mask_token_id": tiny.VOCAB + 1}, "mask_token_id 41 is outside the vocabulary of 40"),
        ({"mask_token_id": "7"}, "mask_token_id '7'"),
        ({"block_size": 0}, "block_size 0"),
        ({"base_fingerprint": None}, "base_fingerprint None"),
        ({"base_fingerprint": "0" * 64}, "fingerprint 0000000000000000, not"),
    ],
)
def test_damaged_idlm_json_is_refused(
    llama: Path, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    folder = save(trained(llama), tmp_path / "adapter")
    tiny.edit(folder / "idlm.json", **keys)
    with pytest.raises(InputError, match=re.escape(message)):
        idlm.load(llama, adapter=folder)


def test_folder_holds_what_it_should(llama: Path, tmp_path: Path) -> None:
    model = trained(llama)
    folder = save(model, tmp_path / "adapter")
    files = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "idlm.json",
        "mask_row.safetensors",
    }
    assert {p.name for p in folder.iterdir()} == files
    assert load_file(folder / "mask_row.safetensors")["mask_row"].shape == (32,)
    extra = json.loads((folder / "idlm.json").read_text())
    assert extra == {
        "format": 1,
        "gated": True,
        "mask_token_id": tiny.VOCAB,
        "block_size": 3,
        "base_fingerprint": adapter.fingerprint(model.model),
    }


def test_inspect_our_adapter(llama: Path, tmp_path: Path) -> None:
    folder = save(trained(llama), tmp_path / "adapter")
    found = inspect_checkpoint(folder)
    assert (found.kind, found.adapter_rank, found.adapter_alpha) == ("adapter", 4, 8.0)
    assert found.adapter_targets == ("down_proj", "q_proj", "v_proj")
    assert (found.mask_id, found.mask_source, found.block_size, found.max_stride) == (
        tiny.VOCAB,
        "adapter",
        3,
        4,
    )
    assert (
        found.can_decode_isd
        and found.adapter_base == str(llama)
        and len(found.base_fingerprint or "") == 64
    )
    both = inspect_checkpoint(llama, folder)
    assert (both.kind, both.family, both.adapter_rank, both.max_stride) == (
        "model with adapter",
        "llama",
        4,
        4,
    )


def test_inspect_a_foreign_adapter(llama: Path, tmp_path: Path) -> None:
    found = inspect_checkpoint(tiny.write_peft(llama, tmp_path / "adapter", rank=6))
    assert (found.adapter_rank, found.base_fingerprint, found.mask_id, found.max_stride) == (
        6,
        None,
        None,
        None,
    )
    assert found.can_decode_isd and "does not name its block size" in found.reason
