"""What a checkpoint says about generating: its ends and its defaults, from files that disagree."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from idlm import InputError
from idlm.models.generation import FILE, turn_end
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.params import Guide, SamplingParams
from tests.models import tiny

EOS, TURN = 2, 5
"""`</s>`, the tokenizer's end, and w5, the end of turn of `CHAT`."""
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} w5\n{% endfor %}"
PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}w5{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("plain"), "llama")


@pytest.fixture
def checkpoint_with(tmp_path: Path, folder: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with other files."""

    def make(
        generation: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        template: str | dict[str, str] | None = None,
        eos: str | None = "</s>",
    ) -> Path:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / FILE).unlink()
        if generation is not None:
            (tmp_path / FILE).write_text(json.dumps(generation))
        tiny.edit(tmp_path / "config.json", **(config or {}))
        tokenizer = tiny.tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["w5"]})
        tokenizer.eos_token, tokenizer.chat_template = eos, template
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


ENDS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "generation_config before config": (
        {"generation": {"eos_token_id": [4, 6]}, "config": {"eos_token_id": 7}},
        {4, 6, EOS},
    ),
    "config without generation_config": ({"config": {"eos_token_id": 7}}, {7, EOS}),
    "generation_config without ends": (
        {"generation": {"top_k": 3}, "config": {"eos_token_id": 7}},
        {7, EOS},
    ),
    "the tokenizer alone": ({"config": {"eos_token_id": None}}, {EOS}),
    "no end": ({"config": {"eos_token_id": None}, "eos": None}, set()),
    "a tokenizer's end that it lacks": (
        {"config": {"eos_token_id": None}, "eos": None, "template": "{{ messages[0].content }}"},
        set(),
    ),
    "the template's end of turn": (
        {"config": {"eos_token_id": 7}, "template": CHAT},
        {7, EOS, TURN},
    ),
    "a template for parts": ({"config": {"eos_token_id": 7}, "template": PARTS}, {7, EOS, TURN}),
    "named templates": (
        {
            "config": {"eos_token_id": 7},
            "template": {"tool_use": "{{ messages[1].content }}</s>", "default": CHAT},
        },
        {7, EOS, TURN},
    ),
    "text after an answer": (
        {"config": {"eos_token_id": 7}, "template": "{{ messages[1]['content'] }} w6 w5"},
        {7, EOS},
    ),
    "a template that refuses": (
        {"config": {"eos_token_id": 7}, "template": "{{ raise_exception('no') }}"},
        {7, EOS},
    ),
}


@pytest.mark.parametrize("files, ends", ENDS.values(), ids=ENDS)
def test_the_ends_of_a_model(
    files: dict[str, Any],
    ends: set[int],
    checkpoint_with: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "idlm"):
        idlm = load(checkpoint_with(**files))
        assert idlm.eos_ids == ends
    assert not caplog.records


@pytest.mark.parametrize("chat, eos, template, end", [
    (True, "</s>", CHAT, TURN),
    (False, "</s>", CHAT, EOS),
    (True, "</s>", None, EOS),
    (True, None, None, 7),
    (False, None, CHAT, TURN),
])  # fmt: skip
def test_what_training_appends_is_an_end(
    chat: bool,
    eos: str | None,
    template: str | None,
    end: int,
    checkpoint_with: Callable[..., Path],
) -> None:
    own = 7 if template is None else TURN
    idlm = load(checkpoint_with({"eos_token_id": own}, template=template, eos=eos))
    assert idlm.end_of(chat) == end and end in idlm.eos_ids


@pytest.mark.parametrize("where", [FILE, "config.json"])
@pytest.mark.parametrize("named, wrong", [
    (-1, ["-1"]), (tiny.VOCAB, [str(tiny.VOCAB)]), ([4, 99999, -7], ["99999", "-7"]),
    (["x"], ["'x'"]), (2.5, ["2.5"]), ([[4]], ["[4]"]),
])  # fmt: skip
def test_an_end_outside_the_vocabulary_is_none(
    where: str,
    named: Any,
    wrong: list[str],
    checkpoint_with: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = {"eos_token_id": named}
    idlm = load(checkpoint_with())  # transformers itself refuses some of them in a config
    if where == FILE:
        idlm = load(checkpoint_with(generation=keys))
    else:
        idlm.model.generation_config.eos_token_id = None
        object.__setattr__(idlm.model.config, "eos_token_id", named)
    with caplog.at_level(logging.WARNING, "idlm"):
        assert idlm.eos_ids == ({4, EOS} if named == [4, 99999, -7] else {EOS})
        assert idlm.eos_ids and len(caplog.records) == len(wrong)  # once each
    for record, token in zip(caplog.messages, wrong, strict=True):
        assert record.startswith(f"{where} of ") and token in record


def test_a_tokenizer_larger_than_the_model(
    checkpoint_with: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint_with({"eos_token_id": 4})
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<far>"})
    tokenizer.chat_template = "{{ messages[1].content }}<far>"
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING, "idlm"):
        assert load(folder).eos_ids == {4}
    assert caplog.messages == [
        f"tokenizer_config.json of {str(folder)!r} names the end token {tiny.VOCAB}, which is "
        f"outside the vocabulary 0..{tiny.VOCAB - 1}; it is ignored"
    ]


@pytest.mark.parametrize("name", ["nano", "nano-base", "nano-full"])
def test_the_bundled_models_end_and_sample_as_before(name: str) -> None:
    idlm = load(name)
    assert idlm.eos_ids == {2} and idlm.end_of(True) == idlm.end_of(False) == 2
    assert idlm.sampling({}) == SamplingParams()


DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "vLLM's": (
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
        | {"max_new_tokens": 64, "do_sample": True},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
        | {"max_tokens": 64},
    ),
    "a temperature alone": ({"temperature": 0.6}, {"temperature": 0.6}),
    "greedy": (
        {"do_sample": False, "temperature": 0.6, "top_k": 5},
        {"temperature": 0.0, "top_k": 5},
    ),
    "null": ({"do_sample": None, "temperature": None, "suppress_tokens": None}, {}),
    "bans": (
        {"suppress_tokens": [9, 4, -1, 99999], "bad_words_ids": [[7], [2], [4]]},
        {"banned_tokens": (4, 7, 9)},  # 2 is an end, which a bad word never bans
    ),
    "a shortest length": ({"min_new_tokens": 4}, {"min_tokens": 4}),
}


@pytest.mark.parametrize("keys, fields", DEFAULTS.values(), ids=DEFAULTS)
def test_defaults_of_a_model(
    keys: dict[str, Any],
    fields: dict[str, Any],
    checkpoint_with: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    idlm = load(checkpoint_with({"eos_token_id": 2} | keys))
    with caplog.at_level(logging.WARNING, "idlm"):
        assert idlm.sampling({}) == SamplingParams(**fields)
    assert not caplog.records
    assert idlm.sampling({}, "none") == SamplingParams()
    given = {"temperature": 0.3, "max_tokens": 9}
    assert idlm.sampling(given) == SamplingParams(**(fields | given))


def test_without_the_file_config_json_counts_as_in_transformers(
    checkpoint_with: Callable[..., Path],
) -> None:
    folder = checkpoint_with(config={"repetition_penalty": 1.25, "temperature": 0.5})
    assert load(folder).sampling_defaults == {"repetition_penalty": 1.25, "temperature": 0.5}


def test_a_default_of_min_tokens_gives_way(checkpoint_with: Callable[..., Path]) -> None:
    idlm = load(checkpoint_with({"min_new_tokens": 10, "max_new_tokens": 20}))
    assert idlm.sampling({}).min_tokens == 10
    assert idlm.sampling({"max_tokens": 3}).min_tokens == 3
    assert idlm.sampling({"guide": Guide("json_object")}).min_tokens == 0
    with pytest.raises(InputError, match="min_tokens=9 is more than max_tokens=3"):
        idlm.sampling({"max_tokens": 3, "min_tokens": 9})


@pytest.mark.parametrize("keys, said", [
    ({"num_beams": 4}, "num_beams=4"),
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
    ({"bad_words_ids": [[4], [5, 6]]}, "bad_words_ids"),
    ({"typical_p": 0.9, "forced_eos_token_id": 2}, "typical_p=0.9, forced_eos_token_id=2"),
    ({"stop_strings": ["w9"]}, "stop_strings=['w9']"),
])  # fmt: skip
def test_what_cannot_be_applied_is_named_once(
    keys: dict[str, Any],
    said: str,
    checkpoint_with: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    idlm = load(checkpoint_with(keys))
    with caplog.at_level(logging.WARNING, "idlm"):
        for _ in range(2):
            idlm.sampling({})
    assert caplog.messages == [f"{FILE} of {idlm.name!r} sets {said}, which is not applied"]


@pytest.mark.parametrize("keys, said", [
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"temperature": "hot"}, "temperature='hot'"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"suppress_tokens": ["x"]}, "suppress_tokens"),
    ({"bad_words_ids": [5]}, "bad_words_ids"),
])  # fmt: skip
def test_a_default_out_of_range_is_refused_and_can_be_left_out(
    keys: dict[str, Any], said: str, checkpoint_with: Callable[..., Path]
) -> None:
    idlm = load(checkpoint_with(keys))
    with pytest.raises(InputError, match=said) as caught:
        idlm.sampling({})
    assert "generation config" in str(caught.value) or FILE in str(caught.value)
    assert idlm.sampling({}, "none") == SamplingParams()
    with pytest.raises(InputError, match="^n=0 is out of range"):  # the request's own fault
        idlm.sampling({"n": 0}, "none")


@pytest.mark.parametrize("content", ["{", "[]", '{"max_new_tokens": 0}', '{"max_new_tokens": "a"}'])
def test_a_broken_file_is_refused_by_name(
    content: str, checkpoint_with: Callable[..., Path]
) -> None:
    folder = checkpoint_with()
    (folder / FILE).write_text(content)
    with pytest.raises(InputError, match=FILE):
        load(folder)


def test_the_longest_special_token_counts() -> None:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w1", "w15"]})
    tokenizer.chat_template = "{{ messages[1].content }}\nw15"
    assert turn_end(tokenizer) == 15


def test_an_in_memory_model_has_ends_and_defaults() -> None:
    idlm = Idlm(tiny.tiny_model("llama"), None, tiny.VOCAB)
    assert (idlm.eos_ids, idlm.end_of(True), idlm.sampling({})) == ({2}, 2, SamplingParams())
