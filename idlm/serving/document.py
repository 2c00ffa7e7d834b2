"""How routes describe themselves in the OpenAPI document, and how they read a body."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from idlm.serving.errors import ErrorBody
from idlm.serving.strict import StrictRequest

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


def ref(shape: type) -> dict[str, Any]:
    """A reference to a body's schema in the OpenAPI document."""
    return {"$ref": f"#/components/schemas/{shape.__name__}"}


def answers(
    shape: type,
    *errors: int,
    chunk: type | None = None,
    events: Sequence[type] = (),
    error: type = ErrorBody,
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route in the OpenAPI document.

    Args:
        shape: the type of the body.
        errors: status codes besides `ALWAYS`.
        chunk: the type of the events, if the route can stream and [DONE] ends the stream.
        events: the types of the events, if they have names.
        error: the type of the body of a failed request.
    """
    content = {JSON: {"schema": ref(shape)}}
    if chunk is not None:
        content[EVENTS] = _stream(
            f"A {chunk.__name__} as JSON; an ErrorBody where the engine fails; [DONE] in the end."
        )
    elif events:
        names = ", ".join(one.__name__ for one in events)
        content[EVENTS] = _stream(f"One of {names} as JSON, whose type is the event's name.")
    body = {JSON: {"schema": ref(error)}}
    described: dict[int | str, dict[str, Any]] = {
        status: {"description": ERRORS[status], "content": body}
        for status in sorted({*ALWAYS, *errors})
    }
    return {200: {"description": "Done.", "content": content}, **described}


def _stream(description: str) -> dict[str, Any]:
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": description}},
        "required": ["data"],
    }
    return {"schema": event}


class StrictRoute(APIRoute):
    """A route that reads its body with `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def strict_router() -> APIRouter:
    """A router whose routes read their bodies strictly."""
    return APIRouter(route_class=StrictRoute)
