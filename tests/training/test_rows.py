"""Forms of training rows, and the border between prompt and response."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.training.data import Example, exchange, row_example
from idlm.training.prompts import Encoding
from idlm.training.rows import read_row
from tests.engine.kinds import KINDS, of_kind
from tests.training import tiny

QUESTION, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
OPENING = {"role": "system", "content": "count"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.fixture(scope="module")
def idlm(checkpoint: Path) -> Idlm:
    return load(str(checkpoint / "base"))


def example(fields: dict[str, Any], idlm: Idlm) -> Example:
    return row_example(read_row(fields, "row"), idlm)


CHATS: dict[str, dict[str, Any]] = {
    "messages with the answer": {"messages": [OPENING, QUESTION, ANSWER]},
    "messages and a response": {"messages": [OPENING, QUESTION], "response": "2"},
    "messages and a completion": {"messages": [OPENING, QUESTION], "completion": "2"},
    "prompt and completion of messages": {"prompt": [OPENING, QUESTION], "completion": [ANSWER]},
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": "count"},
            {"from": "human", "value": "1 + 1?"},
            {"from": "gpt", "value": "2"},
        ]
    },
    "ShareGPT with its system": {
        "system": "count",
        "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}],
    },
    "conversations of messages": {"conversations": [OPENING, QUESTION, ANSWER]},
    "Alpaca": {"instruction": "1 + 1?", "input": "", "output": "2", "text": "all of it"},
    "parts": {
        "messages": [OPENING, QUESTION, {**ANSWER, "content": [{"type": "text", "text": "2"}]}]
    },
    "columns that are null": {
        "messages": [OPENING, QUESTION, ANSWER],
        "prompt": None,
        "text": None,
    },
}


@pytest.mark.parametrize("form", CHATS)
def test_forms_of_a_conversation(form: str, idlm: Idlm) -> None:
    found = example(CHATS[form], idlm)
    asked = [QUESTION] if form == "Alpaca" else [OPENING, QUESTION]
    assert tiny.prompt(found) == idlm.encoder.chat(asked)
    assert tiny.response(found) == [*idlm.encoder.inner("2"), *sorted(idlm.eos_ids)]
    assert Encoding(idlm).prompt(CHATS[form], "row").ids == tiny.prompt(found)  # without the answer


def test_an_instruction_may_have_an_input(idlm: Idlm) -> None:
    found = example({"instruction": "Add", "input": "1, 1", "output": "2"}, idlm)
    assert tiny.prompt(found) == idlm.encoder.chat([{"role": "user", "content": "Add\n\n1, 1"}])


def test_only_the_last_answer_is_the_response(idlm: Idlm) -> None:
    messages = [QUESTION, ANSWER, {"role": "user", "content": "and 2?"}, {**ANSWER, "content": "4"}]
    found = example({"messages": messages}, idlm)
    assert tiny.prompt(found) == idlm.encoder.chat(messages[:-1])
    assert tiny.response(found) == [*idlm.encoder.inner("4"), *sorted(idlm.eos_ids)]


def test_forms_of_a_text(idlm: Idlm) -> None:
    text, end = idlm.encoder.text("1 + 1 =", trusted=True), sorted(idlm.eos_ids)
    found = example({"prompt": "1 + 1 =", "response": " 2"}, idlm)
    assert (tiny.prompt(found), tiny.response(found)) == (text, [*idlm.encoder.inner(" 2"), *end])
    assert example({"prompt": "1 + 1 =", "completion": " 2"}, idlm) == found
    assert example({"prompt": text, "response": [5, 6]}, idlm) == exchange(text, [5, 6], "row")
    assert example({"text": "1 + 1 ="}, idlm) == exchange(text[:1], text[1:] + end, "row")


def with_template(idlm: Idlm, template: str) -> Idlm:
    assert idlm.tokenizer is not None
    other = replace(idlm)
    other.encoder.tokenizer.chat_template = template
    return other


def test_templates_that_write_answers_in_their_own_way(checkpoint: Path) -> None:
    end, text = "<|im_end|>", "{{ m.role }}:{{ m.content }}"
    own = {
        # the space belongs to the answer; the line break after the end is nobody's
        f"{{% for m in messages %}}{text.replace(':', ': ')}{end}\n{{% endfor %}}"
        "{% if add_generation_prompt %}assistant:{% endif %}": " 2",
        # thoughts are opened in the prompt, and left out of earlier answers
        f"{{% for m in messages %}}{text}{end}{{% endfor %}}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}": "2",
        f"{{% for m in messages %}}{text}\n{{% endfor %}}"  # no end token at all
        "{% if add_generation_prompt %}assistant:{% endif %}": "2\n",
    }
    for template, answer in own.items():
        idlm = with_template(load(str(checkpoint / "base")), template)
        found = example({"messages": [QUESTION, ANSWER]}, idlm)
        assert tiny.prompt(found) == idlm.encoder.chat([QUESTION])
        assert tiny.response(found) == [*idlm.encoder.inner(answer), *sorted(idlm.eos_ids)]
        if "<think>" in template:
            with pytest.raises(InputError, match="row: the chat template does not write"):
                example({"messages": [QUESTION, CALL]}, idlm)


def test_tools_and_calls_are_written_by_the_template(checkpoint: Path) -> None:
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ m.role }}:"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    idlm = with_template(load(str(checkpoint / "base")), template)
    tools = [{"name": "<|im_end|>"}]  # a placeholder in the prompt and in the whole
    question = {"role": "user", "content": "<|im_start|>"}
    found = example({"messages": [question, CALL], "tools": tools}, idlm)
    assert idlm.tokenizer is not None
    assert tiny.prompt(found) == idlm.encoder.chat([question], tools)
    assert example({"messages": [question, CALL], "tools": json.dumps(tools)}, idlm) == found
    answer = '{"name": "f", "arguments": {}}<|im_end|>'
    assert idlm.tokenizer.decode(tiny.response(found)) == answer


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"messages": [QUESTION]}, "row: it has no response"),
    "an answer alone": ({"messages": [ANSWER]}, "row: messages="),
    "an empty response": ({"prompt": "a", "response": ""}, "row: it has no response"),
    "an answer that says nothing": (
        {"messages": [QUESTION, {**ANSWER, "content": ""}]},
        "row: it has no response",
    ),
    "a prompt alone": ({"prompt": "a"}, "row: it has no response"),
    "nothing known": ({"ask": "a", "output": "b"}, "row: it has no prompt; write"),
    "an instruction alone": ({"instruction": "a"}, "row: it has no response"),
    "an instruction that is a number": (
        {"instruction": 3, "output": "b"},
        "row: the instruction or its input is no text",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "row: a turn is from 'narrator'",
    ),
    "turns that are no list": ({"conversations": "x"}, "row: conversations is no list"),
    "half of a surrogate pair": ({"prompt": "a\ud800", "response": "b"}, "row: the prompt holds"),
    "half of one in the response": ({"prompt": "a", "response": "\udc00"}, "row: the prompt holds"),
    "half of one in a message": (
        {"messages": [{**QUESTION, "content": "\ud800"}, ANSWER]},
        "row: the prompt holds",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        r"row: messages\[0\] has a part of type 'image'",
    ),
    "a prompt that is a number": ({"prompt": 3, "response": "x"}, "row: the prompt is neither"),
    "tools that are no list": (
        {"messages": [QUESTION, ANSWER], "tools": {"name": "f"}},
        "row: tools is no list",
    ),
    "tools that are no JSON": (
        {"messages": [QUESTION, ANSWER], "tools": "[x"},
        "row: tools is no list",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_with_the_name_of_the_row(form: str, idlm: Idlm) -> None:
    fields, said = REFUSED[form]
    with pytest.raises(InputError, match=said) as error:
        example(fields, idlm)
    str(error.value).encode()


def test_a_text_is_no_prompt_to_answer(idlm: Idlm) -> None:
    with pytest.raises(InputError, match="row is a text without a prompt"):
        Encoding(idlm).prompt({"text": "x"}, "row")


def with_tokenizer(idlm: Idlm, tokenizer: PreTrainedTokenizerBase) -> Idlm:
    other = replace(idlm, tokenizer=tokenizer)
    return other


BORDERS = [("the v", "an was"), ("the van", " was"), ("a", "a"), ("in a van", "."), ("n", "'t")]


@pytest.mark.parametrize("border", BORDERS, ids="|".join)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("word_level",)])
def test_a_response_continues_the_prompt(kind: str, border: tuple[str, str], idlm: Idlm) -> None:
    """Prompt and response together decode to the whole text, without a gap; words that are split
    at a space only (WordPiece, end-of-word) have one where the tokenizer decodes it so."""
    tokenizer, (prompt, response) = of_kind(kind), border
    found = example({"prompt": prompt, "response": response}, with_tokenizer(idlm, tokenizer))
    assert tiny.prompt(found) == tokenizer(prompt).input_ids
    assert tiny.response(found)[-1] == tokenizer.eos_token_id
    decoded = tokenizer.decode(tiny.prompt(found) + tiny.response(found)[:-1])
    by_words = kind in ("word_piece", "word_piece_cleaned", "end_of_word")
    strip = (lambda text: text.replace(" ", "")) if by_words else str
    assert strip(decoded) == strip(prompt + response)


def test_a_tokenizer_without_an_end_token_leaves_the_model_its_own(
    idlm: Idlm, tmp_path: Path
) -> None:
    tokenizer = of_kind("byte_level")
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare.eos_token_id is None
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    (found,) = tiny.read(file, with_tokenizer(idlm, bare))
    (end,) = with_tokenizer(idlm, bare).eos_ids
    assert tiny.response(found) == [*bare("b").input_ids, end]
