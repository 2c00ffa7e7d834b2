"""LiteLLM as a library."""

from copy import deepcopy
from typing import Any

import litellm
from features import HOST, KEY, MODEL, QUESTION, URL, Trip, check, feature

USER = {"role": "user", "content": QUESTION}
OPENAI = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "timeout": 300}
VLLM = OPENAI | {"model": f"hosted_vllm/{MODEL}"}
ANTHROPIC = OPENAI | {"model": f"anthropic/{MODEL}", "api_base": HOST}
TOOL = {
    "type": "function",
    "function": {"name": "book", "parameters": Trip.model_json_schema()},
}


def complete(provider: dict[str, Any], *messages: Any, **fields: Any) -> Any:
    """A response."""
    fields = {"max_tokens": 8} | fields
    return litellm.completion(messages=list(messages) or [USER], **provider, **fields)


@feature("openai/, hosted_vllm/ and anthropic/: chat, stream, text completions")
def plain() -> None:
    for provider in (OPENAI, VLLM, ANTHROPIC):
        assert complete(provider).choices[0].message.content
        assert list(complete(provider, stream=True))
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=URL,
        api_key=KEY,
        prompt="One",
        max_tokens=4,
    )
    assert answer.choices[0].text


@feature("pydantic; tools round trip, parallel_tool_calls=False, reasoning_effort")
def tools() -> None:
    answer = complete(OPENAI, response_format=Trip, max_tokens=96)
    Trip.model_validate_json(answer.choices[0].message.content)
    for provider in (OPENAI, VLLM, ANTHROPIC):
        offered = [deepcopy(TOOL)]  # LiteLLM changes what it is given
        fields = {"tools": offered, "tool_choice": "required", "max_tokens": 96}
        message = complete(provider, parallel_tool_calls=False, **fields).choices[0].message
        call = message.tool_calls[0]
        assert call.function.name == "book"
        if provider is VLLM:  # LiteLLM takes additionalProperties out: this model goes on and on
            continue
        Trip.model_validate_json(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        assert complete(provider, USER, message, result, tools=[TOOL]).choices
    effort = {"reasoning_effort": "low", "allowed_openai_params": ["reasoning_effort"]}
    assert complete(OPENAI, **effort).choices


@feature("responses")
def responses() -> None:
    answer = litellm.responses(input=QUESTION, max_output_tokens=16, **OPENAI)
    assert answer.output[0].content[0].text


@feature("a context that is too long is a ContextWindowExceededError")
def too_long() -> None:
    try:
        complete(OPENAI, {"role": "user", "content": "word " * 6000})
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("it was answered")


check("litellm")
