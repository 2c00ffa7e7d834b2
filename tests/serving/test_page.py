"""The playground's routes beside the API, the windows that it shows, and the proxy of `idlm ui`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI

from idlm.errors import InputError
from idlm.serving import page, page_server
from idlm.serving.app import create_app
from tests.serving.conftest import CONFIG, KEY, Running
from tests.waiting import HANG_SECONDS

PORT = 4321
BODY = {
    "messages": [{"role": "user", "content": "Leo has 45 apples. He loses 2 of them."}],
    "max_tokens": 24,
    "temperature": 0,
}
Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


def talk(app: FastAPI, ask: Ask, host: str = f"127.0.0.1:{PORT}", key: str | None = None) -> Any:
    """What `ask` finds out of an application, as a browser's client."""

    async def run() -> Any:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url=f"http://{host}", headers=headers, timeout=HANG_SECONDS
        ) as http:
            return await ask(http)

    return asyncio.run(run())


def test_the_page_needs_no_key_and_its_policy_is_strict(served: Running) -> None:
    prompts = served.http.config.app.state.server.prompts  # type: ignore[union-attr]
    app = create_app(replace(CONFIG, ui=True), served.client, prompts)

    async def ask(http: httpx.AsyncClient) -> None:
        index = await http.get("/")
        assert index.status_code == 200 and index.content == page.read(page.INDEX)
        policy = index.headers["Content-Security-Policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= set(policy)
        assert "frame-ancestors 'none'" in policy
        assert not any("unsafe" in one for one in policy)
        for name, kind in page.ASSETS.items():
            found = await http.get(f"/ui/{name}")
            assert found.content == page.read(name)
            assert found.headers["Content-Type"].startswith(kind)
        assert (await http.get("/ui/source.sha256")).status_code == 404
        assert (await http.get("/ui/%2e%2e/page.py")).status_code in (401, 404)
        assert (await http.get("/v1/models")).status_code == 401

    talk(app, ask)


def test_windows_agree_with_the_trace(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=BODY | {"idlm": {"windows": True}}).json()
    traced = answer["choices"][0]["idlm"]
    windows, trace = traced["windows"], traced["trace"]
    assert [one["forward"] for one in windows] == list(range(1, trace[-1]["forward"] + 1))
    drafted = 0
    for place, window in enumerate(windows):
        committed = [one for one in trace if one["forward"] == window["forward"]]
        accepted = window["drafts"][: window["accepted"]]
        together = zip(committed, accepted, strict=False)  # an output may end among them
        assert all(one["id"] == draft["id"] for one, draft in together)
        rejected = window["drafts"][window["accepted"] :][:1]
        assert [one["id"] for one in rejected] != [one["id"] for one in committed[-1:]]
        assert window["outcomes"] == list(range(len(window["drafts"]) + 1))
        assert window["plan"] == f"all-{window['masks'] + 1}"
        assert window["width"] == (window["masks"] + 1) ** 2
        drafted += len(window["drafts"])
        if place + 1 < len(windows):
            later = windows[place + 1]
            assert later["pending"]["id"] == committed[-1]["id"]
            assert later["position"] == window["position"] + len(committed)
    assert windows[0]["position"] == answer["usage"]["prompt_tokens"] - 1
    assert drafted == answer["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


def test_windows_come_with_the_stream_and_cost_nothing_unasked(http: httpx.Client) -> None:
    def streamed(extra: dict[str, Any]) -> list[dict[str, Any]]:
        body = BODY | {"stream": True, "idlm": extra}
        lines = http.post("/v1/chat/completions", json=body).text.splitlines()
        events = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
        return [one["choices"][0].get("idlm", {}) for one in events if one["choices"]]

    windows = [window for one in streamed({"windows": True}) for window in one.get("windows", [])]
    whole = http.post("/v1/chat/completions", json=BODY | {"idlm": {"windows": True}}).json()
    assert windows == whole["choices"][0]["idlm"]["windows"]
    assert not any("windows" in one for one in streamed({"trace": True}))
    assert not any(streamed({}))


def test_a_request_without_drafts_has_windows_of_one_row(http: httpx.Client) -> None:
    body = BODY | {"model": "nano:ar", "max_tokens": 5, "idlm": {"windows": True}}
    traced = http.post("/v1/chat/completions", json=body).json()["choices"][0]["idlm"]
    assert [(one["drafts"], one["outcomes"], one["masks"]) for one in traced["windows"]] == [
        ([], [], 0)
    ] * 5


def test_the_proxy_passes_the_api_on(served: Running) -> None:
    app = page_server.create_app(served.url, PORT)
    body = BODY | {"stream": True, "seed": 1}

    async def ask(http: httpx.AsyncClient) -> tuple[Any, ...]:
        index, models = await http.get("/"), await http.get("/v1/models")
        return index, models, await http.post("/v1/chat/completions", json=body)

    index, models, answer = talk(app, ask, key=KEY)
    assert index.content == page.read(page.INDEX)
    with served.open() as direct:
        assert models.json() == direct.get("/v1/models").json()
        there = direct.post("/v1/chat/completions", json=body)
    texts = [
        "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in one.text.splitlines()
            if line.startswith("data: {")
        )
        for one in (answer, there)
    ]
    assert texts[0] == texts[1] != ""
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    _, refused, _ = talk(page_server.create_app(served.url, PORT), ask)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"


def test_the_proxy_answers_its_own_page_alone(served: Running) -> None:
    app = page_server.create_app(served.url, PORT)

    async def models(http: httpx.AsyncClient, **headers: str) -> int:
        return (await http.get("/v1/models", headers=headers)).status_code

    own = f"http://127.0.0.1:{PORT}"
    assert talk(app, lambda http: models(http, Origin=own), key=KEY) == 200
    assert talk(app, lambda http: models(http, Origin="https://example.org"), key=KEY) == 403
    assert talk(app, models, host="example.org", key=KEY) == 403


def test_a_server_that_is_not_there_is_a_502() -> None:
    app = page_server.create_app("http://127.0.0.1:9/v1", PORT)
    found = talk(app, lambda http: http.get("/v1/models"))
    assert found.status_code == 502 and "127.0.0.1:9" in found.json()["error"]["message"]


def test_the_base_of_a_url() -> None:
    assert page_server.base_url("http://host:1") == "http://host:1/v1"
    assert page_server.base_url("https://host/api/") == "https://host/api"
    with pytest.raises(InputError, match="no URL"):
        page_server.base_url("host:1")
