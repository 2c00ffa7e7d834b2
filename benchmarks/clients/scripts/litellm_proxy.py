"""LiteLLM's proxy in front of the server, asked by OpenAI's and Anthropic's clients."""

import json
import secrets
import tempfile
from pathlib import Path
from typing import Any

from anthropic import Anthropic
from features import KEY, MODEL, QUESTION, URL, Trip, check, feature
from front import front
from openai import OpenAI, pydantic_function_tool

entry = {
    "model_name": MODEL,
    "litellm_params": {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY},
}
config = Path(tempfile.mkdtemp()) / "config.yaml"
LOCAL = f"sk-{secrets.token_urlsafe(32)}"  # the proxy's own key; it does not start without one
settings = {"model_list": [entry], "general_settings": {"master_key": LOCAL}}
config.write_text(json.dumps(settings))
port = front(["litellm", "--config", str(config), "--telemetry", "False"], "/health/liveliness")
host = f"http://127.0.0.1:{port}"
client = OpenAI(base_url=f"{host}/v1", api_key=LOCAL, max_retries=0, timeout=300)
claude = Anthropic(base_url=host, api_key=LOCAL, max_retries=0, timeout=300)
USER: Any = {"role": "user", "content": QUESTION}


@feature("proxy: chat, stream, tools")
def chat() -> None:
    fields: Any = {"model": MODEL, "messages": [USER], "max_tokens": 8}
    assert client.chat.completions.create(**fields).choices[0].message.content
    assert list(client.chat.completions.create(**fields, stream=True))
    fields |= {"tools": [pydantic_function_tool(Trip, name="book")], "max_tokens": 96}
    answer = client.chat.completions.create(
        **fields, tool_choice="required", parallel_tool_calls=False
    )
    Trip.model_validate_json(answer.choices[0].message.tool_calls[0].function.arguments)


@feature("proxy: /v1/responses")
def responses() -> None:
    fields: Any = {"model": MODEL, "input": QUESTION, "max_output_tokens": 16}
    assert client.responses.create(**fields).output_text
    assert list(client.responses.create(**fields, stream=True))


@feature("proxy: /v1/messages")
def messages() -> None:
    fields: Any = {"model": MODEL, "messages": [USER], "max_tokens": 8}
    assert claude.messages.create(**fields).content[0].text
    with claude.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream)


check("litellm")
