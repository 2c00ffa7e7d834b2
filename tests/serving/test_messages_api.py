"""/v1/messages: Anthropic's shapes from the real server, and scripted outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any, Literal

import httpx2 as httpx
import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from transformers import PreTrainedTokenizerBase

from idlm.serving.answer_messages import MessagesAnswer
from idlm.serving.answers import ChatAnswer
from idlm.serving.errors import ApiError
from idlm.serving.prompts import Prompts
from idlm.serving.responses import CompletionDetails, PromptDetails, Usage
from idlm.serving.schema_messages import MessagesRequest
from idlm.serving.tools import HERMES as FORM
from idlm.serving.wire import Delta, Finished
from tests.serving.apis import HERMES, SCHEMA, SCRIPTS, THINKS, sse, thinker
from tests.serving.conftest import KEY, Running

PATH = "/v1/messages"
QUESTION = "Mia has 3 apples and buys 4 more. How many apples does she have?"
ASK: dict[str, Any] = {
    "model": "nano",
    "max_tokens": 12,
    "messages": [{"role": "user", "content": QUESTION}],
}
TOOL: dict[str, Any] = {"name": "add", "input_schema": SCHEMA}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Let me see.", "citations": None},
            {"type": "tool_use", "id": "c1", "name": "add", "input": {}, "caller": {}},
            {"type": "tool_use", "id": "c2", "name": "add", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "2", "is_error": False},
            {
                **{"type": "tool_result", "tool_use_id": "c2"},
                "content": [{"type": "text", "text": "2", "cache_control": {"type": "ephemeral"}}],
            },
            {"type": "text", "text": "So?"},
        ],
    },
]


class Shape(BaseModel):
    """A shape of Anthropic's documentation, and nothing more."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Counts(Shape):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class TextShape(Shape):
    type: Literal["text"]
    text: str


class ThinkingShape(Shape):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseShape(Shape):
    type: Literal["tool_use"]
    id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+$")]
    name: str
    input: dict[str, Any]


Content = Annotated[TextShape | ThinkingShape | ToolUseShape, Field(discriminator="type")]
Reason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageShape(Shape):
    id: Annotated[str, Field(pattern="^msg_")]
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Content]
    stop_reason: Reason | None
    stop_sequence: str | None
    usage: Counts


class StartShape(Shape):
    type: Literal["message_start"]
    message: MessageShape


class PingShape(Shape):
    type: Literal["ping"]


class BlockStartShape(Shape):
    type: Literal["content_block_start"]
    index: int
    content_block: Content


class TextDeltaShape(Shape):
    type: Literal["text_delta"]
    text: str


class ThinkingDeltaShape(Shape):
    type: Literal["thinking_delta"]
    thinking: str


class JsonDeltaShape(Shape):
    type: Literal["input_json_delta"]
    partial_json: str


class BlockDeltaShape(Shape):
    type: Literal["content_block_delta"]
    index: int
    delta: TextDeltaShape | ThinkingDeltaShape | JsonDeltaShape


class BlockStopShape(Shape):
    type: Literal["content_block_stop"]
    index: int


class StopShape(Shape):
    stop_reason: Reason
    stop_sequence: str | None


class DeltaShape(Shape):
    type: Literal["message_delta"]
    delta: StopShape
    usage: Counts


class EndShape(Shape):
    type: Literal["message_stop"]


class ErrorDetailShape(Shape):
    type: str
    message: str


class ErrorShape(Shape):
    type: Literal["error"]
    error: ErrorDetailShape


EVENT: TypeAdapter[Any] = TypeAdapter(
    StartShape
    | PingShape
    | BlockStartShape
    | BlockDeltaShape
    | BlockStopShape
    | DeltaShape
    | EndShape
)


def gathered(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Check the order and shapes of a stream's events; returns the message that they make."""
    for event in events:
        EVENT.validate_python(event)
    start, ping, *blocks, delta, end = events
    message: dict[str, Any] = start["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    assert message["usage"]["input_tokens"] > 0 and message["usage"]["output_tokens"] == 0
    assert ping["type"] == "ping" and end["type"] == "message_stop"
    while blocks:
        at = len(message["content"])
        mine = [event for event in blocks if event["index"] == at]
        assert mine and blocks[: len(mine)] == mine  # one block after the other
        blocks = blocks[len(mine) :]
        begin, *deltas, stop = mine
        assert begin["type"] == "content_block_start" and stop["type"] == "content_block_stop"
        field = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
        block = begin["content_block"]
        text = "".join(one["delta"][field[block["type"]]] for one in deltas)
        if block["type"] == "tool_use":
            assert block["input"] == {}
            block["input"] = msgspec.json.decode(text or "{}")
        else:
            block[block["type"]] += text
        message["content"].append(block)
    return message | delta["delta"] | {"usage": delta["usage"]}


USAGE = Usage(9, 5, 14, PromptDetails(3), CompletionDetails(1, 1))


def scripted(tokenizer: PreTrainedTokenizerBase, end: Finished) -> MessagesAnswer:
    body = MessagesRequest.model_validate(ASK | {"tools": [TOOL]})
    head = {"id": "chatcmpl-1", "created": 1, "model": "m", "system_fingerprint": "f"}
    job: Any = SimpleNamespace(
        **{"head": head, "tickets": [None], "ends": {0: end}, "samples": 1, "prompts": [[5] * 9]},
        usage=lambda: USAGE,
        thinking=None,
    )
    return MessagesAnswer(ChatAnswer(job, body.to_chat(), Prompts(tokenizer, "m", 160), FORM))


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [
        {name: value for name, value in block.items() if name != "id"}
        for block in message["content"]
    ]
    return message | {"id": "", "content": content}


@pytest.mark.parametrize("case", SCRIPTS)
@pytest.mark.parametrize(("reason", "stop"), [("stop", None), ("stop", "."), ("length", None)])
def test_a_stream_comes_to_the_whole_message(
    case: str, reason: str, stop: str | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    deltas = [Delta("1", [5], text) for text in SCRIPTS[case]]
    end = Finished("1", reason, stop, 9, 3, 5, 5, 2, 1)
    answer = scripted(tokenizer, end)
    pieces = [answer.encode(answer.chunks(0, event)) for event in [*deltas, end]]
    streamed = gathered(sse(b"".join([*pieces, answer.last()]).decode().splitlines()))
    whole = msgspec.to_builtins(scripted(tokenizer, end).response([deltas], USAGE))
    MessageShape.model_validate(whole)
    assert without_ids(streamed) == without_ids(whole)
    called = "call" in case and "cut" not in case
    expected = "max_tokens" if reason == "length" else "tool_use" if called else "end_turn"
    if stop and not called:
        expected = "stop_sequence"
    assert whole["stop_reason"] == expected
    assert whole["stop_sequence"] == (stop if expected == "stop_sequence" else None)
    assert [block["type"] for block in whole["content"]] == {
        "nothing": [],
        "a text": ["text"],
        "a call": ["tool_use"],
        "a text and two calls": ["text", "tool_use", "tool_use"],
        "a call and a text": ["tool_use", "text"],
        "a call that is cut": ["text"],
    }[case]
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 9


def test_thoughts_are_a_block_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    end = Finished("1", "stop", None, 9, 3, 5, 5, 2, 1)
    deltas = [Delta("1", [5]) for _ in THINKS]
    job = scripted(tokenizer, end).job
    answer = MessagesAnswer(thinker(job))
    pieces = [answer.encode(answer.chunks(0, event)) for event in [*deltas, end]]
    streamed = gathered(sse(b"".join([*pieces, answer.last()]).decode().splitlines()))
    assert streamed["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "Two."},
    ]
    whole = msgspec.to_builtins(MessagesAnswer(thinker(job)).response([deltas], USAGE))
    assert whole == streamed


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        (
            {"thinking": {"type": "enabled", "budget_tokens": 5}},
            {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 5},
        ),
        (
            {"thinking": {"type": "disabled"}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        (
            {"messages": [*ASK["messages"], {"role": "assistant", "content": "The"}]},
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            },
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
    ],
    ids=["a budget", "no thoughts", "effort", "a prefill", "one call"],
)
def test_it_asks_chat_for(fields: dict[str, Any], asked: dict[str, Any]) -> None:
    sent = MessagesRequest.model_validate(ASK | fields).prompt_fields()
    plain = MessagesRequest.model_validate(ASK).prompt_fields()
    assert {name: sent[name] for name in asked} == asked
    assert sent.keys() - plain.keys() == asked.keys()


def test_a_stream_that_breaks_off(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = scripted(tokenizer, Finished("1", "stop", None, 9, 3, 5, 5, 2, 1))
    *_, last = sse(answer.failure(ApiError(503, "gone")).decode().splitlines())
    ErrorShape.model_validate(last)
    assert last["error"] == {"type": "overloaded_error", "message": "gone"}


@pytest.fixture
def tooled(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's template has tools."""
    tokenizer = served.http.config.app.state.server.prompts.tokenizer  # type: ignore[union-attr]
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)


CASES: dict[str, dict[str, Any]] = {
    "a text": {"system": "Be short."},
    "blocks": {"messages": HISTORY, "system": [{"type": "text", "text": "Add."}]},
    "a system turn": {"messages": [{"role": "system", "content": "Add."}, *ASK["messages"]]},
    "sampling": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "stops": {"stop_sequences": ["apples", "the"], "max_tokens": 40},
    "neutral": {
        **{"metadata": {"user_id": "u"}, "service_tier": "auto", "tools": [], "container": None},
        **{"thinking": {"type": "disabled"}, "cache_control": {"type": "ephemeral"}},
    },
    "a schema": {
        "output_config": {
            "format": {
                "type": "json_schema",
                "schema": {"type": "integer", "minimum": 0, "maximum": 9},
            }
        }
    },
    "no call": {"tools": [TOOL], "tool_choice": {"type": "none"}},
    "a call": {
        "tools": [{"type": "custom", "cache_control": {"type": "ephemeral"}} | TOOL],
        "tool_choice": {"type": "tool", "name": "add"},
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("tooled")
def test_every_field_streamed_or_not(case: str, http: httpx.Client) -> None:
    body = ASK | {"temperature": 0, "seed": 5} | CASES[case]
    answer = http.post(PATH, json=body).json()
    MessageShape.model_validate(answer)
    with http.stream("POST", PATH, json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        streamed = gathered(sse(response.iter_lines()))
    same = {"usage": None}  # the second finds its prompt in the cache
    assert without_ids(streamed) | same == without_ids(answer) | same
    usage = answer["usage"]
    assert 0 < usage["output_tokens"] <= body["max_tokens"]
    if case == "stops":
        assert answer["stop_reason"] == "stop_sequence"
        assert answer["stop_sequence"] in body["stop_sequences"]
    if case == "a schema":
        assert int(answer["content"][0]["text"]) in range(10)
    if case == "a call":
        (call,) = answer["content"]
        assert call["name"] == "add" and call["input"] == {}
        assert answer["stop_reason"] == "tool_use"


@pytest.mark.usefixtures("tooled")
def test_it_is_chat(http: httpx.Client) -> None:
    """The same messages with the same seed give the same text as chat."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages: Any = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "user", "content": "So?"},
    ]
    same = {"model": "nano", "seed": 2, "max_tokens": 20}
    chat = http.post("/v1/chat/completions", json=same | {"messages": messages}).json()
    body = same | {"messages": HISTORY, "system": "Add."}
    answer = http.post(PATH, json=body).json()
    (block,) = answer["content"]
    assert block["text"] == chat["choices"][0]["message"]["content"]
    del body["seed"], body["max_tokens"]
    counted = http.post(f"{PATH}/count_tokens", json=body).json()
    assert counted == {"input_tokens": chat["usage"]["prompt_tokens"]}


@pytest.mark.usefixtures("tooled")
def test_tools_count(http: httpx.Client) -> None:
    body = {name: value for name, value in ASK.items() if name != "max_tokens"}
    less, more = (
        http.post(f"{PATH}/count_tokens", json=body | extra).json()["input_tokens"]
        for extra in ({}, {"tools": [TOOL]})
    )
    assert less < more


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # case: fields of the request, what the message must name
    "no max_tokens": ({"max_tokens": None}, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "no messages": ({"messages": []}, "messages"),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "content"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "'image'",
    ),
    "a document": (
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
        "'document'",
    ),
    "a picture as a result": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            **{"type": "tool_result", "tool_use_id": "c1"},
                            "content": [{"type": "image", "source": {}}],
                        }
                    ],
                }
            ]
        },
        "'image'",
    ),
    "a server's tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "'web_search_20250305'",
    ),
    "a tool without a schema": ({"tools": [{"name": "f"}]}, "input_schema"),
    "a choice without a name": ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "name"),
    "a tool that is not there": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
        "'f'",
    ),
    "a choice without tools": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "17 stops": ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    "temperature below 0": ({"temperature": -1}, "temperature"),
    "an unknown field": ({"top_q": 1}, "top_q"),
    "two samples": ({"n": 2}, "n"),
    "a container": ({"container": "c"}, "container"),
    "a format": ({"output_config": {"format": {"type": "yaml"}}}, "format"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("tooled")
def test_refusals_name_what_is_wrong(case: str, http: httpx.Client) -> None:
    fields, named = REFUSED[case]
    answer = http.post(PATH, json=ASK | fields)
    error = ErrorShape.model_validate(answer.json()).error
    assert answer.status_code == 400 and error.type == "invalid_request_error"
    assert named in error.message


def test_errors_of_every_layer_have_its_shape(served: Running, http: httpx.Client) -> None:
    with served.open(key=None) as stranger:
        missing = stranger.post(PATH, json=ASK)
        wrong = stranger.post(PATH, json=ASK, headers={"x-api-key": "wrong"})
        right = stranger.post(
            PATH, json=ASK, headers={"x-api-key": KEY, "anthropic-version": "2023-06-01"}
        )
    assert right.status_code == 200
    assert right.headers["request-id"] == right.headers["x-request-id"]
    long = b'{"model": "%b"}' % (b"x" * (5 * 2**20))
    json_type = {"Content-Type": "application/json"}
    for answer, status, kind in (
        (missing, 401, "authentication_error"),
        (wrong, 401, "authentication_error"),
        (http.post(PATH, json=ASK | {"model": "gpt-7"}), 404, "not_found_error"),
        (http.get(PATH), 405, "invalid_request_error"),
        (http.post(f"{PATH}/none", json=ASK), 404, "not_found_error"),
        (http.post(PATH, content=b"{}"), 415, "invalid_request_error"),
        (http.post(PATH, content=b"{", headers=json_type), 400, "invalid_request_error"),
        (http.post(PATH, content=long, headers=json_type), 413, "request_too_large"),
    ):
        assert answer.status_code == status
        assert ErrorShape.model_validate(answer.json()).error.type == kind


def test_a_deadline(http: httpx.Client) -> None:
    body = ASK | {"timeout": 0.05, "ignore_eos": True, "max_tokens": 400}
    answer = http.post(PATH, json=body)
    assert answer.status_code == 408 and answer.json()["error"]["type"] == "timeout_error"
    with http.stream("POST", PATH, json=body | {"stream": True}) as response:
        content = "".join(response.iter_text())
    begun = response.status_code == 200
    last = sse(content.splitlines())[-1] if begun else msgspec.json.decode(content)
    assert ErrorShape.model_validate(last).error.type == "timeout_error"
