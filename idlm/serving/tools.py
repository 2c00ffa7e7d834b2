"""Tool calls in the text of models whose chat template writes them in a known format.

    hermes   <tool_call>{"name": .., "arguments": {..}}</tool_call>          Hermes, Qwen 2.5 and 3
    llama    {"name": .., "parameters": {..}}, all of the text               Llama 3.1 and later
    mistral  [TOOL_CALLS][{"name": .., "arguments": {..}}, ..]               Mistral up to 0.3

Text is passed on until a call may begin; from there it is held back until the call ends. If it
turns out to be no call (broken JSON, an unknown tool), it is passed on as text.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from idlm.errors import InputError
from idlm.serving.responses import FunctionCall, ToolCall

LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""The only length that Mistral's templates accept."""


@dataclass(frozen=True)
class Family:
    """A format of tool calls.

    Attributes:
        marker: a text that the chat templates with this format contain.
        without: a text that they do not contain; it marks newer formats that are not supported.
        opening, closing: the texts around a call; closing None: the end of the output.
        bare: the opening may be missing if the output begins with a brace.
        special: the opening is a special token, which decoding must keep.
    """

    marker: str
    without: str
    opening: str
    closing: str | None = None
    bare: bool = False
    special: bool = False


HERMES = Family("<tool_call>", "<function=", "<tool_call>", "</tool_call>")
MISTRAL = Family("[TOOL_CALLS]", "[ARGS]", "[TOOL_CALLS]", special=True)
LLAMA = Family('"parameters": ', "<tool_call>", "<|python_tag|>", bare=True)
FAMILIES = (HERMES, MISTRAL, LLAMA)


def family_of(template: str) -> Family:
    """The format of tool calls in a chat template.

    Raises:
        InputError: it has none that is known here.
    """
    for family in FAMILIES:
        if family.marker in template and family.without not in template:
            return family
    raise InputError(
        "tools: this model's chat template has no form of tool calls that is known here; "
        "leave tools out"
    )


class CallParser:
    """Splits the output, as it comes, into content and tool calls.

    Args:
        family: the format of calls.
        names: of the tools in the request.
        specials: special tokens to drop, for families whose output keeps special tokens.
    """

    def __init__(
        self, family: Family, names: Collection[str], specials: Collection[str] = ()
    ) -> None:
        self._family, self._names = family, names
        self._specials = (
            [token for token in specials if token != family.opening] if family.special else []
        )
        self._held = ""
        self._inside = False
        self._started = False
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """Add text; returns the pieces of content and the calls that are certain now."""
        for special in self._specials:
            text = text.replace(special, "")
        self._held += text
        pieces: list[str | ToolCall] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[str | ToolCall]:
        """The rest, at the end of the output."""
        rest, self._held = self._held, ""
        if self._inside:
            return self._parse(rest)
        return self._content(rest)

    def _step(self, pieces: list[str | ToolCall]) -> bool:
        """Append the next complete piece to `pieces`; whether there may be another."""
        if self._inside:
            closing = self._family.closing
            at = -1 if closing is None else self._held.find(closing)
            if closing is None or at < 0:
                return False
            raw, self._held = self._held[: at + len(closing)], self._held[at + len(closing) :]
            self._inside = False
            pieces += self._parse(raw)
            return True
        at, sure = self._opening()
        content, self._held = self._held[:at], self._held[at:]
        self._inside = sure
        pieces += self._content(content)
        return sure

    def _opening(self) -> tuple[int, bool]:
        """Where a call begins, or may begin once more text is there; and whether it certainly
        does."""
        opening = self._family.opening
        if self._family.bare and not self._started:
            stripped = self._held.lstrip()
            if stripped.startswith("{") or not stripped:
                return 0, bool(stripped)
        at = self._held.find(opening)
        if at >= 0:
            return at, True
        length = next(
            (n for n in range(len(opening) - 1, 0, -1) if self._held.endswith(opening[:n])), 0
        )
        return len(self._held) - length, False

    def _content(self, text: str) -> list[str | ToolCall]:
        """Text that is not a call; white space after a call is dropped."""
        if not text or (self.calls and not text.strip()):
            return []
        self._started = True
        return [text]

    def _parse(self, raw: str) -> list[str | ToolCall]:
        body = (
            raw.strip().removeprefix(self._family.opening).removesuffix(self._family.closing or "")
        )
        calls = read_calls(body, self._names)
        if calls is None:
            return self._content(raw)
        numbered: list[str | ToolCall] = [
            tool_call(*call, self.calls + at) for at, call in enumerate(calls)
        ]
        self.calls += len(numbered)
        return numbered


class ForcedParser:
    """For a `tool_choice` that forces a call: the output is the arguments of `name`, or a list of
    calls."""

    def __init__(self, name: str | None, names: Collection[str]) -> None:
        self._name, self._names = name, names
        self._text = ""
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """Nothing is certain before the end."""
        self._text += text
        return []

    def finish(self) -> list[str | ToolCall]:
        """The calls, or the text itself if the output was cut."""
        if self._name is None:
            calls = read_calls(self._text, self._names)
        else:
            arguments = _value(self._text)
            calls = None if arguments is None else [(self._name, arguments)]
        if calls is None:
            return [self._text] if self._text else []
        self.calls = len(calls)
        return [tool_call(*call, at) for at, call in enumerate(calls)]


Parser = CallParser | ForcedParser


def read_calls(text: str, names: Collection[str]) -> list[tuple[str, Any]] | None:
    """Names and arguments of one call or of a list of calls, in JSON; None for anything else."""
    value = _value(text)
    calls = value if isinstance(value, list) else [value]
    parsed = [_call(call, names) for call in calls]
    return None if None in parsed or not parsed else parsed  # type: ignore[return-value]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, names: Collection[str]) -> tuple[str, Any] | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def tool_call(name: str, arguments: Any, index: int) -> ToolCall:
    """A call for the response, with a new id."""
    id = "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH))
    return ToolCall(id, FunctionCall(name, json.dumps(arguments, ensure_ascii=False)), index=index)
