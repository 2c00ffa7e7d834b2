"""Bad input is answered 4xx with an OpenAI error body; other requests are not affected."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest

from idlm.serving.limits import Connection
from idlm.serving.server import KEEP_ALIVE_SECONDS
from tests.serving.conftest import KEY, SECONDS, Running
from tests.waiting import HANG_SECONDS, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"model": "nano", "messages": HELLO, "max_tokens": 2} | fields).encode()


def text(**fields: Any) -> tuple[str, bytes]:
    return TEXT, json.dumps({"model": "nano", "prompt": "hello", "max_tokens": 2} | fields).encode()


def raw(body: str | bytes, path: str = CHAT) -> tuple[str, bytes]:
    return path, body.encode() if isinstance(body, str) else body


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


TOOL = {"type": "function", "function": {"name": "f"}}
CASES: dict[str, tuple[tuple[str, bytes], int, str]] = {
    # case: the request, its status, what the message names
    "no JSON": (raw("hello"), 400, "JSON"),
    "half of JSON": (raw('{"model": "nano", '), 400, "JSON"),
    "two values": (raw("{} {}"), 400, "JSON"),
    "a comment": (raw('{"model": "nano" /* */}'), 400, "JSON"),
    "nothing": (raw(""), 400, "missing"),
    "a list": (raw("[]"), 400, "body"),
    "null": (raw("null"), 400, "body"),
    "invalid UTF-8": (raw(b'{"model": "\xff\xfe"}'), 400, "utf-8"),
    "half a surrogate pair": (raw('{"model": "nano", "prompt": "\\ud800"}', TEXT), 400, "JSON"),
    "deep lists": (raw("[" * 100_000), 400, "nested"),
    "deep and closed": (raw('{"model": ' + "[" * 500 + "]" * 500 + "}"), 400, "nested"),
    "a deep schema": (chat(guided_json=nested(60)), 400, "nested"),
    "a deep schema as text": (chat(guided_json=json.dumps(nested(60))), 400, "nested"),
    "too many keys": (chat(logit_bias={str(key): 1 for key in range(5000)}), 400, "keys"),
    "10 MB": (text(prompt="x" * 10_000_000), 413, "4194304 bytes"),
    "NaN": (raw('{"model": "nano", "messages": [], "temperature": NaN}'), 400, "JSON"),
    "infinity": (raw('{"model": "nano", "messages": [], "temperature": -Infinity}'), 400, "JSON"),
    "1e999": (raw('{"model": "nano", "messages": [], "temperature": 1e999}'), 400, "JSON"),
    "a number of 5000 digits": (
        raw('{"model": "nano", "prompt": "x", "seed": ' + "9" * 5000 + "}", TEXT),
        400,
        "JSON",
    ),
    "a huge seed": (chat(seed=10**30), 400, "seed"),
    "a huge temperature": (chat(temperature=10**400), 400, "temperature"),
    "a huge max_tokens": (chat(max_tokens=10**20), 400, "max_tokens"),
    "a huge priority": (chat(priority=2**70), 400, "priority"),
    "a number as text": (chat(temperature="1"), 400, "temperature"),
    "true as a number": (chat(max_tokens=True), 400, "max_tokens"),
    "1 as true": (chat(stream=1), 400, "stream"),
    "half a token": (chat(max_tokens=1.5), 400, "max_tokens"),
    "no tokens": (chat(max_tokens=0), 400, "max_tokens"),
    "max_tokens 0 without echo": (text(max_tokens=0), 400, "max_tokens"),
    "unknown field": (chat(top_q=1), 400, "top_q"),
    "unknown extra": (chat(idlm={"tracee": True}), 400, "tracee"),
    "a number for false": (chat(store=0), 400, "store"),
    "a number for true": (chat(parallel_tool_calls=1), 400, "parallel_tool_calls"),
    "audio": (chat(audio={"voice": "x", "format": "wav"}), 400, "audio"),
    "functions": (chat(functions=[]), 400, "functions"),
    "best_of without n": (text(best_of=3), 400, "best_of"),
    "a suffix": (text(suffix="x"), 400, "suffix"),
    "temperature below 0": (chat(temperature=-0.1), 400, "temperature"),
    "top_p 0": (chat(top_p=0), 400, "top_p"),
    "n 0": (chat(n=0), 400, "n=0"),
    "n 5": (chat(n=5), 400, "n=5"),
    "a seed of more than 64 bits": (chat(seed=-(2**63) - 1), 400, "seed"),
    "prompt_logprobs in a stream": (chat(prompt_logprobs=1, stream=True), 400, "prompt_logprobs"),
    "21 prompt_logprobs": (text(prompt_logprobs=21), 400, "prompt_logprobs"),
    "all prompt_logprobs": (text(prompt_logprobs=-1), 400, "prompt_logprobs"),
    "an unknown form": (
        chat(response_format={"type": "structural_tag"}),
        *(400, "response_format: 'type' is 'structural_tag'; use one of 'text', 'json_object'"),
    ),
    "truncated to nothing": (text(truncate_prompt_tokens=0), 400, "truncate_prompt_tokens"),
    "truncated to less": (chat(truncate_prompt_tokens=-2), 400, "truncate_prompt_tokens"),
    "an empty salt": (text(cache_salt=""), 400, "cache_salt"),
    "an empty bad word": (chat(bad_words=["a", " "]), 400, "bad_words"),
    "a long bad word": (chat(bad_words=["word " * 40]), 400, "bad_words"),
    "a bad word that is no text": (chat(bad_words=[7]), 400, "bad_words.0"),
    "no token allowed": (chat(allowed_token_ids=[]), 400, "allowed_token_ids"),
    "an allowed token that is not": (text(allowed_token_ids=[5, 99999]), 400, "99999"),
    "bans that leave no token": (
        text(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=1),
        400,
        "leave no token",
    ),
    "21 top_logprobs": (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "top_logprobs alone": (chat(top_logprobs=1), 400, "logprobs"),
    "21 logprobs": (text(logprobs=21), 400, "logprobs"),
    "17 stops": (chat(stop=["x"] * 17), 400, "at most 16 items"),
    "an empty stop": (chat(stop=""), 400, "stop"),
    "a bias for no token": (chat(logit_bias={"x": 1}), 400, "'x'"),
    "biases for no tokens": (chat(logit_bias={"x": 1, "7": 1, "y z": 2}), 400, "'x', 'y z'"),
    "biases for tokens that are not": (
        chat(logit_bias={"99999": 1, "88888": 1}),
        400,
        "99999, 88888",
    ),
    "a bias for a token that is not": (chat(logit_bias={"99999": 1}), 400, "99999"),
    "a stop id that is not": (chat(stop_token_ids=[99999]), 400, "99999"),
    "min_tokens above max_tokens": (chat(min_tokens=3), 400, "min_tokens"),
    "unknown rule": (chat(verification="relaxed"), 400, "verification"),
    "no time": (chat(timeout=0), 400, "timeout"),
    "no messages": (chat(messages=[]), 400, "messages"),
    "messages as text": (chat(messages="hello"), 400, "messages"),
    "a role that is no name": (chat(messages=[{"role": "a\nb", "content": "x"}]), 400, "role"),
    "no role": (chat(messages=[{"content": "x"}]), 400, "role"),
    "a picture": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        'only "text"',
    ),
    "no content": (chat(messages=[{"role": "user"}]), 400, "content"),
    "a template's own argument": (
        chat(chat_template_kwargs={"chat_template": "x"}),
        400,
        "chat_template",
    ),
    "a list for a template": (chat(chat_template_kwargs={"x": []}), 400, "chat_template_kwargs"),
    "tools without a form for them": (chat(tools=[TOOL]), 400, "tools"),
    "a choice without tools": (chat(tool_choice="required"), 400, "tool_choice"),
    "two guides": (
        chat(guided_regex="a", response_format={"type": "json_object"}),
        400,
        "more than one",
    ),
    "a long regex": (chat(guided_regex="a" * 70_000), 400, "65536 bytes"),
    "a schema that is a list": (chat(guided_json="[]"), 400, "guided_json"),
    "an unknown format": (chat(response_format={"type": "yaml"}), 400, "response_format"),
    "stream_options without a stream": (
        chat(stream_options={"include_usage": True}),
        400,
        "stream_options",
    ),
    "another model": (chat(model="gpt-7"), 404, "gpt-7"),
    "an adapter by its path": (chat(model="/etc/passwd"), 404, "/etc/passwd"),
    "an empty prompt": (text(prompt=""), 400, "0 tokens"),
    "no prompts": (text(prompt=[]), 400, "0 prompts"),
    "5 prompts": (text(prompt=["x"] * 5), 400, "5 prompts"),
    "MASK as an id": (text(prompt=[5, 3]), 400, "MASK"),
    "a negative id": (text(prompt=[-1]), 400, "-1"),
    "an id outside": (text(prompt=[100_000]), 400, "100000"),
    "an id of 100 digits": (text(prompt=[10**100]), 400, "outside"),
    "ids and text": (text(prompt=[1, "x"]), 400, "prompt"),
    "a prompt beyond the context": (text(prompt=[5] * 512), 400, "512 tokens"),
    "a text beyond the context": (text(prompt="word " * 600), 400, "tokens"),
    "a text far beyond the context": (text(prompt="word " * 100_000), 400, "characters"),
    "echo of logprobs in a stream": (text(echo=True, logprobs=1, stream=True), 400, "echo"),
    "ids that are no ids": (raw('{"tokens": [999999]}', "/detokenize"), 400, "vocabulary"),
    "nothing to tokenize": (raw("{}", "/tokenize"), 400, "prompt"),
    "no such path": (raw("{}", "/v1/engines"), 404, "no path /v1/engines"),
}


def refused(response: httpx.Response, status: int, named: str) -> None:
    assert response.status_code == status, response.text[:300]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert named in body["error"]["message"] and "\n" not in body["error"]["message"]
    assert len(response.content) < 1000


@pytest.mark.parametrize("case", CASES)
def test_bad_requests(case: str, http: httpx.Client) -> None:
    (path, body), status, named = CASES[case]
    response = http.post(path, content=body, headers={"Content-Type": "application/json"})
    refused(response, status, named)


def test_a_request_beside_them_is_not_touched(http: httpx.Client, served: Running) -> None:
    path, body = chat(temperature=0, max_tokens=40, stream=True)
    with http.stream(
        "POST", path, content=body, headers={"Content-Type": "application/json"}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        with served.open() as other:
            for (where, bad), status, named in list(CASES.values())[::6]:
                refused(
                    other.post(where, content=bad, headers={"Content-Type": "application/json"}),
                    status,
                    named,
                )
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_bodies_have_to_be_called_json(http: httpx.Client) -> None:
    _, body = chat()
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"Content-Type": kind} if kind else {}
        refused(http.post(CHAT, content=body, headers=headers), 415, "application/json")


def test_methods(http: httpx.Client) -> None:
    response = http.get(CHAT)
    refused(response, 405, "Method")
    assert response.headers["allow"] == "POST"


def test_a_body_in_chunks_is_counted_too(http: httpx.Client) -> None:
    chunks = (b"x" * 100_000 for _ in range(60))
    refused(
        http.post(CHAT, content=chunks, headers={"Content-Type": "application/json"}),
        413,
        "4194304",
    )


@contextmanager
def connected(served: Running) -> Iterator[tuple[socket.socket, Connection]]:
    """A raw connection, and the server's end of it."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=HANG_SECONDS) as ours:
        there = served.http.server_state.connections
        wait_until(lambda: any(end.client == ours.getsockname() for end in list(there)))
        (theirs,) = [end for end in list(there) if end.client == ours.getsockname()]
        assert isinstance(theirs, Connection)
        yield ours, theirs


def rest_of(connection: socket.socket) -> bytes:
    """The response, up to the end of the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def answer_to(served: Running, *pieces: bytes) -> bytes:
    """The response on a raw connection to these pieces."""
    with connected(served) as (ours, _):
        for piece in pieces:
            ours.sendall(piece)
        return rest_of(ours)


def late_answer(served: Running, ours: socket.socket, theirs: Connection, piece: bytes) -> bytes:
    """The response after a piece of a request and a wait beyond the limit."""
    ours.sendall(piece)
    wait_until(
        lambda: theirs._header_bytes == len(piece) and served.loop.limits(KEEP_ALIVE_SECONDS)
    )
    served.loop.forward_from_outside(SECONDS / 2)
    assert theirs in served.http.server_state.connections and not theirs.transport.is_closing()
    served.loop.forward_from_outside(SECONDS)
    return rest_of(ours)


HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/json\r\nAuthorization: Bearer %b\r\n"
)


def test_headers_that_never_end(engineless: Running) -> None:
    with connected(engineless) as ends:
        answer = late_answer(engineless, *ends, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the headers took more than 300 s" in answer


def test_a_client_that_says_nothing(engineless: Running) -> None:
    with connected(engineless) as ends:
        assert late_answer(engineless, *ends, b"").startswith(b"HTTP/1.1 408 ")


def test_a_second_request_that_never_ends(engineless: Running) -> None:
    with connected(engineless) as (ours, theirs):
        ours.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while b'{"status":"alive"}' not in answer:
            answer += ours.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert late_answer(engineless, ours, theirs, b"GET /hea").startswith(b"HTTP/1.1 408 ")


def test_headers_without_measure(served: Running) -> None:
    assert answer_to(
        served, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: ", b"x" * 70_000
    ).startswith(b"HTTP/1.1 431 ")


def test_large_headers_that_come_whole(served: Running) -> None:
    """In one piece they reach the server before `Connection` has counted them."""
    with served.open() as http:
        refused(http.get("/v1/models", headers={"X-Large": "x" * 70_000}), 431, "65536")
        assert http.get("/v1/models", headers={"X-Large": "x" * 60_000}).status_code == 200


def test_a_body_that_never_ends(engineless: Running) -> None:
    request = HEAD % KEY.encode() + b'Content-Length: 100\r\n\r\n{"model"'
    with connected(engineless) as ends:
        answer = late_answer(engineless, *ends, request)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body took more than 300 s" in answer


def test_what_is_no_http(served: Running) -> None:
    answer = answer_to(served, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b'{"error":' in answer


def test_a_client_that_never_reads(engineless: Running) -> None:
    request = (
        b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n\r\n" % KEY.encode()
    )
    connections = engineless.http.server_state.connections
    with connected(engineless) as (ours, theirs):
        ours.sendall(request * 400)
        wait_until(lambda: theirs.flow.write_paused)
        engineless.loop.forward_from_outside(SECONDS / 2)
        assert theirs in connections

        def cut_off() -> bool:
            engineless.loop.forward_from_outside(
                SECONDS
            )  # again where there was still room for some in between
            return theirs not in connections

        wait_until(cut_off)


def test_a_client_that_leaves_within_its_request_is_no_bad_request(served: Running) -> None:
    def counted(status: str) -> float:
        with served.open() as http:
            lines = [
                line
                for line in http.get("/metrics").text.splitlines()
                if f'{CHAT}",status="{status}"' in line
            ]
        return sum(float(line.split()[-1]) for line in lines)

    before, gone = counted("400"), counted("499")
    with connected(served) as (ours, theirs):
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Length: 300\r\n\r\n{"
        )
        ours.sendall(head.encode())
        wait_until(lambda: theirs.cycle is not None)
    wait_until(lambda: counted("499") > gone)
    assert (counted("400"), counted("499")) == (before, gone + 1)
