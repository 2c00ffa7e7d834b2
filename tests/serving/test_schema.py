"""Requests become sampling parameters, messages for a template, and guides."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from idlm import Guide, SamplingParams
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.jobs import room
from idlm.serving.schema import SHARED, CompletionRequest
from idlm.serving.schema_chat import ChatRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")
]
VALUES: dict[str, Any] = {
    "n": 2,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.1,
    "seed": 9,
    "stop": ("a", "b"),
    "stop_token_ids": (7,),
    "ignore_eos": True,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.25,
    "frequency_penalty": 0.75,
    "verification": "ratio",
    "bad_words": ("a", "b c"),
    "allowed_token_ids": (3, 5),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields
    )


def test_fields_become_sampling_parameters() -> None:
    assert set(VALUES) == set(SHARED)
    values = {
        name: list(value) if isinstance(value, tuple) else value for name, value in VALUES.items()
    }
    made = chat(**values, logit_bias={"5": -1}, logprobs=True, top_logprobs=2).sampling(50)
    assert made == SamplingParams(max_tokens=50, logprobs=2, logit_bias={5: -1.0}, **VALUES)


def test_null_is_as_good_as_absent() -> None:
    nothing = {
        name: None for name, field in ChatRequest.model_fields.items() if not field.is_required()
    }
    kept = {
        name: value
        for name, value in nothing.items()
        if name not in ("idlm", "add_generation_prompt")
    }
    assert chat(**kept).sampling(50) == chat().sampling(50) == SamplingParams(max_tokens=50)


def test_the_models_defaults_stand_for_what_a_request_does_not_set() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "banned_tokens": [4], "min_tokens": 8}
    made = chat(temperature=None).sampling(50, defaults=defaults)
    assert made == SamplingParams(
        max_tokens=50, temperature=0.6, top_k=20, banned_tokens=(4,), min_tokens=8
    )
    made = chat(temperature=1.0, top_k=0, min_tokens=0).sampling(50, defaults=defaults)
    assert made == SamplingParams(max_tokens=50, banned_tokens=(4,))
    assert chat().sampling(3, defaults=defaults).min_tokens == 3
    guide = Guide("json_object")
    assert chat().sampling(50, guide, defaults).min_tokens == 0


@pytest.mark.parametrize("asked, default, bound, tokens", [
    (None, None, None, 90), (None, 30, None, 30), (None, 300, None, 90), (None, 30, 20, 20),
    (40, 30, None, 40), (40, None, 50, 40), (400, 30, None, 90),
])  # fmt: skip
def test_max_tokens_are_the_requests_or_the_models_or_what_is_left(
    asked: int | None, default: int | None, bound: int | None, tokens: int
) -> None:
    assert room(asked, 10, 100, Limits(max_tokens=bound), default) == tokens


def test_which_number_of_tokens_counts() -> None:
    assert chat().asked_tokens is None
    assert chat(max_tokens=5).asked_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=6).asked_tokens == 6
    assert CompletionRequest(model="m", prompt="x").asked_tokens == 16
    assert CompletionRequest(model="m", prompt="x", max_tokens=0).asked_tokens == 0
    assert CompletionRequest(model="m", prompt="x", max_tokens=0, echo=True).asked_tokens == 1


def test_which_log_probabilities_are_asked_for() -> None:
    for request, asked in (
        (chat(), (None, None)),
        (chat(logprobs=True), (0, None)),
        (CompletionRequest(model="m", prompt="x", logprobs=3), (3, None)),
        (CompletionRequest(model="m", prompt="x", logprobs=3, echo=True), (3, 3)),
    ):
        params = request.sampling(50)
        assert (params.logprobs, params.prompt_logprobs) == asked


def test_messages_as_templates_know_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": "be kind", "type": "text"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "me",
            },
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ],
        tools=TOOLS,
    )
    function = {"name": "f", "arguments": {"a": 1}}
    assert request.template_messages() == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb", "name": "me"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert request.template_tools() == TOOLS


@pytest.mark.parametrize("arguments", ["[]", "{", "[" * 1000])
def test_arguments_have_to_be_objects(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ApiError, match="arguments"):
        chat(messages=[{"role": "assistant", "tool_calls": [call]}]).template_messages()


LIMITS = Limits()


def test_every_form_of_guide() -> None:
    text = json.dumps(SCHEMA)
    schema = Guide("json_schema", text)
    wrapped = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
    }
    assert chat(guided_json=SCHEMA).guide(LIMITS) == chat(guided_json=text).guide(LIMITS) == schema
    assert chat(response_format=wrapped).guide(LIMITS) == schema
    assert chat(response_format={"type": "json_object"}).guide(LIMITS) == Guide("json_object")
    assert chat(response_format={"type": "text"}).guide(LIMITS) is None
    assert chat(guided_regex="a+").guide(LIMITS) == Guide("regex", "a+")
    assert chat(guided_grammar="start: A").guide(LIMITS) == Guide("grammar", "start: A")
    assert chat().sampling(50, schema).guide == schema


def test_forced_tools_are_guides() -> None:
    named = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}})
    assert (
        named.guide(LIMITS) == Guide("json_schema", json.dumps(SCHEMA)) and named.forced_tool == "g"
    )
    guide = chat(tools=TOOLS, tool_choice="required").guide(LIMITS)
    assert guide is not None
    assert re.findall(r'"name\\": \\"(\w+)', guide.text) == ["f", "g"]
    assert (
        chat(tools=TOOLS, tool_choice="auto").guide(LIMITS)
        is chat(tools=TOOLS).guide(LIMITS)
        is None
    )


def test_one_guide_of_bounded_size() -> None:
    request = chat(guided_regex="ä" * 10)
    assert request.guide(Limits(schema_bytes=20)) == Guide("regex", "ä" * 10)
    with pytest.raises(ApiError, match="a regex of more than 19 bytes"):
        request.guide(Limits(schema_bytes=19))
    with pytest.raises(ApiError, match="more than one"):
        chat(guided_regex="a", guided_grammar="b").guide(LIMITS)
