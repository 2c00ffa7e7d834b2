"""The routes; `create_app` adds limits, authentication, the access log and the error bodies."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import Discriminator, Tag
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from idlm import __version__
from idlm.serving import adapters, apis, info, page, responses
from idlm.serving.answers import CompletionAnswer
from idlm.serving.chat import chat_answer
from idlm.serving.client import EngineClient
from idlm.serving.config import ServeConfig
from idlm.serving.document import READS, RUNS, answers, strict_router
from idlm.serving.errors import ApiError, ErrorBody, Expected, as_api_error
from idlm.serving.jobs import Server, admit, the_server
from idlm.serving.limits import AuthAndLimits
from idlm.serving.observe import CONTENT_TYPE, AccessLog, Meters
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import find_reasoner
from idlm.serving.schema import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeText,
)
from idlm.serving.schema_chat import ChatRequest, TokenizeMessages
from idlm.serving.sending import as_json, respond
from idlm.serving.strict import validation_error

SHAPES = (
    *(
        responses.ChatCompletion,
        responses.ChatChunk,
        responses.Completion,
        responses.ModelCard,
        responses.ModelList,
    ),
    *(responses.Tokenized, responses.Detokenized, responses.Status, responses.Version, ErrorBody),
    *(*apis.SHAPES, *info.SHAPES),
)
"""Every type of a response body."""
WITH_MODEL = (
    *("ChatRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest", "CountRequest"),
)
"""Requests whose `model` is one of those that are served."""
ROOT = "/v1"
ABORTS = ("/abort_request", "/abort_requests")
"""Paths of SGLang and vLLM; here a request ends with its connection alone."""
router = strict_router()


@router.post(
    "/v1/chat/completions",
    responses=answers(responses.ChatCompletion, *READS, *RUNS, chunk=responses.ChatChunk),
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, as one body or as a stream."""
    with body.naming():
        return await respond(request, await chat_answer(request, body), bool(body.stream))


@router.post(
    "/v1/completions",
    responses=answers(responses.Completion, *READS, *RUNS, chunk=responses.Completion),
)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete one prompt or several, as one body or as a stream."""
    server = the_server(request)
    server.accept(body)
    special = body.add_special_tokens is not False
    parsed = server.config.parse_special if body.parse_special is None else body.parse_special

    def ids(prompt: str | list[int]) -> list[int]:
        return server.prompts.text(prompt, special, parsed) if isinstance(prompt, str) else prompt

    with body.naming():
        prompts = await server.prompts.in_thread(lambda: list(map(ids, body.prompts)))
        job = admit(request, body, prompts)
        answer = CompletionAnswer(job, body, server.prompts, job.prompts)
        return await respond(request, answer, bool(body.stream))


@router.get("/v1/models", responses=answers(responses.ModelList))
async def list_models(request: Request) -> Response:
    """List the names that a request can give as `model`."""
    server = the_server(request)
    return as_json(responses.ModelList([_card(server, name) for name in server.targets]))


@router.get("/v1/models/{id:path}", responses=answers(responses.ModelCard, 404))
async def get_model(request: Request, id: str) -> Response:
    """Describe one model; 404 if it is not served."""
    if not id:
        raise _no_path(request)
    server = the_server(request)
    server.target(id)
    return as_json(_card(server, id))


def _card(server: Server, name: str) -> responses.ModelCard:
    return responses.ModelCard(name, server.started, server.prompts.context)


Tokenizable = Annotated[
    Annotated[TokenizeText, Tag("[text]")] | Annotated[TokenizeMessages, Tag("[messages]")],
    Discriminator(
        lambda body: "[messages]" if isinstance(body, dict) and "messages" in body else "[text]"
    ),
]


@router.post("/tokenize", responses=answers(responses.Tokenized, *READS, 404))
async def tokenize(request: Request, body: Tokenizable) -> Response:
    """Token ids of a text or of a conversation, as a request would have them."""
    server = the_server(request)
    if body.model is not None:
        server.target(body.model)
    prompts = server.prompts
    if isinstance(body, TokenizeText):
        text, special, parsed = body.prompt, body.add_special_tokens, server.config.parse_special
        ids = await prompts.in_thread(lambda: prompts.text(text, special, parsed))
    else:
        ids = await prompts.in_thread(body.encoder(prompts))
    strings = prompts.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    return as_json(responses.Tokenized(len(ids), prompts.context, ids, strings))


@router.post("/detokenize", responses=answers(responses.Detokenized, *READS, 404))
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids, special tokens included."""
    server = the_server(request)
    if body.model is not None:
        server.target(body.model)
    text = await server.prompts.in_thread(lambda: server.prompts.detokenize(body.tokens))
    return as_json(responses.Detokenized(text))


@router.get("/health", responses=answers(responses.Status))
async def health() -> Response:
    """Always 200 while the HTTP process runs. Needs no API key."""
    return as_json(responses.Status("alive"))


@router.get("/ready", responses=answers(responses.Status, 503))
async def ready(request: Request) -> Response:
    """200 if the engine takes requests, else 503."""
    the_server(request).engine()
    return as_json(responses.Status("ready"))


@router.get(
    "/metrics",
    responses=answers(responses.Status)
    | {200: {"description": "Done.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    return Response(the_server(request).meters.render(), media_type=CONTENT_TYPE)


@router.get("/version", responses=answers(responses.Version))
async def version() -> Response:
    """The version of idlm that serves."""
    return as_json(responses.Version(__version__))


def components() -> dict[str, Any]:
    """JSON schemas of all response bodies, by name."""
    _, schemas = msgspec.json.schema_components(SHAPES, ref_template="#/components/schemas/{name}")
    return schemas


class App(FastAPI):
    """FastAPI with the schemas of the response bodies in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document: `model` lists the models served; FastAPI's 422 is never sent and
        left out."""
        if not self.openapi_schema:
            document = get_openapi(title=self.title, version=self.version, routes=self.routes)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas |= components()
            for name in WITH_MODEL:
                model = schemas[name]["properties"]["model"]
                model["enum"] = [*self.state.server.targets, *([None] if "anyOf" in model else [])]
            self.openapi_schema = document
        return self.openapi_schema


def create_app(config: ServeConfig, client: EngineClient, prompts: Prompts) -> FastAPI:
    """The ASGI application. The caller starts, drains and stops the engine."""
    app = App(
        title="idlm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    meters = Meters(client, config.name if config.vllm_metrics else None)
    reasoner = find_reasoner(config.reasoning_parser, prompts)
    app.state.server = Server(config, client, prompts, meters, reasoner)
    if config.ui:  # before info's own /
        app.include_router(page.router)
    for routes in (router, apis.router, info.router):
        app.include_router(routes)
    if config.worker.lora_dirs:
        app.include_router(adapters.router)
    app.add_middleware(AuthAndLimits, api_keys=config.api_keys, limits=config.limits)
    if config.allowed_origins:  # before the keys: a browser's preflight has none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(AccessLog, meters=meters)  # the last one added is the outermost
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    for kind in Expected:
        app.add_exception_handler(kind, _expected)
    return app


async def _expected(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    if known.status_code == 404 and not isinstance(error, ApiError):
        known = _no_path(request)
    return known.response(request.scope["path"])


def _no_path(request: Request) -> ApiError:
    """404, with the path that is probably meant."""
    path = request.scope["path"]
    plain = "/" + path.strip("/")
    meant = next((one for one in (plain, ROOT + plain) if _has_route(request, one)), None)
    hint = f"; use {meant}" if meant else "; GET /openapi.json lists the paths"
    if plain in ABORTS:
        hint = "; to abort a request, close its connection"
    return ApiError(404, f"there is no path {path[:80]}{hint}", code="unknown_path")


def _has_route(request: Request, path: str) -> bool:
    if path in ("/", request.scope["path"]):
        return False
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0] is not Match.NONE for route in request.app.router.routes)


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        kind = ApiError(415, "the body is not application/json; send the header Content-Type")
    else:
        kind = validation_error(error.errors(), error.body)
    return kind.response(request.scope["path"])
