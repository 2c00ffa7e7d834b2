"""Tool calls in text that comes in any pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm import InputError
from idlm.serving.responses import ToolCall
from idlm.serving.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    CallParser,
    Family,
    ForcedParser,
    family_of,
    joined,
)

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
    "closing tag in a string": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>{[\\"]"}}</tool_call>',
        ['add {"a": "</tool_call>{[\\"]"}'],
    ),
    "raw line break": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "x\n\ty"}}</tool_call>',
        ['add {"a": "x\\n\\ty"}'],
    ),
    "odd escapes": (
        HERMES,
        r"""<tool_call>{"name": "add", "arguments": {"a": "\d+ it\'s \u00e4\\"}}</tool_call>""",
        [r"""add {"a": "\\d+ it's \u00e4\\"}"""],
    ),
    "numbers that are none": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": [NaN, -Infinity, 1e400], "b": True}}',
        ['add {"a": [null, null, 1e400], "b": true}'],
    ),
    "single quotes": (
        HERMES,
        """<tool_call>{'name': 'add', 'arguments': {'a': 'say "x"'}}</tool_call>""",
        ['add {"a": "say \\"x\\""}'],
    ),
    "the tag named": (
        HERMES,
        f"I use <tool_call> and </tool_call>: <tool_call>{CALL}</tool_call>",
        ["I use <tool_call> and </tool_call>: ", 'add {"a": 1, "b": "ä"}'],
    ),
    "the tag twice": (HERMES, f"<tool_call><tool_call>{CALL}", ['add {"a": 1, "b": "ä"}']),
    "a list": (HERMES, f"<tool_call>[{CALL}, {CALL}]</tool_call>", ['add {"a": 1, "b": "ä"}'] * 2),
    "text after": (
        HERMES,
        f"<tool_call>{CALL}</tool_call>\n\nDone [1].",
        ['add {"a": 1, "b": "ä"}', "\n\nDone [1]."],
    ),
    "a brace is missing": (
        HERMES,
        f"<tool_call>{CALL[:-1]}</tool_call>\n<tool_call>{CALL}</tool_call>",
        ['add {"a": 1, "b": "ä"}'] * 2,
    ),
    "arguments first": (
        HERMES,
        '<tool_call>{"arguments": {"a": 1e400}, "name": "add"}</tool_call>',
        ['add {"a": 1e400}'],
    ),
    "arguments as text": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ['add {"a": 1}'],
    ),
    "no arguments": (HERMES, '<tool_call>{"name": "add"}</tool_call>', ["add {}"]),
    "null as arguments": (
        HERMES,
        '<tool_call>{"arguments": null, "name": "add"}</tool_call>',
        ["add {}"],
    ),
    "more members": (
        HERMES,
        '<tool_call>{"id": 7, "x": {"name": "x"}, "name": "add", "arguments": {}, "z": [{}]}',
        ["add {}"],
    ),
    "a list as arguments": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        ['<tool_call>{"name": "add", "arguments": [1]}</tool_call>'],
    ),
    "cut in a string": (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "x',
        ['add {"a": "x'],
    ),
    "a call after no call": (
        HERMES,
        f'<tool_call>{{"name": "rm"}}</tool_call> <tool_call>{CALL}</tool_call>',
        ['<tool_call>{"name": "rm"}</tool_call> ', 'add {"a": 1, "b": "ä"}'],
    ),
    "blank": (HERMES, " \n ", [" \n "]),
    "blank before": (HERMES, f"\n\n<tool_call>{CALL}", ['add {"a": 1, "b": "ä"}']),
    "llama, several": (
        LLAMA,
        '{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}\n'
        '<|python_tag|>{"name": "add", "parameters": {}}',
        ['add {"a": 1}', "add {}", "add {}"],
    ),
    "llama, a list": (
        LLAMA,
        '[{"name": "add", "parameters": {}}]',
        ['[{"name": "add", "parameters": {}}]'],
    ),
    "llama, JSON": (LLAMA, '{"name": "add"}', ['{"name": "add"}']),
    "llama, text after": (
        LLAMA,
        '{"name": "add", "parameters": {}} [so]',
        ["add {}", "[so]"],
    ),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]</s>", ['add {"a": 1, "b": "ä"}'] * 2),
    "mistral, text": (MISTRAL, "hello</s>", ["hello"]),
}


def parsed(parser: CallParser | ForcedParser, pieces: list[str]) -> list[str]:
    """What came out, content as it stands, calls as name and arguments."""
    parts = [part for piece in pieces for part in parser.push(piece)] + list(parser.finish())
    found: list[str] = []
    calls = 0
    for part in joined(parts):
        if isinstance(part, ToolCall):
            assert isinstance(part.id, str) and len(part.id) == 9 and part.index == calls
            found.append(f"{part.function.name} {part.function.arguments}")
            calls += 1
        else:
            found.append(part)
    assert parser.calls == calls
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


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 120)))
def test_no_cut_changes_anything(case: str, cuts: list[int]) -> None:
    family, text, _ = CASES[case]
    text = text.removesuffix("</s>")
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    for single in (False, True):
        whole, cut = (
            parsed(CallParser(family, {"add"}, single=single), some) for some in ([text], pieces)
        )
        assert whole == cut


@given(st.text(alphabet="<tool_cal>/{}[]\":,ane\\ \n'", max_size=40), st.booleans())
def test_any_text_comes_out(text: str, bare: bool) -> None:
    """Nothing hangs, and what is no call is not lost."""
    family = LLAMA if bare else HERMES
    whole = parsed(CallParser(family, {"add"}), [text])
    assert whole == parsed(CallParser(family, {"add"}), list(text))
    assert "".join(whole) == text


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(), VALUES, max_size=3),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.booleans(),
)
def test_arguments_are_what_the_model_wrote(
    arguments: dict[str, object], indent: int | None, ascii: bool, last: bool
) -> None:
    """Any JSON, in any layout, whether the name comes first or last."""
    name, members = {"name": "add"}, {"arguments": arguments}
    call = members | name if last else name | members
    text = json.dumps(call, indent=indent, ensure_ascii=ascii)
    parser = CallParser(HERMES, {"add"})
    (found,) = joined([*parser.push(f"<tool_call>{text}</tool_call>"), *parser.finish()])
    assert isinstance(found, ToolCall)
    assert json.loads(found.function.arguments) == arguments


def test_the_first_call_alone() -> None:
    text = f"So: <tool_call>{CALL}</tool_call> and <tool_call>{CALL}</tool_call> Done."
    found = parsed(CallParser(HERMES, {"add"}, single=True), [text])
    assert found == ["So: ", 'add {"a": 1, "b": "ä"}']


def test_arguments_come_as_they_are_written() -> None:
    parser = CallParser(HERMES, {"add"})
    pieces = [
        [part.function.arguments for part in parser.push(text) if isinstance(part, ToolCall)]
        for text in ('<tool_call>{"name": "add", "argu', 'ments": {"a"', ': "x', ' y"', "}}")
    ]
    assert pieces == [[], ['{"a"'], [': "x'], [' y"'], ["}"]]


FORCED = json.dumps([{"name": "add", "parameters": {"a": 2}}, {"name": "b", "parameters": {}}])


def test_forced_calls() -> None:
    assert parsed(ForcedParser("add", {"add"}), ['{"a"', ": 1}"]) == ['add {"a": 1}']
    assert parsed(ForcedParser(None, {"add", "b"}), [FORCED]) == ['add {"a": 2}', "b {}"]
    assert parsed(ForcedParser(None, {"add", "b"}, single=True), [FORCED]) == ['add {"a": 2}']
    assert parsed(ForcedParser("add", {"add"}), [""]) == []


@pytest.mark.parametrize("length", range(len(FORCED) + 1))
def test_forced_calls_that_are_cut(length: int) -> None:
    """Finished calls stay, the one that is cut comes as far as it goes, and content there is
    none."""
    text = FORCED[:length]
    found = parsed(ForcedParser(None, {"add", "b"}), [text])
    assert found == parsed(ForcedParser(None, {"add", "b"}), list(text))
    whole = ['add {"a": 2}', "b {}"]
    assert len(found) <= 2 and all(w.startswith(f) for f, w in zip(found, whole, strict=False))
    assert len(found) == text.count('parameters": {') and (len(found) < 2 or found[0] == whole[0])
    assert parsed(ForcedParser("add", {"add"}), [text]) == ([f"add {text}"] if text else [])


def test_the_family_is_in_the_template() -> None:
    assert family_of("{{ '<tool_call>\\n' }}") is HERMES
    assert family_of("[TOOL_CALLS][{{ }}]") is MISTRAL
    assert family_of("""{{- '{"name": "' + name + '", ' }}{{- '"parameters": ' }}""") is LLAMA
    for template in ("{{ messages }}", "<tool_call><function=", "[TOOL_CALLS]f[ARGS]{}"):
        with pytest.raises(InputError, match="tools"):
            family_of(template)
