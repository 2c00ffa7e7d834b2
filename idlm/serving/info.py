"""Routes that describe the server: for routers, load balancers, evaluation tools and people."""

from __future__ import annotations

from importlib.resources import files
from time import time
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from idlm import __version__
from idlm.serving import responses
from idlm.serving.document import answers, strict_router
from idlm.serving.errors import ApiError
from idlm.serving.jobs import Server, the_server
from idlm.serving.sending import as_json

ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
"""Files of Swagger UI, by name, with their types."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>idlm</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
const key = KEYED ? prompt("API key of this server") : null
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  requestInterceptor: request => {
    if (key) request.headers["Authorization"] = `Bearer ${key}`
    return request
  }
})
</script>
</body>
</html>
"""
"""KEYED is true for a server with keys: the browser then sends the key with every request."""


class Load(msgspec.Struct):
    """The response of /load, as vLLM's: samples running or waiting."""

    server_load: int


class RankLoad(msgspec.Struct):
    """The load of one engine, as SGLang's."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    max_running_requests: int
    dp_rank: int = 0


class Aggregate(msgspec.Struct):
    """The load of all engines, of which there is one."""

    total_running_reqs: int
    total_waiting_reqs: int
    total_reqs: int


class Loads(msgspec.Struct):
    """The response of /v1/loads, as SGLang's; `timestamp` in seconds since the epoch."""

    timestamp: float
    version: str
    loads: list[RankLoad]
    aggregate: Aggregate
    dp_rank_count: int = 1


class ModelInfo(msgspec.Struct):
    """The response of /model_info, as SGLang's; the path is the name that requests give."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    max_model_len: int
    is_generation: bool = True
    has_image_understanding: bool = False
    has_audio_understanding: bool = False


class ServerInfo(ModelInfo, kw_only=True):
    """The response of /server_info: the model, and the options that bound the server's load."""

    version: str
    status: str
    dtype: str
    device: str
    max_running_requests: int
    max_total_num_tokens: int
    max_queued_requests: int
    tp_size: int = 1
    dp_size: int = 1


SHAPES = (Load, Loads, ModelInfo, ServerInfo)
"""Every type of a response body."""
router = strict_router()


@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def ping() -> Response:
    """As /health. Needs no API key."""
    return as_json(responses.Status("alive"))


@router.get("/load", responses=answers(Load))
async def load(request: Request) -> Response:
    """Samples running or waiting."""
    return as_json(Load(the_server(request).client.quota.samples))


@router.get("/loads", include_in_schema=False)
@router.get("/v1/loads", responses=answers(Loads))
async def loads(request: Request) -> Response:
    """Samples and tokens in the engine, as SGLang reports them."""
    server = the_server(request)
    stats, quota = server.client.stats, server.client.quota
    used = stats.pages_live / max(1, stats.pages_total)
    room = quota.most_tokens
    running, waiting = stats.running, stats.waiting
    slots = server.config.worker.engine.max_num_seqs
    rank = RankLoad(running, waiting, quota.tokens, room, round(used, 4), slots)
    total = Aggregate(running, waiting, running + waiting)
    return as_json(Loads(time(), __version__, [rank], total))


@router.get("/get_model_info", include_in_schema=False)
@router.get("/model_info", responses=answers(ModelInfo))
async def model_info(request: Request) -> Response:
    """The model in the form of SGLang's, which routers read."""
    return as_json(ModelInfo(**_model(the_server(request))))


@router.get("/get_server_info", include_in_schema=False)
@router.get("/server_info", responses=answers(ServerInfo))
async def server_info(request: Request) -> Response:
    """The server in the form of SGLang's, which routers read."""
    server = the_server(request)
    worker = server.config.worker
    info = ServerInfo(
        **_model(server),
        version=__version__,
        status="ready" if server.client.ready else "not ready",
        dtype=worker.dtype,
        device=worker.device,
        max_running_requests=worker.engine.max_num_seqs,
        max_total_num_tokens=server.config.limits.queue_tokens,
        max_queued_requests=server.config.limits.queue_requests,
    )
    return as_json(info)


def _model(server: Server) -> dict[str, Any]:
    name = server.config.name
    same = {"model_path": name, "tokenizer_path": name, "served_model_name": name}
    return same | {"max_model_len": server.prompts.context}


@router.get(
    "/tokenizer_info",
    responses=answers(responses.Status, 400)
    | {200: {"description": "Done.", "content": {"application/json": {"schema": {}}}}},
)
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's configuration with its chat template, as vLLM gives it.

    Clients that tokenize remotely read special tokens and the template from it.
    """
    info = the_server(request).prompts.tokenizer_info()
    return Response(msgspec.json.encode(info), media_type="application/json")


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """To the page for people."""
    return RedirectResponse("docs")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Swagger UI. It holds nothing of this server; its browser asks for /openapi.json."""
    keyed = "true" if the_server(request).config.api_keys else "false"
    return HTMLResponse(PAGE.replace("KEYED", keyed))


@router.get("/docs/{asset}", include_in_schema=False)
async def docs_asset(asset: str) -> Response:
    """A file of Swagger UI, from an installed package: nothing comes from elsewhere."""
    if asset not in ASSETS:
        raise ApiError(404, f"/docs has no file {asset[:80]!r}")
    content = (files("fastapi_offline") / "static" / asset).read_bytes()
    return Response(
        content, media_type=ASSETS[asset], headers={"Cache-Control": "public, max-age=86400"}
    )
