"""Tool calls in chat answers, whole and in chunks. The bundled model makes none: events are
scripted."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import UNSET
from transformers import PreTrainedTokenizerBase

from idlm.engine.request import Logprob
from idlm.engine.text import TextStream
from idlm.params import Thinking
from idlm.serving.answers import ChatAnswer, CompletionAnswer
from idlm.serving.prompts import Prompts
from idlm.serving.responses import CompletionDetails, PromptDetails, Usage
from idlm.serving.schema import CompletionRequest
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.tools import HERMES
from idlm.serving.wire import Delta, Finished
from tests.engine.kinds import of_kind

TEXT = [
    "Let me ",
    "see.<tool",
    '_call>{"name": "add", ',
    '"arguments": {"a": 1}}</tool_call>',
    "\n",
]
CALL = '{"name": "add", "arguments": {"a": 1}}'
USAGE = Usage(1, 1, 2, PromptDetails(0), CompletionDetails(0, 0))
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m", "system_fingerprint": "f"}


def end(reason: str) -> Finished:
    return Finished("1", reason, None, 3, 0, 5, 5, 0, 0)


@pytest.fixture
def answer(tokenizer: PreTrainedTokenizerBase) -> ChatAnswer:
    job: Any = SimpleNamespace(
        head=HEAD,
        tickets=[None],
        ends={0: end("stop")},
        samples=1,
        thinking=None,
        metrics=lambda: UNSET,
    )
    fields: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "1 + 1?"}],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    return ChatAnswer(job, ChatRequest.model_validate(fields), Prompts(tokenizer, "m", 160), HERMES)


def encoded(value: msgspec.Struct) -> Any:
    return json.loads(msgspec.json.encode(value))


def test_whole(answer: ChatAnswer) -> None:
    (choice,) = encoded(answer.response([[Delta("1", [5], text) for text in TEXT]], USAGE))[
        "choices"
    ]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and "index" not in call


def test_a_call_alone_has_no_content(answer: ChatAnswer) -> None:
    (choice,) = encoded(
        answer.response([[Delta("1", [5], "".join(TEXT).removeprefix("Let me see."))]], USAGE)
    )["choices"]
    assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 1


def test_in_chunks(answer: ChatAnswer) -> None:
    events: list[Delta | Finished] = [*(Delta("1", [5], text) for text in TEXT), end("stop")]
    chunks = [encoded(chunk)["choices"][0] for event in events for chunk in answer.chunks(0, event)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "Let me see."
    (calls,) = [chunk["delta"]["tool_calls"] for chunk in chunks if "tool_calls" in chunk["delta"]]
    assert calls[0]["index"] == 0 and calls[0]["function"] == {
        "name": "add",
        "arguments": '{"a": 1}',
    }
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "tool_calls"
    ]


def test_a_call_cut_off_is_text(answer: ChatAnswer) -> None:
    events: list[Delta | Finished] = [Delta("1", [5], "<tool_call>{"), end("length")]
    chunks = [encoded(chunk)["choices"][0] for event in events for chunk in answer.chunks(0, event)]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "<tool_call>{"
    assert chunks[-1]["finish_reason"] == "length"


def test_a_tag_in_the_thoughts_is_no_call(
    answer: ChatAnswer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Here the tokens of thoughts are special ones, so that the text has all special tokens."""
    thinker = copy.deepcopy(tokenizer)
    thinker.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})  # type: ignore[dict-item]
    start, end_id = thinker.convert_tokens_to_ids(["<think>", "</think>"])
    job: Any = answer.job
    job.thinking = Thinking(start, end_id, open=True)
    body, prompts = answer._body, Prompts(thinker, "m", 160)
    texts = ["I may <tool_call>", CALL, " </tool_call>", "</think>", "\n\n<tool_call>", CALL]
    texts.append(str(thinker.eos_token))
    (choice,) = encoded(
        ChatAnswer(job, body, prompts, HERMES).response(
            [[Delta("1", [5], text) for text in texts]], USAGE
        )
    )["choices"]
    message = choice["message"]
    assert message["reasoning"] == f"I may <tool_call>{CALL} </tool_call>"
    assert message["content"] is None and len(message["tool_calls"]) == 1
    stream = ChatAnswer(job, body, prompts, HERMES)
    events: list[Delta | Finished] = [*(Delta("1", [5], text) for text in texts), end("stop")]
    chunks = [encoded(chunk)["choices"][0] for event in events for chunk in stream.chunks(0, event)]
    thoughts = "".join(chunk["delta"].get("reasoning_content", "") for chunk in chunks)
    assert thoughts == message["reasoning_content"]
    assert not any(chunk["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "tool_calls"


THINKING = [
    "<thi",
    "nk>\nI may <tool_call>",
    CALL,
    "</tool_call>\n</th",
    "ink>\n\nLet me ",
    *TEXT[1:],
]


@pytest.mark.parametrize(
    ("fields", "thoughts", "content", "pieces"),
    [
        ({}, f"I may <tool_call>{CALL}</tool_call>", "Let me see.", 3),
        ({"stream_reasoning": False}, f"I may <tool_call>{CALL}</tool_call>", "Let me see.", 1),
        ({"separate_reasoning": False}, "", "".join(THINKING[:5]) + "see.", 0),
        (
            {"separate_reasoning": False, "stream_reasoning": False},
            *("", "".join(THINKING[:5]) + "see.", 0),
        ),
        ({"separate_reasoning": False, "include_reasoning": False}, "", "Let me see.", 0),
    ],
)
def test_where_thoughts_are_shown(
    fields: dict[str, bool], thoughts: str, content: str, pieces: int, answer: ChatAnswer
) -> None:
    """A call in them is none, wherever they are shown; the one after them is."""
    thinker = copy.deepcopy(answer.prompts.tokenizer)
    thinker.add_tokens(["<think>", "</think>"])
    job: Any = answer.job
    job.thinking = Thinking(*thinker.convert_tokens_to_ids(["<think>", "</think>"]), open=False)
    body, prompts = answer._body.model_copy(update=fields), Prompts(thinker, "m", 160)
    events: list[Delta] = [Delta("1", [5], text) for text in THINKING]
    whole = encoded(ChatAnswer(job, body, prompts, HERMES).response([events], USAGE))
    message = whole["choices"][0]["message"]
    assert (message.get("reasoning", ""), message["content"]) == (thoughts, content)
    assert len(message["tool_calls"]) == 1
    stream = ChatAnswer(job, body, prompts, HERMES)
    made = [chunk for event in [*events, end("stop")] for chunk in stream.chunks(0, event)]
    deltas = [encoded(chunk)["choices"][0]["delta"] for chunk in made]
    streamed = [delta["reasoning"] for delta in deltas if "reasoning" in delta]
    assert "".join(streamed) == thoughts and len(streamed) == pieces
    assert "".join(delta.get("content", "") for delta in deltas) == content
    assert sum("tool_calls" in delta for delta in deltas) == 1


@pytest.mark.parametrize("echo", [False, True], ids=["output", "echo"])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram_bytes"])
def test_offsets_are_places_in_the_text_whole_or_streamed(kind: str, echo: bool) -> None:
    tokenizer, given, output = of_kind(kind), "in a 世 van", "the é世🏁 van is n't"
    prompts = Prompts(tokenizer, "m", 999)
    ids, tokens = prompts.text(given), tokenizer(output, add_special_tokens=False).input_ids
    laws = [{token: Logprob(-1.0, 1)} for token in (*ids, *tokens)]
    stream = TextStream(tokenizer)
    deltas = [
        Delta("1", [token], stream.push([token]), logprobs=[law])
        for token, law in zip(tokens, laws[len(ids) :], strict=True)
    ]
    deltas.append(Delta("1", [], stream.finish(), logprobs=[]))
    finished = end("stop")
    if echo:
        finished.prompt_logprobs = [None, *laws[1 : len(ids)]]
    job: Any = SimpleNamespace(
        head=HEAD, tickets=[None], ends={0: finished}, samples=1, metrics=lambda: UNSET
    )
    body = CompletionRequest.model_validate(
        {"model": "m", "prompt": given, "logprobs": 0, "echo": echo}
    )
    answer = CompletionAnswer(job, body, prompts, [ids])
    (choice,) = encoded(answer.response([deltas], USAGE))["choices"]
    text, shown = choice["text"], choice["logprobs"]
    assert text == (given if echo else "") + output

    parts = [(0, ids)] * echo + [(len(given) * echo, tokens)]
    expected, strings = [], []
    for start, group in parts:
        pieces = [prompts.token_bytes(token) for token in group]
        dropped = pieces[0].startswith(b" ")
        before = [b"".join(pieces[:at]).decode(errors="ignore") for at in range(len(pieces))]
        expected += [start + max(0, len(one) - dropped) for one in before]
        strings += [prompts.token(token) for token in group]
    assert (shown["text_offset"], shown["tokens"]) == (expected, strings)
    assert [next(iter(top)) for top in shown["top_logprobs"] if top] == strings[echo:]
    if not echo:
        again = CompletionAnswer(job, body, prompts, [ids])
        chunks = [encoded(chunk) for delta in deltas for chunk in again.chunks(0, delta)]
        logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [place for one in logprobs for place in one["text_offset"]] == expected
