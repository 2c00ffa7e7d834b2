"""What requests become: sampling parameters, messages for a template, guides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from idlm import SamplingParams
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.messages import Guide
from idlm.serving.protocol import SHARED, the_guide
from idlm.serving.protocol_chat import ChatRequest
from idlm.serving.protocol_completions import CompletionRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
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
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields)


def test_fields_become_sampling_parameters() -> None:
    assert set(VALUES) == set(SHARED)
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in VALUES.items()}
    made = chat(**values, logit_bias={"5": -1}).sampling(50, logprobs=2)
    assert made == SamplingParams(max_tokens=50, logprobs=2, logit_bias={5: -1.0}, **VALUES)


def test_null_is_as_good_as_absent() -> None:
    nothing = {name: None for name, field in ChatRequest.model_fields.items() if not field.is_required()}
    kept = {name: value for name, value in nothing.items() if name not in ("idlm", "add_generation_prompt")}
    assert chat(**kept).sampling(50) == chat().sampling(50) == SamplingParams(max_tokens=50)


def test_which_number_of_tokens_counts() -> None:
    assert chat().asked_tokens is None
    assert chat(max_tokens=5).asked_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=6).asked_tokens == 6
    assert CompletionRequest(model="m", prompt="x").asked_tokens == 16


def test_messages_as_templates_know_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": "be kind", "type": "text"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1"},
        ],
        tools=TOOLS,
    )
    function = {"name": "f", "arguments": {"a": 1}}
    assert request.template_messages() == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb", "name": "me"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    assert request.template_tools() == TOOLS


@pytest.mark.parametrize("arguments", ["", "[]", "{", "[" * 1000])
def test_arguments_have_to_be_objects(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ApiError, match="arguments"):
        chat(messages=[{"role": "assistant", "tool_calls": [call]}]).template_messages()


def test_every_form_of_guide() -> None:
    text = json.dumps(SCHEMA)
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    assert chat(guided_json=SCHEMA).guides() == chat(guided_json=text).guides() == [Guide("json_schema", text)]
    assert chat(response_format=wrapped).guides() == [Guide("json_schema", text)]
    assert chat(response_format={"type": "json_object"}).guides() == [Guide("json_object", "")]
    assert chat(response_format={"type": "text"}).guides() == []
    assert chat(guided_regex="a+").guides() == [Guide("regex", "a+")]
    assert chat(guided_grammar="start: A").guides() == [Guide("grammar", "start: A")]


def test_forced_tools_are_guides() -> None:
    named = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}})
    assert named.guides() == [Guide("json_schema", json.dumps(SCHEMA))] and named.forced_tool == "g"
    (guide,) = chat(tools=TOOLS, tool_choice="required").guides()
    names = [one["properties"]["name"]["const"] for one in json.loads(guide.text)["items"]["anyOf"]]
    assert names == ["f", "g"]
    assert chat(tools=TOOLS, tool_choice="auto").guides() == chat(tools=TOOLS).guides() == []


def test_one_guide_of_bounded_size() -> None:
    guide = Guide("regex", "ä" * 10)
    assert the_guide([guide], Limits(schema_bytes=20)) == guide and the_guide([], Limits()) is None
    for guides, limits in (([guide], Limits(schema_bytes=19)), ([guide, guide], Limits())):
        with pytest.raises(ApiError):
            the_guide(guides, limits)
