"""The one reader of messages: of `LLM.chat`, files of prompts and of training, and requests.

    given                                           read
    a text in place of messages                     one message of the user
    role "developer"                                "system"
    content as a text                               the text
    content as parts                                the parts, {"type": "text", "text": ...} each
    content null or missing, of an assistant        ""
      or a tool
    tool_calls with arguments as JSON text          an object; "" is {}
    a field that is null, tool_calls: []            left out

Other fields go to the template as they are. `as_template_takes` then gives contents the form that a
template can show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from idlm.errors import InputError

TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "redacted_thinking", "reasoning")
"""Parts of an earlier answer that no template shows again."""
EXAMPLE = "{'role': 'user', 'content': '...'}"


def as_user(text: str, chat: bool, has_template: bool) -> list[dict[str, Any]] | None:
    """A text as the message of a user; None if it is a prompt as it stands, since `chat` is off or
    the model has no chat template."""
    return [{"role": "user", "content": text}] if chat and has_template else None


def read_messages(messages: object) -> list[dict[str, Any]]:
    """Messages in one form, whichever way they were written.

    Raises:
        InputError: there is no message, or one is not a message of text; the error names it.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(messages, Mapping) or not isinstance(messages, Iterable):
        raise InputError(f"messages={_short(messages)} is no list; give for example [{EXAMPLE}]")
    read = [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]
    if not read:
        raise InputError(f"messages=[] holds no message; give at least one {EXAMPLE}")
    return read


def as_template_takes(
    messages: Iterable[Mapping[str, Any]], texts: bool, parts: bool
) -> list[dict[str, Any]]:
    """Messages of `read_messages` for a template that shows contents as texts, as parts, or both.

    A content keeps its form if the template takes it.
    """
    changed = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str) and not texts:
            content = [{"type": "text", "text": content}] if content else []
        elif not isinstance(content, str) and not parts:
            content = "\n".join(part["text"] for part in content)
        changed.append({**message, "content": content})
    return changed


def _message(message: object, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(role, str) or not role:
        raise InputError(f"{where} is no message: {_short(message)}; give for example {EXAMPLE}")
    fields = {str(name): value for name, value in message.items() if value is not None}
    fields["role"] = "system" if role == "developer" else role
    fields["content"] = _content(message, role, where)
    calls = fields.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InputError(f"{where} has tool_calls={_short(calls)}; give a list of calls")
        fields["tool_calls"] = [_call(call, where) for call in calls]
    return fields


def _content(message: Mapping[str, Any], role: str, where: str) -> str | list[dict[str, str]]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and role not in ("user", "system", "developer"):
        return ""
    if isinstance(content, list | tuple):
        parts = [_part(part, role, where) for part in content]
        return [part for part in parts if part is not None] or ""
    raise InputError(
        f"{where} of role {role!r} has content={_short(content)}; "
        "give a text, or a list of {'type': 'text', 'text': '...'}"
    )


def _part(part: object, role: str, where: str) -> dict[str, str] | None:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping):
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            return {"type": "text", "text": part["refusal"]}
        if kind in THOUGHT_PARTS and role == "assistant":
            return None
    shown = f"a part of type {kind!r}" if isinstance(kind, str) else f"the part {_short(part)}"
    raise InputError(
        f"{where} has {shown}, which is no text; this model reads parts of type 'text' only"
    )


def _call(call: object, where: str) -> dict[str, Any]:
    """A call with arguments as an object, as templates take it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(
            f"{where} has a tool call without a function's name: {_short(call)}; "
            "give {'function': {'name': '...', 'arguments': '{}'}}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = ()
    if not isinstance(arguments, Mapping | None):
        raise InputError(
            f"{where}: tool_calls arguments are not a JSON object; send them as they came"
        )
    named = {"name": function["name"], "arguments": dict(arguments or {})}
    read = {"type": "function", "function": named}
    identity = call.get("id") if isinstance(call, Mapping) else None
    return {"id": identity, **read} if identity is not None else read


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."
