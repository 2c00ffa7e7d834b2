"""What the benchmark of replicas behind a router counts as right, lost and doubled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.harness.client import Answer
from benchmarks.harness.fleet import doubled, requests, said
from benchmarks.harness.workload import CHAT, COMPLETIONS
from benchmarks.router_faults import verdict

DONE = b"data: [DONE]\n\n"
STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def event(text: str, id: str = "a", end: str | None = None, chat: bool = False) -> bytes:
    words: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, "finish_reason": end} | words
    return b"data: " + json.dumps({"id": id, "choices": [choice]}).encode() + b"\n\n"


def stream(*parts: bytes, complete: bool = True) -> Answer:
    pieces = [(float(at), part) for at, part in enumerate(parts)]
    return Answer(0.0, 9, 200, STREAM, pieces, complete)


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_is_read_from_streams_and_whole_answers(chat: bool) -> None:
    parts = [event("4", chat=chat), event("2", end="stop", chat=chat), DONE]
    assert said(stream(*parts)) == "42"
    words = {"message": {"content": "42"}} if chat else {"text": "42"}
    body = json.dumps({"id": "a", "choices": [words | {"finish_reason": "stop"}]}).encode()
    whole = Answer(0.0, 9, 200, {"content-type": "application/json"}, [(1.0, body)], True)
    assert said(whole) == "42" and not doubled(whole) and verdict(whole, "42") == "as AR"
    assert verdict(whole, "43") == "other bytes"


def test_every_end_of_a_stream_has_its_name() -> None:
    end = event("2", end="stop")
    told = b'data: {"error": {"message": "gone"}}\n\n'
    cases = {
        "as AR": stream(event("4"), end, DONE),
        "cut off": stream(event("4"), complete=False),
        "error event": stream(event("4"), told),
        "status 503": Answer(0.0, 9, 503, {}, [], True),
        "status 0": Answer(0.0),
    }
    assert {verdict(answer, "42"): answer for answer in cases.values()} == cases
    assert verdict(stream(event("5"), complete=False), "42") == "other bytes"
    assert verdict(stream(event("4"), event("3", end="stop"), DONE), "42") == "other bytes"


def test_comments_and_an_event_that_is_cut_are_no_events() -> None:
    parts = (b": keep-alive\n\n", event("4"), b": keep-alive\n\n", event("2"))
    assert said(stream(*parts)) == "42"
    assert said(stream(*parts, event("7")[:20], complete=False)) == "42"
    assert stream(b": keep-alive", complete=False).events() == []


@pytest.mark.parametrize(
    "parts",
    [
        (event("4"), event("42", id="b", end="stop"), DONE),
        (event("42", end="stop"), event("", end="stop"), DONE),
        (event("42", end="stop"), DONE, DONE),
    ],
    ids=["ids", "ends", "done"],
)
def test_two_answers_in_one_stream_are_found(parts: tuple[bytes, ...]) -> None:
    answer = stream(*parts)
    assert doubled(answer) and verdict(answer, "42") == "two answers in one"


def test_requests_go_to_completions_and_chat_in_turn() -> None:
    asked = requests("nano", 4, 16, seed=1)
    assert [path for path, _ in asked] == [COMPLETIONS, CHAT] * 2
    assert "prompt" in asked[0][1] and asked[1][1]["messages"][0]["role"] == "user"
    assert all(body["stream"] and body["max_tokens"] == 16 for _, body in asked)
