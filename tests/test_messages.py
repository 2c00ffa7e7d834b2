"""One reader of messages, and contents in the form that a template shows."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder
from idlm.errors import InputError
from idlm.messages import as_template_takes, read_messages

PART = {"type": "text", "text": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TURN = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "index": 0, "function": function}]}


READ: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "a text": ("hi", [{"role": "user", "content": "hi"}]),
    "an empty content": ([{"role": "user", "content": ""}], [{"role": "user", "content": ""}]),
    "an empty list": ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
    "parts": (
        [{"role": "user", "content": [PART, {"type": "input_text", "text": "b", "x": 1}, "c"]}],
        [{"role": "user", "content": [PART, {**PART, "text": "b"}, {**PART, "text": "c"}]}],
    ),
    "thoughts and a refusal": (
        [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "refusal", "refusal": "no"},
                ],
            }
        ],
        [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
    ),
    "developer": (
        [{"role": "developer", "content": "x"}],
        [{"role": "system", "content": "x"}],
    ),
    "what a client echoes": (
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [],
                "refusal": None,
                "function_call": None,
                "reasoning_content": "hm",
            }
        ],
        [{"role": "assistant", "content": "", "reasoning_content": "hm"}],
    ),
    "a tool's turn without content": (
        [{"role": "tool", "tool_call_id": "1"}],
        [{"role": "tool", "tool_call_id": "1", "content": ""}],
    ),
    "arguments as text": ([call(name="f", arguments='{"x": 1}')], [TURN]),
    "arguments as an object": ([call(name="f", arguments={"x": 1})], [TURN]),
    "a call without the wrapping": (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}, "id": "1"}]}],
        [TURN],
    ),
    **{
        f"arguments {arguments!r}": (
            [call(name="f", arguments=arguments)],
            [
                {
                    **TURN,
                    "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}],
                }
            ],
        )
        for arguments in ("", None, "{}", {})
    },
}


@pytest.mark.parametrize("form", READ)
def test_forms_of_messages(form: str) -> None:
    given, read = READ[form]
    before = copy.deepcopy(given)
    assert read_messages(given) == read
    assert given == before  # the caller's
    assert read_messages(read) == read


REFUSED: dict[str, tuple[Any, str]] = {
    "none": ([], "holds no message"),
    "an object": ({"role": "user", "content": "x"}, "is no list"),
    "a number": (7, "is no list"),
    "no message": ([{"role": "user", "content": "x"}, "x"], r"messages\[1\] is no message"),
    "no role": ([{"content": "x"}], r"messages\[0\] is no message"),
    "a role that is no text": ([{"role": 1, "content": "x"}], r"messages\[0\] is no message"),
    "a user without content": ([{"role": "user"}], "of role 'user' has content=None"),
    "content that is a number": ([{"role": "user", "content": 7}], "content=7"),
    "content that is a part": ([{"role": "user", "content": PART}], "give a text, or a list"),
    "an image": (
        [{"role": "user", "content": [PART, {"type": "image_url", "image_url": "u"}]}],
        "part of type 'image_url'",
    ),
    "a user's thoughts": (
        [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}],
        "part of type 'thinking'",
    ),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "'text', which is"),
    "a part that is none": ([{"role": "user", "content": [7]}], "the part 7"),
    "calls that are no list": ([{"role": "assistant", "tool_calls": "f"}], "list of calls"),
    "a call without a name": ([call(arguments="{}")], "without a function's name"),
    **{
        f"arguments {arguments}": ([call(name="f", arguments=arguments)], "not a JSON object")
        for arguments in ("{", "[]", "7", "[" * 100_000, 7)
    },
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused_with_a_sentence_that_names_the_message(form: str) -> None:
    given, said = REFUSED[form]
    with pytest.raises(InputError, match=said) as error:
        read_messages(given)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


TEMPLATES = {
    "texts": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "texts, trimmed": "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}",
    "texts as JSON": "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}",
    "parts": "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}",
    "parts, strictly": "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}"
    "{{ part['text'] + '' }}{% endfor %}{% endfor %}",
    "both": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": [PART, {**PART, "text": "b"}]},
    {"role": "assistant", "content": None},
]
RENDERED = {
    "texts": "<system>be<user>a\nb<assistant>",
    "texts, trimmed": "<system>be<user>a\nb<assistant>",
    "texts as JSON": '<system>"be"<user>"a\\nb"<assistant>""',
    "parts": "<system>be<user>ab<assistant>",
    "parts, strictly": "<system>be<user>ab<assistant>",
    "both": "<system>be<user>[a][b]<assistant>",
}


def encoder(tokenizer: PreTrainedTokenizerBase, template: str) -> PromptEncoder:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return PromptEncoder(other, "tiny")


@pytest.mark.parametrize("form", TEMPLATES)
def test_contents_have_the_form_that_the_template_shows(
    form: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = encoder(tokenizer, TEMPLATES[form])
    assert tokenizer.decode(prompts.chat(MESSAGES)) == RENDERED[form]


def test_special_strings_in_parts_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    for template in TEMPLATES.values():
        ids = encoder(tokenizer, template).chat(messages)
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_an_empty_content_of_parts_is_an_empty_list() -> None:
    messages = read_messages([{"role": "assistant"}, {"role": "user", "content": "a"}])
    contents = [m["content"] for m in as_template_takes(messages, texts=False, parts=True)]
    assert contents == [[], [PART]]
