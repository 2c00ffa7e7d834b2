"""Rows of jsonl files in the forms that training data has.

    row                                                     becomes
    {"prompt": text or ids, "response": text or ids}        the same
    {"prompt": ..., "completion": ...}                      prompt and response
    {"prompt": [messages], "completion": [messages]}        messages
    {"messages": [...], "response": text or ids}            messages, and a response if it is ids
    {"messages": [...]}, the answer at the end              messages
    {"conversations": [{"from": ..., "value": ...}]}        messages (ShareGPT)
    {"instruction": ..., "input": ..., "output": ...}       messages (Alpaca, with or without input)
    {"text": ...}                                           a response to the beginning of a text

`tools` beside messages go to the chat template. Where prompt and response are both ids, they are
what is trained on, whatever is beside them: messages would be encoded anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm.errors import InputError
from idlm.inputs import read_lines
from idlm.messages import read_messages

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles of messages by ShareGPT's names."""
FORMS = (
    'write {"prompt": ..., "response": ...}, {"messages": [...]} with the answer at the end, '
    '{"conversations": [...]}, {"instruction": ..., "output": ...} or {"text": ...}'
)


@dataclass(frozen=True)
class Row:
    """What a row holds; each field is None if the row has no such part.

    Attributes:
        name: file and line, for messages of errors.
        prompt, response, text: a text or token ids.
        messages: with the answer at the end, if the row has one and it is no ids.
        tools: JSON schemas for the chat template.
        written: the text of a response that is ids.
    """

    name: str
    prompt: str | list[Any] | None = None
    response: str | list[Any] | None = None
    text: str | list[Any] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    written: str | None = None

    @property
    def question(self) -> list[dict[str, Any]] | None:
        """The messages without the answer at the end."""
        messages = self.messages or []
        return messages[:-1] if self.answered else self.messages

    @property
    def answered(self) -> bool:
        """Whether the messages end with an answer."""
        return bool(self.messages) and (self.messages or [])[-1]["role"] == "assistant"

    @property
    def responds(self) -> bool:
        """Whether there is a response: ids or a text, or an answer that says or calls something."""
        if self.response or not self.answered:
            return bool(self.response)
        return any(said for key, said in (self.messages or [])[-1].items() if key != "role")


def read_jsonl(path: str | Path) -> Iterator[tuple[str, str]]:
    """The rows of a jsonl file as text, each with its name for error messages.

    Raises:
        InputError: the file cannot be read.
    """
    for at, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield f"{path} line {at}", line


def read_fields(row: str | dict[str, Any], name: str) -> dict[str, Any]:
    """The fields of a row, which may be JSON text.

    Raises:
        InputError: it is not a JSON object.
    """
    if isinstance(row, dict):
        return row
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({error}); write one object per line") from None
    if not isinstance(fields, dict):
        raise InputError(f"{name} is not an object; {FORMS}")
    return fields


def read_row(row: str | dict[str, Any], name: str) -> Row:
    """A row in one form.

    Raises:
        InputError: it is not JSON, has no prompt, or a part of it is of the wrong type.
    """
    fields = read_fields(row, name)
    try:
        return _row({key: value for key, value in fields.items() if value is not None}, name)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _row(fields: dict[str, Any], name: str) -> Row:
    prompt, response = fields.get("prompt"), fields.get("response", fields.get("completion"))
    messages = fields.get("messages")
    if _is_ids(prompt) and _is_ids(response):
        return Row(name, prompt=prompt, response=response, written=_written(fields))
    if messages is None and "conversations" in fields:
        messages = _sharegpt(fields["conversations"], fields.get("system"))
    if messages is None and prompt is None and "instruction" in fields:
        messages, response = _alpaca(fields), fields.get("output", response)
    if messages is None and _is_messages(prompt):
        messages = prompt
    if messages is not None:
        read = read_messages(messages)
        if _is_messages(response):
            read, response = [*read, *read_messages(response)], None
        elif isinstance(response, str):
            read, response = [*read, {"role": "assistant", "content": response}], None
        ids = None if response is None else _value(response, "response")
        return Row(name, response=ids, messages=read, tools=_tools(fields.get("tools")))
    if prompt is not None:
        answer = None if response is None else _value(response, "response")
        return Row(name, prompt=_value(prompt, "prompt"), response=answer)
    if "text" in fields:
        return Row(name, text=_value(fields["text"], "text"))
    raise InputError(f"it has no prompt; {FORMS}")


def _value(value: object, what: str) -> str | list[Any]:
    if not isinstance(value, str | list):
        raise InputError(f"the {what} is neither a text nor a list of token ids")
    return value


def _tools(tools: object) -> list[Any] | None:
    """A list of schemas; it may be JSON text, since a column of a table has one type."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = ()
    if tools is not None and not isinstance(tools, list):
        raise InputError("tools is no list; give a list of JSON schemas")
    return tools


def _written(fields: dict[str, Any]) -> str | None:
    """The text that stands beside a response of ids, as `distill` writes it."""
    messages: Any = fields.get("messages")
    answer = messages[-1].get("content") if _is_messages(messages) else None
    text = fields.get("response_text", answer)
    return text if isinstance(text, str) else None


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _alpaca(fields: dict[str, Any]) -> list[Any]:
    """The question of Alpaca's form: an instruction, and what it is about if that is given."""
    parts = [fields["instruction"], fields.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise InputError("the instruction or its input is no text; give texts")
    return [{"role": "user", "content": "\n\n".join(filter(None, parts))}]


def _sharegpt(turns: object, system: object) -> list[Any]:
    """ShareGPT's turns as messages; turns that are messages already stay as they are."""
    if not isinstance(turns, list):
        raise InputError("conversations is no list; give a list of turns")
    messages = [_turn(turn) for turn in turns]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    if turn["from"] not in ROLES:
        raise InputError(
            f"a turn is from {turn['from']!r}, which is unknown; use {', '.join(ROLES)}"
        )
    return {"role": ROLES[turn["from"]], "content": turn.get("value")}
