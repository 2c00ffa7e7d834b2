"""Routes that describe the server: for routers, evaluation tools, browsers and people."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import httpx2 as httpx
import pytest

from idlm import __version__
from idlm.serving.app import create_app
from tests.serving.conftest import CONFIG, KEY, Running

ORIGIN = "http://page.example"


def test_the_tokenizer_describes_itself(http: httpx.Client, served: Running) -> None:
    """As lm-evaluation-harness reads it for a remote tokenizer."""
    prompts = served.http.config.app.state.server.prompts  # type: ignore[union-attr]
    info = http.get("/tokenizer_info").json()
    for name in ("eos_token", "pad_token"):
        assert info[name] == getattr(prompts.tokenizer, name)
    assert info["chat_template"] == prompts.template_for(tools=False)
    assert info["tokenizer_class"] == type(prompts.tokenizer).__name__
    assert not any("/" in str(value) for name, value in info.items() if name != "chat_template")
    text = {"prompt": "1 + 1 =", "add_special_tokens": False}
    assert http.post("/tokenize", json=text).json()["tokens"]


def test_routers_find_what_they_ask_for(http: httpx.Client) -> None:
    for path in ("/server_info", "/get_server_info"):
        info = http.get(path).json()
        assert info["version"] == __version__ and info["status"] == "ready"
        assert info["max_running_requests"] == 8 and info["max_model_len"] == 512
    for path in ("/model_info", "/get_model_info"):
        info = http.get(path).json()
        assert info["model_path"] == info["served_model_name"] == "nano" and info["is_generation"]
    for path in ("/v1/loads", "/loads"):
        loads = http.get(path).json()
        assert loads["dp_rank_count"] == len(loads["loads"]) == 1
        assert set(loads["aggregate"].values()) == {0}
    assert http.get("/load").json() == {"server_load": 0}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/models/", "/v1/models"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/messages", "/v1/messages"),
        ("/tokenize/", "/tokenize"),
        ("/v1/v2/v3", "/openapi.json"),
    ],
)
def test_a_wrong_path_is_told_the_right_one(path: str, meant: str, http: httpx.Client) -> None:
    for answer in (http.get(path), http.post(path, json={})):
        error = answer.json()["error"]
        if answer.status_code == 405:  # /v1/models/ is a path of models, for GET only
            continue
        assert answer.status_code == 404 and error["code"] == "unknown_path"
        assert re.search(rf"(use|GET) {re.escape(meant)}\b", error["message"])


def test_how_to_abort_is_said_to_those_who_ask_by_id(http: httpx.Client) -> None:
    for path in ("/abort_request", "/abort_requests"):
        answer = http.post(path, json={"rid": "chatcmpl-1"})
        assert answer.status_code == 404 and "close its connection" in answer.text


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key", "Api-Key"])
def test_a_key_in_every_header(header: str, served: Running) -> None:
    prefix = "Bearer " if header == "Authorization" else ""
    with served.open(key=None) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={header: f"{prefix}wrong"}).status_code == 401
        assert http.get("/v1/models", headers={header: prefix.strip()}).status_code == 401
        assert http.get("/v1/models", headers={header: prefix + KEY}).status_code == 200
        both = {"Authorization": "Bearer wrong", header: prefix + KEY}
        assert http.get("/v1/models", headers=both).status_code == 200


def test_what_needs_no_key(served: Running) -> None:
    """Probes, and a page that says nothing of this server."""
    with served.open(key=None) as http:
        assert http.get("/ping").json() == http.post("/ping").json() == {"status": "alive"}
        assert http.get("/").headers["location"] == "docs"
        page = http.get("/docs")
        assert page.status_code == 200 and "nano" not in page.text
        assert http.get("/docs/../v1/models").status_code == 401
        assert http.get("/docs/secret.html").status_code == 404
        for path in ("/openapi.json", "/load", "/server_info", "/docs2", "/v1/models"):
            assert http.get(path).status_code == 401


def test_the_page_has_all_it_needs(http: httpx.Client) -> None:
    pytest.importorskip("fastapi_offline")
    page = http.get("/docs").text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(assets) == 3 and "http" not in "".join(assets)
    for asset in assets:
        assert len(http.get(f"/{asset}").content) > 1000
    assert 'url: "openapi.json"' in page and "const key = true ?" in page


def test_pages_of_allowed_origins_may_ask(served: Running) -> None:
    """Their preflight has no key; a page of another origin gets no permission."""
    config = replace(CONFIG, allowed_origins=(ORIGIN,))
    app = create_app(config, served.client, served.http.config.app.state.server.prompts)  # type: ignore[union-attr]
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            allowed = await http.options("/v1/messages", headers={"Origin": ORIGIN} | preflight)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == ORIGIN
            asked = await http.get("/v1/models", headers={"Origin": ORIGIN, "X-Api-Key": KEY})
            assert asked.headers["access-control-allow-origin"] == ORIGIN
            refused = await http.get("/v1/models", headers={"Origin": ORIGIN})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == ORIGIN
            other = await http.options("/v1/messages", headers={"Origin": "http://b"} | preflight)
            assert other.status_code == 400
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(ask())
