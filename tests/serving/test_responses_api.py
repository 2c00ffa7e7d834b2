"""/v1/responses: OpenAI's client and types against the real server, and scripted outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import msgspec
import openai
import pytest
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from idlm.serving.answer_responses import ResponsesAnswer
from idlm.serving.answers import ChatAnswer
from idlm.serving.errors import ApiError
from idlm.serving.prompts import Prompts
from idlm.serving.responses import CompletionDetails, PromptDetails, Usage
from idlm.serving.schema_responses import ResponsesRequest
from idlm.serving.tools import HERMES as FORM
from idlm.serving.wire import Delta, Finished
from tests.serving.apis import HERMES, SCHEMA, SCRIPTS, THINKS, sse, thinker
from tests.serving.conftest import KEY, Running

types = pytest.importorskip("openai.types.responses")
PATH = "/v1/responses"
QUESTION = "Mia has 3 apples and buys 4 more. How many apples does she have?"
TOOL: dict[str, Any] = {"type": "function", "name": "add", "parameters": SCHEMA}
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "Add."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1 + 1?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
    {
        **{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"},
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
    },
    {
        **{"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add"},
        **{"arguments": "{}", "status": "completed"},
    },
    {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "2"},
    {
        **{"type": "function_call_output", "call_id": "c2"},
        "output": [{"type": "input_text", "text": "2"}],
    },
    {"role": "user", "content": "So?"},
]


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def tooled(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's template has tools."""
    tokenizer = served.http.config.app.state.server.prompts.tokenizer  # type: ignore[union-attr]
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)


def check(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Check the order, numbers and shapes of a stream's events; returns the response at the end."""
    event_type: Any = TypeAdapter(types.ResponseStreamEvent)
    for event in events:
        read = event_type.validate_python(event)
        assert type(read).model_validate(event, strict=True).type == event["type"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    begin, created, *rest, last = events
    assert [begin["type"], created["type"]] == ["response.created", "response.in_progress"]
    assert begin["response"]["output"] == [] and begin["response"]["status"] == "in_progress"
    output: list[dict[str, Any]] = last["response"]["output"]
    for at, item in enumerate(output):
        mine = [event for event in rest if event["output_index"] == at]
        assert rest[: len(mine)] == mine  # one item after the other
        rest = rest[len(mine) :]
        check_item(mine, item)
    assert not rest
    return dict(last["response"])


def check_item(events: list[dict[str, Any]], item: dict[str, Any]) -> None:
    added, *inner, done = events
    assert added["type"] == "response.output_item.added"
    assert done["type"] == "response.output_item.done" and done["item"] == item
    assert added["item"]["status"] == "in_progress" and added["item"]["id"] == item["id"]
    assert all(event["item_id"] == item["id"] for event in inner)
    if item["type"] == "reasoning":
        part, *inner, text, whole = inner
        assert [whole["part"]] == item["content"] and part["part"]["text"] == ""
        assert text["type"] == "response.reasoning_text.done"
        kind = "response.reasoning_text.delta"
        assert text["text"] == whole["part"]["text"] == joined(inner, kind)
    elif item["type"] == "message":
        part, *inner, text, whole = inner
        assert part["type"] == "response.content_part.added" and part["part"]["text"] == ""
        assert whole["type"] == "response.content_part.done"
        assert [whole["part"]] == item["content"]
        assert text["type"] == "response.output_text.done"
        assert text["text"] == whole["part"]["text"] == joined(inner, "response.output_text.delta")
        logprobs = [one for event in inner for one in event["logprobs"]]
        assert text["logprobs"][: len(logprobs)] == logprobs
    else:
        *inner, text = inner
        assert text["type"] == "response.function_call_arguments.done"
        kind = "response.function_call_arguments.delta"
        assert text["arguments"] == item["arguments"] == joined(inner, kind)


def joined(events: list[dict[str, Any]], kind: str) -> str:
    assert {event["type"] for event in events} <= {kind}
    return "".join(event["delta"] for event in events)


USAGE = Usage(9, 5, 14, PromptDetails(3), CompletionDetails(1, 1))


def scripted(
    tokenizer: PreTrainedTokenizerBase, reason: str
) -> tuple[ResponsesAnswer, list[Finished]]:
    body = ResponsesRequest.model_validate({"model": "m", "input": "1 + 1?", "tools": [TOOL]})
    end = Finished("1", reason, None, 9, 3, 5, 5, 2, 1)
    head = {"id": "chatcmpl-1", "created": 1, "model": "m", "system_fingerprint": "f"}
    job: Any = SimpleNamespace(
        head=head, tickets=[None], ends={0: end}, samples=1, usage=lambda: USAGE, thinking=None
    )
    chat = ChatAnswer(job, body.to_chat(), Prompts(tokenizer, "m", 160), FORM)
    return ResponsesAnswer(chat, body), [end]


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    return response | {"id": "", "completed_at": 0, "output": items}


@pytest.mark.parametrize("case", SCRIPTS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stream_comes_to_the_whole_response(
    case: str, reason: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    deltas = [Delta("1", [5], text) for text in SCRIPTS[case]]
    answer, end = scripted(tokenizer, reason)
    pieces = [answer.encode(answer.chunks(0, event)) for event in [*deltas, *end]]
    lines = b"".join([*pieces, answer.last()]).decode().splitlines()
    streamed = check(sse(lines))
    answer, _ = scripted(tokenizer, reason)
    whole = msgspec.to_builtins(answer.response([deltas], USAGE))
    types.Response.model_validate(whole)
    assert without_ids(streamed) == without_ids(whole)
    assert whole["status"] == ("completed" if reason == "stop" else "incomplete")
    assert [item["type"] for item in whole["output"]] == {
        "nothing": [],
        "a text": ["message"],
        "a call": ["function_call"],
        "a text and two calls": ["message", "function_call", "function_call"],
        "a call and a text": ["function_call", "message"],
        "a call that is cut": ["message"],
    }[case]


def test_thoughts_are_an_item_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    scripts, end = scripted(tokenizer, "stop")
    body = ResponsesRequest.model_validate({"model": "m", "input": "1 + 1?"})
    answer = ResponsesAnswer(thinker(scripts.job), body)
    deltas = [Delta("1", [5]) for _ in THINKS]
    pieces = [answer.encode(answer.chunks(0, event)) for event in [*deltas, *end]]
    streamed = check(sse(b"".join([*pieces, answer.last()]).decode().splitlines()))
    thought, message = streamed["output"]
    assert thought["type"] == "reasoning" and thought["summary"] == []
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert message["content"][0]["text"] == "Two."
    answer = ResponsesAnswer(thinker(scripts.job), body)
    assert without_ids(msgspec.to_builtins(answer.response([deltas], USAGE))) == without_ids(
        streamed
    )


def test_a_stream_that_breaks_off(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, _ = scripted(tokenizer, "stop")
    begun = answer.encode(answer.chunks(0, Delta("1", [5], "Let me")))
    events = sse((begun + answer.failure(ApiError(503, "gone"))).decode().splitlines())
    event_type: Any = TypeAdapter(types.ResponseStreamEvent)
    failed = event_type.validate_python(events[-1])
    assert failed.type == "response.failed" and failed.response.error.message == "gone"
    assert failed.response.status == "failed" and failed.sequence_number == len(events) - 1
    assert failed.response.output[0].status == "incomplete"


CASES: dict[str, dict[str, Any]] = {
    "a text": {"input": QUESTION, "instructions": "Be short."},
    "items": {"input": HISTORY},
    "seed": {"input": QUESTION, "temperature": 0.8, "top_p": 0.9, "extra_body": {"seed": 3}},
    "logprobs": {
        **{"input": QUESTION, "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        "temperature": 0,
    },
    "neutral": {
        **{"input": QUESTION, "store": True, "metadata": {"a": "b"}, "truncation": "disabled"},
        **{"include": ["reasoning.encrypted_content"], "parallel_tool_calls": True, "user": "u"},
        **{"reasoning": {"summary": "auto"}, "background": False, "service_tier": "auto"},
        **{"max_tool_calls": 3, "text": {"format": {"type": "text"}}, "temperature": 0},
    },
    "a schema": {
        "input": QUESTION,
        "temperature": 0,
        "text": {
            "format": {
                **{"type": "json_schema", "name": "n", "strict": True},
                "schema": {"type": "integer", "minimum": 0, "maximum": 9},
            }
        },
    },
    "no call": {"input": QUESTION, "tools": [TOOL], "tool_choice": "none", "temperature": 0},
    "a call": {
        **{"input": QUESTION, "tools": [TOOL], "temperature": 0},
        "tool_choice": {"type": "function", "name": "add"},
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("tooled")
def test_every_field_streamed_or_not(case: str, client: openai.OpenAI, http: httpx.Client) -> None:
    fields: dict[str, Any] = {"model": "nano", "max_output_tokens": 12} | CASES[case]
    fields.setdefault("extra_body", {"seed": 1})
    answer = client.responses.create(**fields)
    assert answer.usage is not None and answer.usage.output_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    with client.responses.create(stream=True, **fields) as stream:
        events = [event.model_dump(mode="json", by_alias=True) for event in stream]
    assert events[-1]["response"]["output"] and answer.output_text == "".join(
        event["delta"] for event in events if event["type"] == "response.output_text.delta"
    )
    raw = {name: value for name, value in fields.items() if name != "extra_body"}
    raw |= fields["extra_body"] | {"stream": True}
    with http.stream("POST", PATH, json=raw) as response:
        last = check(sse(response.iter_lines()))
    assert (
        last["status"] == answer.status and last["tools"] == raw.get("tools", []) or "tools" in raw
    )
    if case == "logprobs":
        part: Any = answer.output[0]
        entries = part.content[0].logprobs
        assert len(entries) == answer.usage.output_tokens
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
    if case == "a schema":
        assert int(answer.output_text) in range(10)
    if case == "a call":
        (call,) = answer.output
        assert call.type == "function_call" and call.name == "add"
        assert json.loads(call.arguments) == {}


@pytest.mark.usefixtures("tooled")
def test_it_is_chat(client: openai.OpenAI) -> None:
    """The same messages with the same seed give the same text as chat."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages: Any = [
        {"role": "system", "content": "Be short.\n\nAdd."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "user", "content": "So?"},
    ]
    for seed in (1, 2):
        chat = client.chat.completions.create(
            model="nano", messages=messages, seed=seed, max_tokens=20
        )
        history: Any = HISTORY
        answer = client.responses.create(
            **{"model": "nano", "input": history, "instructions": "Be short."},
            **{"max_output_tokens": 20, "extra_body": {"seed": seed}},
        )
        assert answer.output_text == chat.choices[0].message.content
        assert answer.usage and chat.usage
        assert answer.usage.input_tokens == chat.usage.prompt_tokens


def test_the_end_of_the_model_completes(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="nano", input=QUESTION, temperature=0)
    assert answer.status == "completed" and answer.incomplete_details is None
    assert answer.completed_at is not None and answer.store is False  # type: ignore[attr-defined]


def test_a_deadline(client: openai.OpenAI) -> None:
    fields: Any = {
        **{"model": "nano", "input": QUESTION},
        "extra_body": {"timeout": 0.05, "ignore_eos": True},
    }
    with pytest.raises(openai.APIStatusError) as raised:
        client.responses.create(**fields)
    assert raised.value.status_code == 408
    try:
        with client.responses.create(stream=True, **fields) as stream:
            *_, last = stream
        assert last.type == "response.failed"
        message = last.response.error.message
    except openai.APIStatusError as error:  # before the first token
        message = error.message
    assert "timeout" in message


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # case: fields of the request, what the message must name
    "an id": ({"previous_response_id": "resp_1"}, "previous_response_id: .*stores nothing"),
    "a conversation": ({"conversation": "conv_1"}, "conversation: .*stores nothing"),
    "a prompt": ({"prompt": {"id": "p"}}, "prompt: .*stores nothing"),
    "background": ({"background": True}, "background"),
    "truncation": ({"truncation": "auto"}, "truncation: .*send fewer items"),
    "a tool of OpenAI's": ({"tools": [{"type": "web_search"}]}, "'web_search'.*only functions"),
    "a choice of OpenAI's": ({"tool_choice": {"type": "web_search"}}, "'web_search'"),
    "a tool that is not there": (
        {"tool_choice": {"type": "function", "name": "f"}, "tools": [TOOL]},
        "'f'",
    ),
    "a choice without a name": (
        {"tool_choice": {"type": "function", "name": ""}, "tools": [TOOL]},
        "tool_choice",
    ),
    "a picture": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "'input_image'.*text only",
    ),
    "a file": (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        "'input_file'.*text only",
    ),
    "a reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
    "an unknown item": ({"input": [{"type": "web_search_call"}]}, "'web_search_call'"),
    "no items": ({"input": []}, "input"),
    "no input": ({"input": None}, "input"),
    "a number": ({"input": 5}, "input.*list"),
    "an unknown include": ({"include": ["everything"]}, "include"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "chat's name": ({"max_tokens": 5}, "max_tokens"),
    "two samples": ({"n": 2}, "n"),
    "an unknown field": ({"top_q": 1}, "top_q"),
    "logprobs that nobody shows": ({"top_logprobs": 2}, "top_logprobs"),
    "an unknown format": ({"text": {"format": {"type": "yaml"}}}, "text.format"),
    "a schema that is none": ({"text": {"format": {"type": "json_schema"}}}, "schema"),
    "a trace": ({"idlm": {"trace": True}}, "idlm"),
    "no model": ({"model": "gpt-7"}, "gpt-7"),
    "a prompt that is too long": ({"input": "word " * 600}, "tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("tooled")
def test_refusals_name_what_is_wrong(case: str, client: openai.OpenAI) -> None:
    fields, named = REFUSED[case]
    body: Any = {"model": "nano", "input": "hello"} | fields
    status = openai.NotFoundError if case == "no model" else openai.BadRequestError
    with pytest.raises(status, match=named) as raised:
        client.post("/responses", body=body, cast_to=object)
    if case.startswith("a prompt that"):
        assert raised.value.code == "context_length_exceeded" and raised.value.param == "input"


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    for call in (
        client.responses.retrieve,
        client.responses.cancel,
        client.responses.delete,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            call("resp_1")
