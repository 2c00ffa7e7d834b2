"""OpenAI's Python client: responses."""

from typing import Any

from features import KEY, MODEL, QUESTION, URL, Trip, check, feature
from openai import OpenAI, pydantic_function_tool

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
CHAT_TOOL: Any = pydantic_function_tool(Trip, name="book")
TOOL = {"type": "function", **CHAT_TOOL["function"]}


def respond(input: Any = QUESTION, **fields: Any) -> Any:
    """A response."""
    fields = {"max_output_tokens": 16, "model": MODEL} | fields
    return client.responses.create(input=input, **fields)


@feature("responses: text, the output sent back")
def text() -> None:
    first = respond(instructions="Be short.", store=False)
    assert first.output_text and first.usage.output_tokens
    question = {"role": "user", "content": QUESTION}
    assert respond([question, *first.output, question]).output_text


@feature("responses: streamed")
def stream() -> None:
    events = list(respond(stream=True))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text


@feature("responses: parse into a nested model")
def parse() -> None:
    answer = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=Trip, max_output_tokens=96
    )
    assert isinstance(answer.output_parsed, Trip)


@feature("responses: tool loop, whole and streamed")
def tools() -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 96}
    answer = respond(parallel_tool_calls=False, **fields)
    call = answer.output[0]
    Trip.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    question = {"role": "user", "content": QUESTION}
    assert respond([question, *answer.output, result], tools=[TOOL]).output
    with client.responses.stream(
        model=MODEL, input=QUESTION, parallel_tool_calls=False, **fields
    ) as events:
        Trip.model_validate_json(events.get_final_response().output[0].arguments)


@feature("responses: previous_response_id", refused="previous_response_id")
def previous() -> None:
    respond(previous_response_id="resp_1")


@feature("responses: retrieve", refused="404")
def retrieve() -> None:
    client.responses.retrieve("resp_1")


@feature("responses: built-in tools", refused="web_search")
def built_in() -> None:
    respond(tools=[{"type": "web_search"}])


check("openai")
