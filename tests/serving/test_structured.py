"""The form of an output under each server's names for it, and what the guides of tools allow."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from idlm import Guide
from idlm.engine.guide import grammar_of
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.responses import ToolCall
from idlm.serving.schema import CompletionRequest
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.tools import CallParser, family_of

LIMITS = Limits()
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OBEYS_SCHEMA = Guide("json_schema", json.dumps(SCHEMA))
CHOICE = Guide("choice", '["a", "\\u00e4"]')
FORMS: list[tuple[dict[str, Any], Guide | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Guide("json_object")),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, OBEYS_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, OBEYS_SCHEMA),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, OBEYS_SCHEMA),
    ({"structured_outputs": {"json": SCHEMA}}, OBEYS_SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, OBEYS_SCHEMA),
    ({"structured_outputs": {"regex": "a+"}}, Guide("regex", "a+")),
    ({"structured_outputs": {"choice": ["a", "ä"]}}, CHOICE),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Guide("grammar", 'root ::= "a"')),
    ({"structured_outputs": {"json_object": True}}, Guide("json_object")),
    ({"structured_outputs": {"json_object": False, "structural_tag": None}}, None),
    ({"guided_choice": ["a", "ä"], "guided_decoding_backend": "xgrammar"}, CHOICE),
    ({"regex": "a+"}, Guide("regex", "a+")),
    ({"ebnf": 'root ::= "a"'}, Guide("grammar", 'root ::= "a"')),
    ({"grammar": 'root ::= "a"'}, Guide("grammar", 'root ::= "a"')),
    ({"json_schema": SCHEMA}, OBEYS_SCHEMA),
    ({"json_schema": json.dumps(SCHEMA)}, OBEYS_SCHEMA),
    # as guidance sends it: the same under vLLM's old and its new name
    ({"guided_grammar": "x", "structured_outputs": {"grammar": "x"}}, Guide("grammar", "x")),
]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    )


@pytest.mark.parametrize(("fields", "guide"), FORMS, ids=lambda value: str(value)[:60])
def test_every_name_of_a_form(fields: dict[str, Any], guide: Guide | None) -> None:
    assert chat(**fields).guide(LIMITS) == guide
    text = CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})
    assert text.guide(LIMITS) == guide


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag is not supported"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "choice, structured_outputs.regex",
        ),
        ({"guided_regex": "a", "ebnf": "b"}, "guided_regex, ebnf"),
        ({"response_format": {"type": "json_schema"}}, "no schema"),
        ({"guided_json": "[1]"}, "guided_json is not a JSON object"),
    ],
)
def test_refused_forms(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words):
        chat(**fields).guide(LIMITS)


def tool(name: str, parameters: dict[str, Any] | None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def allows(guide: Guide | None, text: str) -> bool:
    """Whether the whole text obeys the guide, byte by byte."""
    assert guide is not None
    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(guide), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def call(name: str, arguments: str) -> str:
    return f'[{{"name": "{name}", "parameters": {arguments}}}]'


TREE = {
    "properties": {"left": {"$ref": "#"}, "value": {"type": "integer"}},
    "required": ["value"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {"o": {"$ref": "#/$defs/O"}, "p": {"$ref": "#/definitions/P~1q"}},
    "required": ["o"],
    "additionalProperties": False,
    "$defs": {"O": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/N"}]}, "N": {"type": "number"}},
    "definitions": {"P/q": {"enum": ["p"]}},
}
OTHER = {**NESTED, "$defs": {"O": {"type": "boolean"}}}
TOOLS = [tool("tree", TREE), tool("nested", NESTED), tool("nested_2", OTHER), tool("now", None)]
ARGUMENTS = [
    ("tree", '{"value": 1}', True),
    ("tree", '{"left": {"value": 2}, "value": 1}', True),
    ("tree", '{"left": {"left": {}}, "value": 1}', False),
    ("tree", "1", False),
    ("nested", '{"o": 1.5, "p": "p"}', True),
    ("nested", '{"o": null}', True),
    ("nested", '{"o": true}', False),
    ("nested", '{"o": 1, "p": "q"}', False),
    ("nested_2", '{"o": true}', True),
    ("nested_2", '{"o": 1}', False),
    ("now", "{}", True),
    ("now", '{"a": 1}', False),
]


@pytest.mark.parametrize(("name", "arguments", "good"), ARGUMENTS)
def test_forced_arguments_obey_the_schema_of_their_tool(
    name: str, arguments: str, good: bool
) -> None:
    """Definitions and references to the root mean the tool's own schema, whatever is beside it."""
    required = chat(tools=TOOLS, tool_choice="required").guide(LIMITS)
    assert allows(required, call(name, arguments)) == good
    named = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}})
    assert allows(named.guide(LIMITS), arguments) == good


def test_how_many_calls() -> None:
    one = '{"name": "now", "parameters": {}}'
    for parallel, most in ((None, 16), (True, 16), (False, 1)):
        guide = chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel).guide(
            LIMITS
        )
        for count in (0, 1, 2, 16, 17):
            text = f"[{', '.join([one] * count)}]"
            assert allows(guide, text) == (1 <= count <= most)


def test_a_forced_call_has_no_content_to_be_formed() -> None:
    forced = {"tools": TOOLS, "tool_choice": "required"}
    plain = chat(**forced).guide(LIMITS)
    assert chat(response_format={"type": "json_object"}, **forced).guide(LIMITS) == plain
    with pytest.raises(ApiError, match="guided_regex, tools; use one"):
        chat(guided_regex="a", **forced).guide(LIMITS)


def test_allowed_tools() -> None:
    def choice(mode: str, name: str) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": name}}
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}

    forced = chat(tools=TOOLS, tool_choice=choice("required", "now"))
    assert allows(forced.guide(LIMITS), call("now", "{}"))
    assert not allows(forced.guide(LIMITS), call("tree", '{"value": 1}'))
    free = chat(tools=TOOLS, tool_choice=choice("auto", "now"))
    assert free.guide(LIMITS) is None
    assert [one.function.name for one in free.tools_in_use] == ["now"]
    with pytest.raises(ApiError, match="'then', which is not in tools"):
        chat(tools=TOOLS, tool_choice=choice("auto", "then")).check(LIMITS)


@pytest.mark.parametrize("kind", ["array", "string", ["string", "null"], None])
def test_arguments_are_an_object(kind: Any) -> None:
    with pytest.raises(ApiError, match="'f' have the type"):
        chat(tools=[tool("f", {"type": kind})], tool_choice="required").guide(LIMITS)


def test_a_form_or_calls() -> None:
    """A request with a form and tools may have either, in the form of the model's calls."""
    template = "<tool_call>"
    prompts: Any = SimpleNamespace(template_for=lambda tools: template)

    def guide(**fields: Any) -> Guide | None:
        request = chat(tools=TOOLS, **fields)
        return request.form_or_calls(request.guide(LIMITS), prompts)

    one = family_of(template)
    assert one.form is not None
    text = f'{one.form.before_name}"now"{one.form.before_arguments}{{"x": [1]}}{one.form.after}'
    two = text + one.form.between + text
    for wanted, good in (({"json_schema": SCHEMA}, '{"a": 1}'), ({"guided_choice": ["b"]}, "b")):
        assert all(allows(guide(**wanted), answer) for answer in (good, text, two))
        assert not any(allows(guide(**wanted), wrong) for wrong in (good + text, "c", "{}"))
        single = guide(**wanted, parallel_tool_calls=False)
        assert allows(single, text) and not allows(single, two)
        assert not allows(guide(**wanted, tool_choice="none"), text)
    assert guide() is None
    assert guide(regex="a+") == Guide("regex", "a+")
    for alone in ('"parameters": ', "[TOOL_CALLS]"):
        template = alone
        assert guide(json_schema=SCHEMA) == OBEYS_SCHEMA
    found = CallParser(one, {"now"}).push(two)
    assert [c.function.arguments for c in found if isinstance(c, ToolCall)] == ['{"x": [1]}'] * 2
