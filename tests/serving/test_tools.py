"""Tool calls in text that comes in any pieces."""

from __future__ import annotations

import json

import pytest

from idlm import InputError
from idlm.serving.responses import ToolCall
from idlm.serving.tools import HERMES, LLAMA, MISTRAL, CallParser, Family, ForcedParser, family_of

CALL = '{"name": "add", "arguments": {"a": 1, "b": "ä"}}'
CASES: dict[str, tuple[Family, str, list[str]]] = {
    # case: the family, the text, what it is: content as it stands, calls as name and arguments
    "no call": (HERMES, "just text < and <tool", ["just text < and <tool"]),
    "one": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", ['add {"a": 1, "b": "ä"}']),
    "text before": (
        HERMES,
        f"Let me see.<tool_call>{CALL}</tool_call>",
        ["Let me see.", 'add {"a": 1, "b": "ä"}'],
    ),
    "two": (
        HERMES,
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n",
        ['add {"a": 1, "b": "ä"}'] * 2,
    ),
    "not closed": (HERMES, f"<tool_call>{CALL}", ['add {"a": 1, "b": "ä"}']),
    "cut off": (HERMES, '<tool_call>{"name": "add", "arg', ['<tool_call>{"name": "add", "arg']),
    "no JSON": (HERMES, "<tool_call>add(1)</tool_call>!", ["<tool_call>add(1)</tool_call>!"]),
    "nobody's tool": (
        HERMES,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        ["<tool_call>", "rm"],
    ),
    "deep": (HERMES, "<tool_call>" + "[" * 5_000, ["<tool_call>["]),
    "llama": (LLAMA, '\n{"name": "add", "parameters": {"a": 1}}', ['add {"a": 1}']),
    "llama with its tag": (LLAMA, '<|python_tag|>{"name": "add", "parameters": {}}', ["add {}"]),
    "llama, text": (
        LLAMA,
        'So {"name": "add", "parameters": {}}',
        ['So {"name": "add", "parameters": {}}'],
    ),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]</s>", ['add {"a": 1, "b": "ä"}'] * 2),
    "mistral, text": (MISTRAL, "hello</s>", ["hello"]),
}


def parsed(parser: CallParser | ForcedParser, pieces: list[str]) -> list[str]:
    found: list[str] = []
    parts = [part for piece in pieces for part in parser.push(piece)] + list(parser.finish())
    text = False
    for part in parts:
        if isinstance(part, ToolCall):
            found.append(f"{part.function.name} {part.function.arguments}")
            assert len(part.id) == 9
        elif text:
            found[-1] += part
        else:
            found.append(part)
        text = isinstance(part, str)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 7, 10**9])
def test_calls_are_found(case: str, size: int) -> None:
    family, text, expected = CASES[case]
    end = "</s>" if text.endswith("</s>") else ""  # a special token comes in one piece
    text = text.removesuffix(end)
    pieces = [*(text[at : at + size] for at in range(0, len(text), size)), end]
    found = parsed(CallParser(family, {"add"}, ["[TOOL_CALLS]", "</s>"]), pieces)
    if case in ("nobody's tool", "deep"):
        assert len(found) == 1 and all(part in found[0] for part in expected)
    else:
        assert found == expected


def test_calls_are_numbered() -> None:
    parser = CallParser(HERMES, {"add"})
    calls = [
        one
        for one in parser.push(f"<tool_call>{CALL}</tool_call>" * 3)
        if isinstance(one, ToolCall)
    ]
    assert [call.index for call in calls] == [0, 1, 2] and parser.calls == 3


def test_forced_calls() -> None:
    assert parsed(ForcedParser("add", {"add"}), ['{"a"', ": 1}"]) == ['add {"a": 1}']
    calls = json.dumps([{"name": "add", "parameters": {"a": 2}}])
    assert parsed(ForcedParser(None, {"add"}), [calls]) == ['add {"a": 2}']
    assert parsed(ForcedParser("add", {"add"}), ['{"a": ']) == ['{"a": ']


def test_the_family_is_in_the_template() -> None:
    assert family_of("{{ '<tool_call>\\n' }}") is HERMES
    assert family_of("[TOOL_CALLS][{{ }}]") is MISTRAL
    assert family_of("""{{- '{"name": "' + name + '", ' }}{{- '"parameters": ' }}""") is LLAMA
    for template in ("{{ messages }}", "<tool_call><function=", "[TOOL_CALLS]f[ARGS]{}"):
        with pytest.raises(InputError, match="tools"):
            family_of(template)
