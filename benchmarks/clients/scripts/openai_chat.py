"""OpenAI's Python client: chat and completions."""

from typing import Any

from features import KEY, MODEL, QUESTION, URL, Trip, check, feature
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI, pydantic_function_tool

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
TOOL = pydantic_function_tool(Trip, name="book")
USER = {"role": "user", "content": QUESTION}


def chat(*messages: Any, **fields: Any) -> Any:
    """A response to the messages, or to a question."""
    fields = {"max_tokens": 8, "model": MODEL} | fields
    return client.chat.completions.create(messages=list(messages) or [USER], **fields)


@feature("models")
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@feature("chat, raw response, request id")
def raw() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[USER], max_tokens=8, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.parse().choices[0].message.content and raw.headers["x-request-id"] == "mine"


@feature("the same text streamed, async, with .stream()")
async def streams() -> None:
    whole = chat(seed=5).choices[0].message.content
    parts = [c for c in chat(seed=5, stream=True, stream_options={"include_usage": True})]
    assert "".join(c.choices[0].delta.content or "" for c in parts if c.choices) == whole
    assert parts[-1].usage.completion_tokens
    aclient = AsyncOpenAI(base_url=URL, api_key=KEY, timeout=300)
    answer = await aclient.chat.completions.create(
        model=MODEL, messages=[USER], max_tokens=8, seed=5
    )
    assert answer.choices[0].message.content == whole
    with client.chat.completions.stream(
        model=MODEL, messages=[USER], max_tokens=8, seed=5
    ) as stream:
        assert "".join(e.delta for e in stream if e.type == "content.delta") == whole


@feature("continuous_usage_stats")
def continuous() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(stream=True, stream_options=options))
    assert all(chunk.usage for chunk in chunks)


@feature("logprobs, n=20, stop, seed -1, json_object")
def options() -> None:
    answer = chat(n=20, logprobs=True, top_logprobs=2, stop=["zz"], max_tokens=2)
    assert len(answer.choices) == 20 and answer.choices[0].logprobs.content
    chat(seed=-1)
    assert chat(response_format={"type": "json_object"}).choices[0].message.content[0] == "{"


@feature(
    "hints: store, reasoning_effort, service_tier, prediction, prompt_cache_retention, "
    "parallel_tool_calls"
)
def hints() -> None:
    chat(store=True, reasoning_effort="low", service_tier="flex", parallel_tool_calls=False)
    chat(
        prompt_cache_retention="24h",
        prediction={"type": "content", "content": "Hello"},
        metadata={"a": "b"},
    )


@feature("parse into a nested model")
def parse() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[USER], max_tokens=96, response_format=Trip
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)


@feature("tool loop: required with $defs, the message sent back, arguments streamed")
def tools() -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 96}
    message = chat(parallel_tool_calls=False, **fields).choices[0].message
    call = message.tool_calls[0]
    Trip.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    assert chat(USER, message, result, tools=[TOOL]).choices
    assert chat(USER, message.model_dump(), result, tools=[TOOL]).choices
    named = {"type": "function", "function": {"name": "book"}}
    chunks = list(chat(stream=True, **(fields | {"tool_choice": named})))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    Trip.model_validate_json("".join(d.function.arguments or "" for d in deltas))
    assert len(deltas) > 2


@feature("histories of other servers: annotations, reasoning_content, index, arguments ''")
def histories() -> None:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
    old = {"role": "assistant", "content": None, "annotations": [], "reasoning_content": "so"}
    chat(USER, old | {"tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "1"})


@feature("structured_outputs, guided_choice, continue_final_message")
def extensions() -> None:
    for extra in (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_choice": ["yes", "no"]},
    ):
        assert chat(extra_body=extra).choices[0].message.content in ("yes", "no")
    last = {"role": "assistant", "content": "Hello, I"}
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(USER, last, extra_body=extra).choices[0].message.content


@feature("a context that is too long has its code")
def too_long() -> None:
    try:
        chat({"role": "user", "content": "word " * 6000})
    except BadRequestError as error:
        assert error.code == "context_length_exceeded"
    else:
        raise AssertionError("it was answered")


@feature("completions: list, ids, echo, logprobs")
def completions() -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["One", "Two"], max_tokens=4, echo=True, logprobs=1
    )
    assert answer.choices[1].text.startswith("Two") and answer.choices[1].logprobs.tokens
    assert client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4).choices


@feature("functions", refused="functions")
def functions() -> None:
    chat(functions=[{"name": "f", "parameters": {}}])


@feature("custom tools", refused="custom")
def custom() -> None:
    chat(tools=[{"type": "custom", "custom": {"name": "f"}}])


@feature("allowed_tools")
def allowed() -> None:
    choice = {"mode": "required", "tools": [{"type": "function", "function": {"name": "book"}}]}
    form = {"type": "allowed_tools", "allowed_tools": choice}
    answer = chat(tools=[TOOL], tool_choice=form, parallel_tool_calls=False, max_tokens=96)
    assert answer.choices[0].message.tool_calls


@feature("verbosity low", refused="verbosity")
def verbosity() -> None:
    chat(verbosity="low")


@feature("web_search_options", refused="web_search_options")
def search() -> None:
    chat(web_search_options={})


@feature("embeddings", refused="404")
def embeddings() -> None:
    try:
        client.embeddings.create(model=MODEL, input="a")
    except NotFoundError as error:
        raise ValueError(f"404 {error}") from None


check("openai")
