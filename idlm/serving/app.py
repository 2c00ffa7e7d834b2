"""The routes; `create_app` adds limits, authentication, the access log and the error bodies."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import Discriminator, Tag

from idlm import __version__
from idlm.serving import adapters, responses
from idlm.serving.answers import ChatAnswer, CompletionAnswer, as_json, respond
from idlm.serving.client import EngineClient
from idlm.serving.config import ServeConfig
from idlm.serving.errors import ApiError, ErrorBody, Expected, as_api_error
from idlm.serving.jobs import Server, admit, the_server
from idlm.serving.limits import AuthAndLimits
from idlm.serving.observe import CONTENT_TYPE, AccessLog, Meters
from idlm.serving.prompts import Prompts
from idlm.serving.schema import (
    CompletionRequest,
    DetokenizeRequest,
    StrictRequest,
    TokenizeText,
    validation_error,
)
from idlm.serving.schema_chat import ChatRequest, TokenizeMessages
from idlm.serving.tools import family_of

JSON, EVENTS = "application/json", "text/event-stream"
ERRORS = {
    400: "The request cannot be understood or run; the message names the field.",
    401: "No valid API key.",
    403: "The path is outside the directories that were named at the start.",
    404: "No such model or path.",
    405: "Not with this method.",
    408: "The body took too long, or the request longer than its timeout.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; Retry-After says when to try again.",
    431: "The headers are too large.",
    500: "A bug.",
    503: "There is no engine now.",
}
ALWAYS = (401, 405, 431, 500)
READS = (400, 408, 413, 415)
RUNS = (404, 429, 503)
SHAPES = (
    *(
        responses.ChatCompletion,
        responses.ChatChunk,
        responses.Completion,
        responses.ModelCard,
        responses.ModelList,
    ),
    *(responses.Tokenized, responses.Detokenized, responses.Status, responses.Version, ErrorBody),
)
"""Every type of a response body."""


def ref(shape: type) -> dict[str, Any]:
    """A reference to a body's schema in the OpenAPI document."""
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def answers(
    shape: type, *errors: int, chunk: type | None = None
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route in the OpenAPI document.

    Args:
        shape: the type of the body.
        errors: status codes besides `ALWAYS`.
        chunk: the type of the events, if the route can stream.
    """
    content = {JSON: {"schema": ref(shape)}}
    if chunk is not None:
        description = (
            f"A {chunk.__name__} as JSON; an ErrorBody where the engine fails; [DONE] in the end."
        )
        event = {
            "type": "object",
            "properties": {"data": {"type": "string", "description": description}},
            "required": ["data"],
        }
        content[EVENTS] = {"schema": event}
    body = {JSON: {"schema": ref(ErrorBody)}}
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": ERRORS[status], "content": body}
        for status in sorted({*ALWAYS, *errors})
    }
    return {200: {"description": "Done.", "content": content}, **described}


class StrictRoute(APIRoute):
    """A route that reads its body with `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


router = APIRouter(route_class=StrictRoute)


@router.post(
    "/v1/chat/completions",
    responses=answers(responses.ChatCompletion, *READS, *RUNS, chunk=responses.ChatChunk),
)
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, as one body or as a stream."""
    server = the_server(request)
    server.accept(body)
    family = family_of(server.prompts.template_for(tools=True)) if body.tools_in_use else None
    ids = await server.prompts.in_thread(body.encoder(server.prompts))
    if family is not None and family.special:
        body = body.model_copy(update={"skip_special_tokens": False})
    job = admit(request, body, [ids])
    return await respond(request, ChatAnswer(job, body, server.prompts, family), bool(body.stream))


@router.post(
    "/v1/completions",
    responses=answers(responses.Completion, *READS, *RUNS, chunk=responses.Completion),
)
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Complete one prompt or several, as one body or as a stream."""
    server = the_server(request)
    server.accept(body)
    text = server.prompts.text
    prompts = await server.prompts.in_thread(
        lambda: [text(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    )
    job = admit(request, body, prompts)
    return await respond(
        request, CompletionAnswer(job, body, server.prompts, prompts), bool(body.stream)
    )


@router.get("/v1/models", responses=answers(responses.ModelList))
async def list_models(request: Request) -> Response:
    """List the names that a request can give as `model`."""
    server = the_server(request)
    return as_json(responses.ModelList([_card(server, name) for name in server.targets]))


@router.get("/v1/models/{id:path}", responses=answers(responses.ModelCard, 404))
async def get_model(request: Request, id: str) -> Response:
    """Describe one model; 404 if it is not served."""
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
        text, special = body.prompt, body.add_special_tokens
        ids = await prompts.in_thread(lambda: prompts.text(text, special))
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


adapter_router = APIRouter(route_class=StrictRoute)
"""The routes of a server that loads adapters at run time."""
SENTENCE: dict[int | str, dict[str, Any]] = {
    200: {"description": "Done.", "content": {"text/plain": {}}}
}


@adapter_router.post(
    "/v1/load_lora_adapter", responses=answers(responses.Status, *READS, 403, 503) | SENTENCE
)
async def load_lora_adapter(request: Request, body: adapters.LoadRequest) -> Response:
    """Load an adapter from a directory that was named at the start."""
    answer = await adapters.load(the_server(request), body)
    request.app.openapi_schema = None  # it lists the models
    return answer


@adapter_router.post(
    "/v1/unload_lora_adapter", responses=answers(responses.Status, *READS, 404, 503) | SENTENCE
)
async def unload_lora_adapter(request: Request, body: adapters.UnloadRequest) -> Response:
    """Take an adapter's name away; requests that run with it end with it."""
    answer = await adapters.unload(the_server(request), body)
    request.app.openapi_schema = None
    return answer


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
            for name in ("ChatRequest", "CompletionRequest"):
                schemas[name]["properties"]["model"]["enum"] = list(self.state.server.targets)
            self.openapi_schema = document
        return self.openapi_schema


def create_app(config: ServeConfig, client: EngineClient, prompts: Prompts) -> FastAPI:
    """The ASGI application. The caller starts, drains and stops the engine."""
    app = App(
        title="idlm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    meters = Meters(client, config.name if config.vllm_metrics else None)
    app.state.server = Server(config, client, prompts, meters)
    app.include_router(router)
    if config.worker.lora_dirs:
        app.include_router(adapter_router)
    app.add_middleware(AuthAndLimits, api_keys=config.api_keys, limits=config.limits)
    app.add_middleware(AccessLog, meters=meters)  # the last one added is the outermost
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    for kind in Expected:
        app.add_exception_handler(kind, _expected)
    return app


async def _expected(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        return ApiError(
            415, "the body is not application/json; send the header Content-Type"
        ).response()
    return validation_error(error.errors()).response()
