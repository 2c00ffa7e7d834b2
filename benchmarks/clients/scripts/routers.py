"""A router in front of the server, by its package: sglang-router, vllm-router or smg."""

import sys
from typing import Any

from anthropic import Anthropic
from features import HOST, KEY, MODEL, QUESTION, Trip, check, feature
from front import front
from openai import BadRequestError, OpenAI, pydantic_function_tool

ROUTERS = {
    "sglang-router": ["sglang-router", "launch", "--worker-urls", HOST],
    "vllm-router": ["vllm-router", "--worker-urls", HOST],
    "smg": ["smg", "launch", "--worker-urls", HOST],
}
package = sys.argv[1]
host = f"http://127.0.0.1:{front([*ROUTERS[package], '--host', '127.0.0.1'], '/readiness')}"
client = OpenAI(base_url=f"{host}/v1", api_key=KEY, max_retries=0, timeout=300)
USER: Any = {"role": "user", "content": QUESTION}
CHAT: Any = {"model": MODEL, "messages": [USER], "max_tokens": 8}


@feature("models")
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]


@feature("chat, whole and streamed")
def chat() -> None:
    text = client.chat.completions.create(**CHAT, seed=5).choices[0].message.content
    chunks = list(client.chat.completions.create(**CHAT, seed=5, stream=True))
    assert text == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@feature("chat: a required tool, a JSON schema")
def tools() -> None:
    tool = pydantic_function_tool(Trip, name="book")
    fields = CHAT | {"max_tokens": 96}
    answer = client.chat.completions.create(
        **fields, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    Trip.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)
    parsed = client.chat.completions.parse(**fields, response_format=Trip)
    assert parsed.choices[0].message.parsed


@feature("a 400 of the server comes through with its sentence")
def error() -> None:
    try:
        client.chat.completions.create(**CHAT, temperature=-1)
    except BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("it was answered")


@feature("completions")
def completions() -> None:
    answer = client.completions.create(model=MODEL, prompt="One two", max_tokens=4)
    assert answer.choices[0].text


@feature("responses, whole and streamed")
def responses() -> None:
    fields: Any = {"model": MODEL, "input": QUESTION, "max_output_tokens": 16}
    assert client.responses.create(**fields).output_text
    assert list(client.responses.create(**fields, stream=True))


def messages() -> None:
    claude = Anthropic(base_url=host, api_key=KEY, max_retries=0, timeout=300)
    assert claude.messages.create(**CHAT).content[0].text
    with claude.messages.stream(**CHAT) as stream:
        assert "".join(stream.text_stream)


if package == "vllm-router":  # the others have no such path for a server like this one
    feature("messages, whole and streamed")(messages)
check(package)
