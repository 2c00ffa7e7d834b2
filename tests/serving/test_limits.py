"""API keys: every route but /health needs one, even future ones. And room in the queue."""

from __future__ import annotations

import asyncio
import re

import httpx2 as httpx
import pytest
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from idlm.errors import InputError
from idlm.serving import limits
from idlm.serving.app import create_app
from idlm.serving.client import EngineClient
from idlm.serving.config import Limits
from idlm.serving.errors import Busy
from idlm.serving.limits import LONGEST_WAIT, AuthAndLimits, Quota
from idlm.serving.prompts import Prompts
from tests.serving.conftest import CONFIG, KEY, Running

LIMITS = Limits(queue_requests=4, queue_tokens=100)
APP = create_app(CONFIG, EngineClient(CONFIG.worker, CONFIG.limits), Prompts(None, "none", 16))


def paths() -> set[tuple[str, str]]:
    """Method and path of every operation, from the document and from the routes."""
    found = {
        (method.upper(), path) for path, item in APP.openapi()["paths"].items() for method in item
    }
    for route in APP.routes:
        if isinstance(route, Route):
            found |= {(method, route.path) for method in route.methods or ()}
    return {(method, re.sub(r"\{.*?\}", "x", path)) for method, path in found}


def test_the_paths_are_all_there() -> None:
    names = {path for _, path in paths()}
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/openapi.json",
        "/metrics",
        "/health",
    } <= names


OPEN = {"/": 307, "/health": 200, "/ping": 200, "/docs": 200, "/docs/x": 404}
"""Paths that need no key, with the status of their answers."""


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", KEY]
)
def test_every_route_but_the_open_ones_needs_a_key(header: str | None, served: Running) -> None:
    with served.open(key=None) as http:
        for method, path in sorted(
            paths() | {("GET", "/nowhere"), ("DELETE", "/v1/models"), ("GET", "/x//health")}
        ):
            response = http.request(
                method, path, headers={"Authorization": header} if header else {}
            )
            expected = OPEN.get(path, 401)
            assert response.status_code == expected, (method, path)
            if expected == 401 and method != "HEAD":
                assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", CONFIG.api_keys)
def test_each_key_opens(key: str, served: Running) -> None:
    with served.open(key) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200
        assert http.get("/nowhere").status_code == 404


def test_every_key_has_its_own_salt() -> None:
    salts = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        salts.append(scope["state"]["salt"])

    async def nothing(*_: object) -> Message:
        return {"type": "http.disconnect"}

    async def main() -> None:
        for key in CONFIG.api_keys:
            header = (b"authorization", f"Bearer {key}".encode())
            scope = {"type": "http", "path": "/v1/completions", "headers": [header]}
            await AuthAndLimits(app, CONFIG.api_keys, CONFIG.limits)(scope, nothing, nothing)  # type: ignore[arg-type]
        await AuthAndLimits(app, (), CONFIG.limits)(
            {"type": "http", "path": "/", "headers": []}, nothing, nothing
        )  # type: ignore[arg-type]

    asyncio.run(main())
    assert (
        len(set(salts)) == 3
        and salts[-1] == b""
        and not any(key.encode() in salts[0] for key in CONFIG.api_keys)
    )


def test_request_ids_come_back_if_they_are_harmless(http: httpx.Client) -> None:
    assert (
        http.get("/health", headers={"X-Request-Id": "my-id.7"}).headers["x-request-id"]
        == "my-id.7"
    )
    made = http.get("/health", headers={"X-Request-Id": "x" * 200}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_a_request_gets_all_its_room_or_none() -> None:
    it = Quota(LIMITS)
    it.take(3, 60)
    for samples, tokens in ((2, 2), (1, 41)):
        with pytest.raises(Busy) as busy:
            it.take(samples, tokens)
        assert busy.value.retry_after == 1
        assert (it.samples, it.tokens) == (3, 60)
    it.take(1, 40)
    it.give_back(60)
    assert (it.samples, it.tokens) == (3, 40)


@pytest.mark.parametrize(("samples", "tokens"), [(5, 5), (1, 101)])
def test_what_never_fits_is_not_told_to_come_back(samples: int, tokens: int) -> None:
    with pytest.raises(InputError, match=f"{samples} samples and {tokens} tokens"):
        Quota(LIMITS).take(samples, tokens)


def test_the_wait_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(limits, "monotonic", lambda: now)
    it = Quota(LIMITS)
    it.take(4, 100)
    for _ in range(2):
        it.give_back(10)
        it.take(1, 10)
    now = 12.0  # two samples and 20 tokens in 12 s
    with pytest.raises(Busy) as busy:
        it.take(1, 0)
    assert busy.value.retry_after == 6
    with pytest.raises(Busy) as busy:
        it.take(1, 15)
    assert busy.value.retry_after == 9
    now = 30.0
    with pytest.raises(Busy) as busy:
        it.take(4, 100)
    assert busy.value.retry_after == LONGEST_WAIT
    now = 43.0  # too long ago to say anything
    with pytest.raises(Busy) as busy:
        it.take(1, 0)
    assert busy.value.retry_after == 1
