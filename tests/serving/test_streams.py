"""Streams: their form on the wire, samples side by side, and clients that leave."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from benchmarks.harness.client import Answer
from benchmarks.server_bytes import body, offline, output
from idlm import LLM, SamplingParams
from tests.serving.conftest import Running

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Tom has 5 pens."}],
    "ignore_eos": True,
    "max_tokens": 400,
}


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def idle(served: Running, within: float = 5.0) -> bool:
    """Whether the engine has nothing to do any more, or soon has not."""
    end = time.monotonic() + within
    while served.client.running or served.client.queued_tokens or served.client.stats.pages_live:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


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
    texts = ["".join(chunk["delta"].get("content", "") for chunk in chunks if chunk["index"] == at) for at in range(3)]
    offline = llm.chat(LONG["messages"], SamplingParams(n=3, seed=4, max_tokens=30, ignore_eos=True))
    assert texts == [offline.text, *(sample.text for sample in offline.samples)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(stream: bool, served: Running) -> None:
    assert idle(served)
    with served.open() as http, pytest.raises(httpx.TimeoutException):
        if stream:
            with http.stream("POST", CHAT, json=LONG | {"stream": True, "n": 2}) as response:
                next(response.iter_lines())
                assert served.client.running == 2
                raise httpx.ReadTimeout("left")
        else:
            http.post(CHAT, json=LONG | {"n": 2}, timeout=0.3)
    assert idle(served, 2.0)


def test_clients_that_leave_whenever_they_like(served: Running) -> None:
    chance = random.Random(0)

    def visit(patience: float) -> None:
        with served.open() as http:
            try:
                body = LONG | {"stream": chance.random() < 0.5, "max_tokens": 50}
                with http.stream("POST", CHAT, json=body, timeout=patience) as response:
                    for _ in zip(response.iter_lines(), range(int(patience * 40)), strict=False):
                        pass
            except httpx.TimeoutException:
                pass

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(visit, [chance.random() * 0.5 + 0.001 for _ in range(36)]))
    assert idle(served, 10.0)
    stats = served.client.stats
    assert stats.running == stats.waiting == 0


def test_more_than_the_queue_takes_is_answered_429(served: Running) -> None:
    with served.open() as http, ThreadPoolExecutor(20) as pool:
        body = LONG | {"n": 4, "max_tokens": 10}
        answers = list(pool.map(lambda _: http.post(CHAT, json=body), range(20)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 16
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error"
    assert idle(served)


def test_the_same_bytes_alone_and_beside_others_cold_and_warm(served: Running) -> None:
    served_by = LLM("nano-base", stride=1, dtype="float64", max_num_seqs=4, kv_memory="32MiB")
    prompts = [[5 + (7 * number + place) % 300 for place in range(30)] for number in range(8)]
    expected = offline(served_by, prompts)
    for model, at in (("nano", 1), ("nano", 8), ("nano:ar", 8)):
        bodies = [body(model, prompt, number) for number, prompt in enumerate(prompts)]
        with ThreadPoolExecutor(at) as pool, served.open() as http:
            answers = list(pool.map(lambda one: http.post("/v1/completions", json=one), bodies))  # noqa: B023
        got = [output(Answer(0.0, 0, 200, dict(one.headers), [(0.0, one.content)], True))[0] for one in answers]
        assert got == expected, (model, at)
