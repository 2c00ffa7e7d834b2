from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import idlm
from idlm.errors import InputError
from idlm.models import loading, weights
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.gated_lora import LoraSpec, attach
from tests.models import tiny

TOKENS = torch.tensor([5, 7, 9, 30, 11, 2])


def causal(model: idlm.Idlm, tokens: torch.Tensor) -> torch.Tensor:
    rows = len(tokens)
    return model.forward(
        tokens, torch.arange(rows), torch.ones(rows, rows, dtype=torch.bool).tril()
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loaded_model_gives_the_logits_of_transformers(
    tmp_path: Path, family: str, tied: bool, heads: tuple[int, int]
) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    tiny.write(tmp_path, family, tie_word_embeddings=tied, **sizes)
    model = idlm.load(tmp_path, dtype="float64")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="sdpa"
    )
    with torch.no_grad():
        expected = stock(TOKENS[None]).logits[0]
    torch.testing.assert_close(causal(model, TOKENS), expected, rtol=1e-9, atol=1e-9)
    assert (model.context, model.vocab_size, model.eos_ids) == (64, tiny.VOCAB, {2})


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.float32),  # on a CPU
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float64", torch.float64),
        (torch.float32, torch.float16, torch.float16),
    ],
)
def test_dtype_auto_is_the_stored_one_or_float32_on_a_cpu(
    tmp_path: Path, stored: torch.dtype, asked: str | torch.dtype, expected: torch.dtype
) -> None:
    tiny.tiny_model("qwen3").to(stored).save_pretrained(tmp_path)
    model = idlm.load(tmp_path, dtype=asked)
    assert {p.dtype for p in model.model.parameters()} == {expected}
    assert model.tokenizer is None
    assert model.stored == (stored if asked == "auto" else expected)


def test_published_checkpoint_loads_as_qwen3_and_its_code_never_runs(tmp_path: Path) -> None:
    folder = tiny.write_sdar(tmp_path)
    model = idlm.load(folder, dtype="float64")
    assert isinstance(model.model, Qwen3ForCausalLM)
    assert (model.mask_id, model.block_size) == (tiny.VOCAB - 3, 4)
    assert model.tokenizer is not None and model.tokenizer("w5 w7").input_ids == [5, 7]
    assert not (folder / "ran").exists()
    with torch.no_grad():
        expected = (
            tiny.tiny_model("qwen3", tie_word_embeddings=False).double()(TOKENS[None]).logits[0]
        )
    torch.testing.assert_close(causal(model, TOKENS), expected, rtol=1e-9, atol=1e-9)


def test_native_checkpoint_with_an_auto_map_loads_without_its_code(llama: Path) -> None:
    tiny.edit(
        llama / "config.json",
        auto_map={"AutoModelForCausalLM": "code.Mine", "AutoConfig": "code.Config"},
    )
    (llama / "code.py").write_text("raise RuntimeError('remote code ran')")
    assert type(idlm.load(llama).model).__module__.startswith("transformers.")


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = tiny.tiny_model("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = idlm.load(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("config_mask", "tokenizer_mask", "expected"),
    [(None, None, tiny.VOCAB), (7, None, 7), (None, "<mask>", tiny.VOCAB - 1), (7, "<mask>", 7)],
)
def test_mask_id_is_the_configs_then_the_tokenizers_then_an_added_row(
    tmp_path: Path, config_mask: int | None, tokenizer_mask: str | None, expected: int
) -> None:
    tiny.write(tmp_path, mask=tokenizer_mask, mask_token_id=config_mask)
    assert idlm.load(tmp_path).mask_id == expected


def test_block_size_of_an_ar_config_is_no_sign_of_training(tmp_path: Path) -> None:
    tiny.write(tmp_path, block_size=1024)
    assert idlm.load(tmp_path).block_size is None


@pytest.mark.parametrize("tied", [False, True])
def test_full_model_with_a_new_mask_row_survives_the_disk(tmp_path: Path, tied: bool) -> None:
    model = idlm.load(tiny.write(tmp_path / "base", tie_word_embeddings=tied), dtype="float64")
    before = causal(model, TOKENS)
    loading.ensure_mask_row(model)
    assert (model.mask_id, model.vocab_size) == (tiny.VOCAB, tiny.VOCAB + 1)
    rows = weights.embedding_rows(model.model)
    torch.testing.assert_close(rows[-1], rows[:-1].mean(dim=0))
    torch.testing.assert_close(causal(model, TOKENS)[:, :-1], before)
    loading.save_full(model, tmp_path / "full", block_size=3)
    again = idlm.load(tmp_path / "full")
    assert (again.mask_id, again.block_size, again.dtype) == (tiny.VOCAB, 3, torch.float64)
    assert again.tokenizer is not None
    tokens = torch.tensor([5, 7, tiny.VOCAB, tiny.VOCAB])
    assert torch.equal(causal(again, tokens), causal(model, tokens))


def test_a_saved_full_model_is_an_ordinary_transformers_checkpoint(
    llama: Path, tmp_path: Path
) -> None:
    model = idlm.load(llama)
    loading.ensure_mask_row(model)
    loading.save_full(model, tmp_path / "full", block_size=3)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert stock.config._attn_implementation != "idlm"
    assert str(llama) not in (tmp_path / "full" / "config.json").read_text()


def test_a_row_that_exists_is_not_added_again(tmp_path: Path) -> None:
    model = idlm.load(tiny.write(tmp_path, mask="<mask>"))
    row = weights.embedding_rows(model.model)[model.mask_id].clone()
    loading.ensure_mask_row(model)
    assert model.vocab_size == tiny.VOCAB
    assert torch.equal(weights.embedding_rows(model.model)[model.mask_id], row)


def test_saving_a_trained_model_without_a_mask_row_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ensure_mask_row"):
        loading.save_full(idlm.load(llama), tmp_path / "full", block_size=3)


def test_fingerprint_is_of_the_stored_weights(llama: Path, tmp_path: Path) -> None:
    model = idlm.load(llama, dtype="float32")
    prints = {
        weights.fingerprint(model.model),
        weights.fingerprint(idlm.load(llama, dtype="bfloat16").model),
    }
    attach(model.model, LoraSpec(2, 4.0, ("q_proj",)), model.mask_id)
    prints.add(weights.fingerprint(model.model))
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB"
    )
    prints.add(weights.folder_fingerprint(tmp_path / "sharded"))
    assert len(prints) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_fingerprint_in_memory_is_the_one_on_disk(tmp_path: Path, tied: bool) -> None:
    model = tiny.tiny_model("qwen2", tie_word_embeddings=tied)
    bare = weights.fingerprint(model)
    attach(model, LoraSpec(2, 4.0, ("q_proj",)), tiny.VOCAB)
    adapted = weights.fingerprint(model)
    tiny.tiny_model("qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert bare == adapted == weights.folder_fingerprint(tmp_path)


def test_fingerprint_sees_every_bit_name_and_shape(llama: Path) -> None:
    file, seen = llama / "model.safetensors", {weights.folder_fingerprint(llama)}
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    bits = tensors[name].view(torch.int32)
    bits[-1, -1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    seen.add(weights.folder_fingerprint(llama))
    save_file({k if k != name else "other": t for k, t in tensors.items()}, file)
    seen.add(weights.folder_fingerprint(llama))
    save_file(tensors | {name: tensors[name].reshape(32, 48)}, file)
    seen.add(weights.folder_fingerprint(llama))
    assert len(seen) == 4


def test_hub_id_without_the_hub_is_one_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no folder 'idlm-tests/no-such-model'") as caught:
        idlm.load("idlm-tests/no-such-model")
    assert "\n" not in str(caught.value)


def test_inspect_a_model(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, "qwen3", tie_word_embeddings=True)
    found = inspect_checkpoint(folder)
    assert (found.kind, found.family, found.layers, found.heads, found.kv_heads) == (
        "model",
        "qwen3",
        2,
        4,
        2,
    )
    assert (found.vocab_size, found.context, found.dtype, found.hidden_size) == (
        tiny.VOCAB,
        64,
        "float32",
        32,
    )
    assert found.parameters == sum(p.numel() for p in idlm.load(folder).model.parameters())
    assert (found.mask_id, found.mask_source) == (tiny.VOCAB, "added")
    assert (found.can_decode_isd, found.max_stride) == (False, None)
    assert "AR model" in found.reason


def test_inspect_a_mixture_of_experts(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    found = inspect_checkpoint(tiny.write(tmp_path, "qwen3_moe", **sizes))
    model = idlm.load(tmp_path).model
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert (found.experts, found.experts_per_token) == (4, 1)
    assert found.parameters == model.num_parameters()
    assert found.active_parameters == model.num_parameters() - of_experts * 3 // 4
    dense = inspect_checkpoint(tiny.write(tmp_path / "dense"))
    assert (dense.experts, dense.experts_per_token, dense.active_parameters) == (None, None, None)


def test_inspect_a_published_checkpoint(tmp_path: Path) -> None:
    found = inspect_checkpoint(tiny.write_sdar(tmp_path))
    assert (found.mask_id, found.mask_source, found.block_size) == (
        tiny.VOCAB - 3,
        "config.json",
        4,
    )
    assert (found.can_decode_isd, found.max_stride) == (True, 5)
    assert not (tmp_path / "ran").exists()


def test_inspect_reads_no_weights(tmp_path: Path) -> None:
    folder = tiny.write_sdar(tmp_path)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    before = inspect_checkpoint(folder)
    file.write_bytes(content)
    assert inspect_checkpoint(folder) == before


def test_inspect_says_why_a_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, "mistral", sliding_window=0)
    found = inspect_checkpoint(folder)
    assert not found.can_decode_isd
    assert found.reason.startswith("refused") and "sliding_window 0" in found.reason


def test_bundled_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="brings its own adapter"):
        idlm.load("nano", adapter=tmp_path)
    assert loading.resolve("nano-base")[0].parts[-4:] == ("idlm", "nano", "weights", "base")
