"""`create_app`: routes, guard and log put together, and every failure made an OpenAI error body."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi

from idlm import __version__
from idlm.serving.client import EngineClient
from idlm.serving.config import ServeConfig
from idlm.serving.errors import ApiError, Expected, as_api_error
from idlm.serving.guard import Guard
from idlm.serving.logs import AccessLog
from idlm.serving.metrics import Meters
from idlm.serving.prompts import Prompts
from idlm.serving.routes import components, router
from idlm.serving.state import Server
from idlm.serving.strict import validation_error


class App(FastAPI):
    """FastAPI, with our bodies in its document."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the models there are, and without FastAPI's 422, which is never sent."""
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
    """The server's application; the engine is started, stopped and drained by the caller."""
    app = App(title="idlm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    meters = Meters(client)
    app.state.server = Server(config, client, prompts, meters)
    app.include_router(router)
    app.add_middleware(Guard, api_keys=config.api_keys, limits=config.limits)
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
        return ApiError(415, "the body is not application/json; send the header Content-Type").response()
    return validation_error(error.errors()).response()
