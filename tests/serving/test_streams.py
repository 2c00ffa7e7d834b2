"""Streams: their form on the wire, samples side by side, and clients that disconnect."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx2 as httpx
import pytest

from benchmarks.harness.client import Answer
from benchmarks.server_bytes import body, offline, output
from idlm import LLM, SamplingParams
from tests.serving.conftest import KEY, Running, held
from tests.waiting import HANG_SECONDS, wait_until

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Tom has 5 pens."}],
    "ignore_eos": True,
    "max_tokens": 400,
}


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def idle(served: Running) -> None:
    """Wait until the engine is idle and has reported it."""
    wait_until(lambda: not served.client.quota.samples and not served.client.quota.tokens)
    before = served.client.stats
    wait_until(lambda: served.client.stats is not before and not served.client.stats.pages_live)


def test_on_the_wire(http: httpx.Client) -> None:
    body = LONG | {"max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = events(response)
    assert lines[-1] == "[DONE]"
    first, *_, end, usage = [json.loads(line) for line in lines[:-1]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert end["choices"][0]["finish_reason"] == "length" and end["choices"][0]["delta"] == {}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5


def test_samples_come_side_by_side(http: httpx.Client, llm: LLM) -> None:
    body = LONG | {"n": 3, "seed": 4, "max_tokens": 30, "stream": True}
    with http.stream("POST", CHAT, json=body) as response:
        chunks = [json.loads(line)["choices"][0] for line in events(response)[:-1]]
    order = [chunk["index"] for chunk in chunks if chunk["delta"].get("content")]
    assert set(order[:6]) == {0, 1, 2} and order != sorted(order)
    texts = [
        "".join(chunk["delta"].get("content", "") for chunk in chunks if chunk["index"] == at)
        for at in range(3)
    ]
    offline = llm.chat(
        LONG["messages"], SamplingParams(n=3, seed=4, max_tokens=30, ignore_eos=True)
    )
    assert texts == [offline.text, *(sample.text for sample in offline.samples)]


OTHERS: dict[str, dict[str, Any]] = {
    "/v1/responses": {
        **{"model": "nano", "input": "Tom has 5 pens."},
        **{"ignore_eos": True, "max_output_tokens": 400},
    },
    "/v1/messages": LONG,
}
"""Long requests of the other APIs."""


def ask(served: Running, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """A connection with this request sent."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=HANG_SECONDS)
    connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(stream: bool, served: Running) -> None:
    """The engine is paused until the server has seen it; a fast engine would be done by then."""
    idle(served)
    before = served.client.stats.tokens
    with ExitStack() as stack:
        if not stream:
            stack.enter_context(held(served.worker))
        connection = stack.enter_context(ask(served, LONG | {"stream": stream, "n": 2}))
        if stream:
            assert connection.recv(1)
            stack.enter_context(held(served.worker))
        wait_until(lambda: served.client.quota.samples == 2)
        connection.close()
        wait_until(lambda: not served.http.server_state.tasks)
    idle(served)
    assert served.client.stats.tokens - before < 2 * LONG["max_tokens"]


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_of_another_api_that_leaves(path: str, stream: bool, served: Running) -> None:
    idle(served)
    before = served.client.stats.tokens
    with ExitStack() as stack:
        if not stream:
            stack.enter_context(held(served.worker))
        connection = stack.enter_context(ask(served, OTHERS[path] | {"stream": stream}, path))
        if stream:
            assert connection.recv(1)
            stack.enter_context(held(served.worker))
        wait_until(lambda: served.client.quota.samples == 1)
        connection.close()
        wait_until(lambda: not served.http.server_state.tasks)
    idle(served)
    assert served.client.stats.tokens - before < 400


def test_a_full_queue_is_answered_429_by_every_api(served: Running) -> None:
    body = LONG | {"n": 4, "max_tokens": 10}
    with served.open() as http, ThreadPoolExecutor(16) as pool:
        with held(served.worker):  # so that none is done before the last has come
            asked = [pool.submit(http.post, CHAT, json=body) for _ in range(16)]
            wait_until(lambda: served.client.quota.samples == 64)
            answers = [http.post(path, json=fields) for path, fields in OTHERS.items()]
        assert all(future.result().status_code == 200 for future in asked)
    for answer in answers:
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    idle(served)


def test_clients_that_leave_whenever_they_like(served: Running) -> None:
    chance = random.Random(0)

    def visit(how: tuple[bool, float]) -> None:
        """Stay for some lines of a stream, or for some time."""
        stream, patience = how
        body = LONG | {"stream": stream, "max_tokens": 50}
        with served.open() as http, suppress(httpx.TimeoutException):
            limits = httpx.Timeout(HANG_SECONDS if stream else patience)
            with http.stream("POST", CHAT, json=body, timeout=limits) as response:
                for _ in zip(response.iter_lines(), range(int(patience * 40)), strict=False):
                    pass

    with ThreadPoolExecutor(12) as pool:
        list(
            pool.map(
                visit, [(chance.random() < 0.5, chance.random() * 0.5 + 0.001) for _ in range(36)]
            )
        )
    idle(served)
    stats = served.client.stats
    assert stats.running == stats.waiting == 0


def test_more_than_the_queue_takes_is_answered_429(served: Running) -> None:
    body = LONG | {"n": 4, "max_tokens": 10}
    with served.open() as http, ThreadPoolExecutor(20) as pool:
        with held(served.worker):  # so that none is done before the last has come
            asked = [pool.submit(http.post, CHAT, json=body) for _ in range(20)]
            wait_until(lambda: sum(future.done() for future in asked) == 4)
            assert served.client.quota.samples == 64
        answers = [future.result() for future in asked]
    assert Counter(answer.status_code for answer in answers) == {200: 16, 429: 4}
    for answer in answers:
        if answer.status_code == 429:
            assert (
                int(answer.headers["retry-after"]) >= 1
                and answer.json()["error"]["type"] == "rate_limit_error"
            )
    idle(served)


def test_the_same_bytes_alone_and_beside_others_cold_and_warm(served: Running) -> None:
    served_by = LLM("nano-base", stride=1, dtype="float64", max_num_seqs=4, kv_memory="32MiB")
    prompts = [[5 + (7 * index + at) % 300 for at in range(30)] for index in range(8)]
    expected = offline(served_by, prompts)
    for model, at in (("nano", 1), ("nano", 8), ("nano:ar", 8)):
        bodies = [body(model, prompt, index) for index, prompt in enumerate(prompts)]
        with ThreadPoolExecutor(at) as pool, served.open() as http:
            answers = list(pool.map(lambda one: http.post("/v1/completions", json=one), bodies))  # noqa: B023
        got = [
            output(Answer(0.0, 0, 200, dict(answer.headers), [(0.0, answer.content)], True))[0]
            for answer in answers
        ]
        assert got == expected, (model, at)
