"""Anthropic's Python client."""

from typing import Any

from anthropic import Anthropic
from features import HOST, KEY, MODEL, QUESTION, Trip, check, feature

client = Anthropic(base_url=HOST, api_key=KEY, max_retries=0, timeout=300)
USER: Any = {"role": "user", "content": QUESTION}
TOOL: Any = {"name": "book", "description": "Books.", "input_schema": Trip.model_json_schema()}


def message(*messages: Any, **fields: Any) -> Any:
    """A response to the messages, or to a question."""
    fields = {"max_tokens": 8, "model": MODEL} | fields
    return client.messages.create(messages=list(messages) or [USER], **fields)


@feature("messages: text, system, stop_sequences, cache_control")
def text() -> None:
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    answer = message(system=system, stop_sequences=["zz"], metadata={"user_id": "me"})
    assert answer.content[0].text and answer.usage.output_tokens


@feature("messages: streamed")
def stream() -> None:
    with client.messages.stream(model=MODEL, max_tokens=8, messages=[USER]) as events:
        text = "".join(events.text_stream)
        assert text == events.get_final_message().content[0].text


@feature("messages: tool loop, whole and streamed")
def tools() -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 96}
    answer = message(**fields)
    call = answer.content[0]
    Trip.model_validate(call.input)
    assert answer.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
    said = {"role": "assistant", "content": answer.content}
    assert message(USER, said, {"role": "user", "content": [result]}, tools=[TOOL]).content
    named = fields | {"tool_choice": {"type": "tool", "name": "book"}}
    with client.messages.stream(model=MODEL, messages=[USER], **named) as events:
        Trip.model_validate(events.get_final_message().content[0].input)


@feature("messages: parse into a nested model")
def parse() -> None:
    answer = client.messages.parse(model=MODEL, max_tokens=96, messages=[USER], output_format=Trip)
    assert isinstance(answer.parsed_output, Trip)


@feature("messages: count_tokens")
def count() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=[USER])
    usage = message().usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@feature("messages: pictures", refused="image")
def pictures() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    message({"role": "user", "content": [{"type": "image", "source": source}]})


check("anthropic")
