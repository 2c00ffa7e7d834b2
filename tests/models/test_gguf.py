"""GGUF files: loading against transformers' own, decoding, and everything that is refused."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import idlm
from idlm import LLM, SamplingParams, extras
from idlm.cli import app
from idlm.models import adapter, gguf_header, loading, weights
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.gguf_checkpoint import auto_dtype
from idlm.models.tensor_info import TensorInfo
from idlm.serving.prompts import Prompts
from tests.models import gguf_files as files
from tests.models import tiny
from tests.models.test_refusals import refusal

TOKENS = torch.tensor([5, 7, 9, 30, 11, 2])
CHAT = [{"role": "user", "content": "hello  7 w12"}]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return files.write(tmp_path / "llama.gguf")


def stock(path: Path, **keys: Any) -> PreTrainedModel:
    """The file as transformers loads it."""
    plain = GgufConfig(dequantize=True)
    keys = {"dtype": torch.float32, "attn_implementation": "sdpa"} | keys
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=plain, **keys
    )


def stock_config(model: idlm.Idlm) -> PreTrainedConfig:
    config = copy.deepcopy(model.model.config)
    config._attn_implementation = None
    return config


def logits(model: idlm.Idlm) -> torch.Tensor:
    rows = len(TOKENS)
    return model.forward(
        TOKENS, torch.arange(rows), torch.ones(rows, rows, dtype=torch.bool).tril()
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1", "F16", "BF16"])
def test_the_logits_are_those_of_transformers(tmp_path: Path, family: str, kind: str) -> None:
    head = {"attention.key_length": 8, "attention.value_length": 8} if family == "qwen3" else {}
    path = files.write(tmp_path / "model.gguf", kind, files.source(family), head)
    model = idlm.load(path, dtype="float64")
    with torch.no_grad():
        if kind == "F32":
            expected = files.source(family).double()(TOKENS[None]).logits[0]
        else:  # a config of our own: transformers' reader leaves a Qwen3's heads 128 wide
            expected = stock(path, dtype=torch.float64, config=stock_config(model))(
                TOKENS[None]
            ).logits[0]
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    assert (model.context, model.vocab_size, model.eos_ids) == (64, len(files.TOKENS), {2})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("F32", torch.float32),
        ("Q8_0", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
    ],
)
def test_dtype_auto_is_float32_on_a_cpu_and_knows_what_is_stored(
    tmp_path: Path, kind: str, expected: torch.dtype
) -> None:
    path = files.write(tmp_path / "model.gguf", kind)
    model = idlm.load(path)
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert model.stored == expected
    assert inspect_checkpoint(path).dtype == str(expected).removeprefix("torch.")


def test_mixed_matrices_load_as_float32() -> None:
    half, full = (TensorInfo(Path(), kind, (2, 2), 0, 0) for kind in ("F16", "F32"))
    vector = TensorInfo(Path(), "F32", (2,), 0, 0)
    assert auto_dtype({"a": half, "b": vector}) == torch.float16
    assert auto_dtype({"a": half, "b": full}) == auto_dtype({"a": vector}) == torch.float32


@pytest.mark.parametrize("stride", [1, 3])
def test_greedy_tokens_for_a_chat_are_those_of_transformers(tmp_path: Path, stride: int) -> None:
    path = files.write(tmp_path / "model.gguf", "Q8_0", tokenizer={"pre": "gpt-2"})
    model = idlm.load(path)
    own = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompt = own.apply_chat_template(CHAT, return_dict=True).input_ids
    assert model.tokenizer is not None
    assert model.tokenizer.apply_chat_template(CHAT, return_dict=True).input_ids == prompt
    expected = stock(path).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[
        0, len(prompt) :
    ]
    if stride > 1:
        model.gate = attach(model.model, LoraSpec(4, 8.0, ("q_proj",)), model.mask_id)
    result = LLM(model, stride=stride, branches="all").generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=20)
    )[0]
    assert result.token_ids == expected.tolist()


def test_digits_are_set_apart_where_the_file_says_so(llama: Path, tmp_path: Path) -> None:
    plain = files.write(tmp_path / "plain.gguf", tokenizer={"pre": "gpt-2"})
    ours, gpt2 = (idlm.load(path).tokenizer for path in (llama, plain))
    assert ours is not None and gpt2 is not None
    assert ours.tokenize("hello  7 w12") == ["hello", "ĠĠ", "7", "Ġw", "1", "2"]
    assert gpt2.tokenize("hello  7") == ["hello", "Ġ", "Ġ", "7"]


def test_the_tokenizer_is_the_files_whatever_lies_beside_it(llama: Path) -> None:
    tiny.write(llama.parent, "qwen2")
    model = idlm.load(llama)
    assert model.tokenizer is not None and model.tokenizer("hello").input_ids == [
        files.TOKENS.index("hello")
    ]
    assert model.tokenizer.chat_template == files.CHAT and model.tokenizer.eos_token == "<|im_end|>"
    assert Prompts.load(str(llama)).tokenizer.chat_template == files.CHAT


def test_the_weights_are_the_files_wherever_it_is_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    files.write(other / "llama.gguf", model=files.source(seed=1))
    expected = logits(idlm.load(llama))
    monkeypatch.chdir(other)
    assert torch.equal(logits(idlm.load(llama)), expected)
    assert not torch.equal(logits(idlm.load("llama.gguf")), expected)


def test_the_end_of_turn_ends_too(tmp_path: Path) -> None:
    path = files.write(tmp_path / "model.gguf", tokenizer={"eot": 3})
    assert idlm.load(path).eos_ids == {2, 3}


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    assert idlm.load(files.write(tmp_path / "model.gguf", tokenizer={})).tokenizer is None


def test_nothing_is_written_to_the_terminal(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    idlm.load(llama)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("plain", [True, False])
def test_a_folder_saved_from_it_loads(llama: Path, tmp_path: Path, plain: bool) -> None:
    """Also one whose config.json still names GGUF as its quantisation, as transformers' own loader
    leaves it."""
    model, folder = idlm.load(llama), tmp_path / "folder"
    if plain:
        loading.save_full(model, folder, None)
    else:
        saved = AutoModelForCausalLM.from_pretrained(llama.parent, gguf_file=llama.name)
        saved.hf_quantizer = None
        saved.config.quantization_config = GgufConfig(llama.name)
        saved.save_pretrained(folder)
        AutoTokenizer.from_pretrained(llama.parent, gguf_file=llama.name).save_pretrained(folder)
        assert "quantization_config" in (folder / "config.json").read_text()
    again = idlm.load(folder)
    assert torch.equal(logits(again), logits(model)) and again.eos_ids == model.eos_ids
    assert again.tokenizer is not None and model.tokenizer is not None
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    if plain:
        assert again.tokenizer.tokenize("hello  7 w12") == model.tokenizer.tokenize("hello  7 w12")


def test_an_adapter_knows_its_file(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, folder, spec = idlm.load(llama), tmp_path / "lora", LoraSpec(4, 8.0, ("q_proj",))
    base = weights.fingerprint(model.model)
    assert (
        base
        == weights.fingerprint(idlm.load(llama, dtype="bfloat16").model)
        == weights.folder_fingerprint(llama)
    )
    model.gate = attach(model.model, spec, model.mask_id)
    for parameter in adapter_parameters(model.model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter.save(model, spec, folder, base, model.mask_id, block_size=3)
    assert idlm.load(llama, adapter=folder).block_size == 3
    other = files.write(tmp_path / "other.gguf", model=files.source(seed=1))
    assert "give the base it was trained on" in refusal(
        lambda: idlm.load(other, adapter=folder), capfd
    )
    assert "is a file" in refusal(lambda: idlm.load(llama, adapter=other), capfd)


def test_fingerprints_differ_by_quantisation_and_from_the_folders(
    llama: Path, tmp_path: Path
) -> None:
    tiny.write(llama.parent, "llama")  # a model beside the file is not the file's
    seen = {weights.folder_fingerprint(llama.parent), weights.fingerprint(idlm.load(llama).model)}
    seen.add(weights.folder_fingerprint(files.write(tmp_path / "q8.gguf", "Q8_0")))
    loading.save_full(idlm.load(llama), tmp_path / "saved", None)
    seen.add(weights.folder_fingerprint(tmp_path / "saved"))
    assert len(seen) == 4


def test_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = files.write(tmp_path / "model.gguf", "Q4_1"), files.source()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    found = inspect_checkpoint(path)
    assert (found.family, found.context, found.vocab_size, found.layers) == (
        "llama",
        64,
        len(files.TOKENS),
        2,
    )
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.quantisation, found.dtype) == (("Q4_1", "F32"), "float32")
    assert "an AR model" in found.reason


def extra(name: str, *shape: int) -> dict[str, Any]:
    return {"tensors": {name: np.ones(shape, np.float32)}}


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "sliding window": (
        {"metadata": {"attention.sliding_window": 16}},
        "attention.sliding_window 16, which transform",
    ),
    "experts": ({"metadata": {"expert_count": 8}}, r"mixture of experts \(llama.expert_count 8\)"),
    "soft caps": ({"metadata": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping 50.0"),
    "scaled rope": ({"metadata": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type yarn"),
    "another head size": (
        {"metadata": {"attention.key_length": 16}},
        "llama.rope.dimension_count 8, which transf",
    ),
    "rope factors": (extra("rope_freqs.weight", 4), r"rotary frequencies \(rope_freqs.weight\)"),
    "a bias": (extra("blk.0.attn_q.bias", 32), r"holds \d+ weights, but a llama of its sizes has"),
    "missing metadata": (
        {"metadata": {"context_length": 0}},
        "no max_position_embeddings|context_length",
    ),
    "misshapen": ({"metadata": {"feed_forward_length": 48}}, "misshapen .*mlp"),
    "missing tensors": ({"metadata": {"block_count": 3}}, "missing tensors, model.layers.2"),
    "one of several": ({"metadata": {"split.count": 3}}, "one of 3 parts; merge them"),
    "split of text": ({"tokenizer": {"pre": "mine"}}, "splits text by 'mine'"),
    "kind of tokenizer": (
        {"tokenizer": {"model": "rwkv"}},
        "tokenizer in .* cannot be read: .*rwkv",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_refused(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys, message = FILES[case]
    path = files.write(tmp_path / "model.gguf", **keys)
    text = refusal(lambda: idlm.load(path), capfd)
    assert re.search(message, text), text


def test_what_changes_nothing_is_not_refused(tmp_path: Path) -> None:
    off = {
        "attention.sliding_window": 64,
        "expert_count": 0,
        "rope.scaling.type": "none",
        "attention.key_length": 8,
    }
    idlm.load(files.write(tmp_path / "model.gguf", metadata=off))


@pytest.mark.parametrize("architecture", ["other", "mamba", "gemma"])
def test_another_architecture_is_refused(
    architecture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = files.write(tmp_path / "model.gguf")
    path.write_bytes(
        path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", _string(architecture), 1)
    )
    text = refusal(lambda: idlm.load(path), capfd)
    assert architecture in text
    assert inspect_checkpoint(path).reason.startswith("refused: ")


def _string(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in the tensors": (lambda b: b[:-200], r"truncated: \d+ bytes, not the \d+ it names"),
    "cut in the metadata": (lambda b: b[:400], "truncated or damaged in its header"),
    "cut at once": (lambda b: b[:10], "truncated or damaged in its header"),
    "empty": (lambda b: b"", "is no GGUF file"),
    "no GGUF": (lambda b: b"PK" + b, "is no GGUF file"),
    "another version": (lambda b: b[:4] + b"\1" + b[5:], "GGUF version 1, not 2 or 3"),
    "unknown type": (lambda b: _typed(b, 99), "tensor 'token_embd.weight' has the unknown type 99"),
    "no floats": (lambda b: _typed(b, 26), "type I32, which cannot be de-quantised"),
}


def _typed(data: bytes, kind: int) -> bytes:
    """The file with another number for the first tensor's type, after its name and two sizes."""
    place = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    return data[:place] + kind.to_bytes(4, "little") + data[place + 4 :]


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(
    case: str, llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[case]
    llama.write_bytes(damage(llama.read_bytes()))
    text = refusal(lambda: idlm.load(llama), capfd)
    assert re.search(message, text), text


def test_every_cut_and_every_flipped_byte_of_the_header_gives_one_line(llama: Path) -> None:
    data = llama.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, data.index(b"blk.0"), 150).tolist():
        for damaged in (
            data[:place],
            data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :],
        ):
            llama.write_bytes(damaged)
            try:
                gguf_header.read_header(llama)
            except idlm.InputError as error:
                assert "\n" not in str(error)


def test_paths(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = refusal(lambda: idlm.load(llama.parent), capfd)
    assert "GGUF weights only; give a file of it" in text and str(llama) in text
    assert "no file" in refusal(lambda: idlm.load("gone.gguf"), capfd)
    (llama.parent / "notes.txt").write_text("GG")
    assert "is a file, and no GGUF" in refusal(lambda: idlm.load(llama.parent / "notes.txt"), capfd)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_packages(
    package: str, llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else find(name))
    text = refusal(lambda: idlm.load(llama), capfd)
    assert f"needs the package {package}; install it with pip install 'idlm[gguf]'" in text


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = files.write(tmp_path / "model.gguf", "Q8_0")
    for command in (
        ["inspect", path],
        ["generate", path, "hello", "--stride", "1", "--max-tokens", "4"],
    ):
        with pytest.raises(SystemExit) as done:
            app([str(word) for word in command])
        out, err = capsys.readouterr()
        assert done.value.code == 0, err
    assert re.search(r"(\d) tokens in \1 forwards", err)
