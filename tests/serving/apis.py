"""What the tests of /v1/responses and /v1/messages share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from idlm.serving.responses import ChatChunk, ChoiceDelta, ChunkChoice
from idlm.serving.wire import Delta, Finished

HERMES = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}{% endfor %}<tool_call></tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson
}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A chat template with tools."""
CALL = ['<tool_call>{"name": "add", ', '"arguments": {"a": 1}}</tool_call>']
SCRIPTS: dict[str, list[str]] = {
    "nothing": [],
    "a text": ["Let me ", "see."],
    "a call": CALL,
    "a text and two calls": ["Let me ", "see.", *CALL, "\n", *CALL],
    "a call and a text": [*CALL, "So it", " is."],
    "a call that is cut": ["Well", CALL[0]],
}
"""Outputs in pieces, as the engine sends them."""
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a call without arguments."""


class Thought(ChoiceDelta):
    """A delta with a part of a thought."""

    reasoning_content: str = ""


THINKS = [
    ChoiceDelta("assistant", ""),
    Thought(reasoning_content="Let "),
    Thought(reasoning_content="me see."),
    ChoiceDelta(content="Two"),
    ChoiceDelta(content="."),
]


def thinker(job: Any) -> Any:
    """A chat answer whose model thinks: a chunk for each event."""
    left = iter(THINKS)

    def chunks(index: int, event: Delta | Finished) -> list[ChatChunk]:
        if isinstance(event, Finished):
            choice = ChunkChoice(index, ChoiceDelta(), "stop")
        else:
            choice = ChunkChoice(index, next(left))
        return [ChatChunk(**job.head, choices=[choice])]

    return SimpleNamespace(job=job, chunks=chunks)


def sse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The events of a stream, whose names must be their types."""
    events, name = [], ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            events.append(json.loads(value))
            assert events[-1]["type"] == name
    return events
