"""Logs: one JSON object a line on stderr. Never a prompt or an output, unless the server was told so.

`AccessLog` stands outermost: it names every request, answers what failed without an answer, and counts.
"""

from __future__ import annotations

import logging
import logging.config
import re
import secrets
from time import perf_counter
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from idlm.serving.errors import ApiError
from idlm.serving.metrics import Meters

access = logging.getLogger("idlm.serving.access")
errors = logging.getLogger("idlm.serving")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
QUIET = ("/health", "/ready", "/metrics")
"""Asked every few seconds by machines: logged only when they fail."""


class JsonLines(logging.Formatter):
    """A record as one JSON object; `extra={"facts": {..}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure() -> None:
    """Send the logs of the server, and warnings of everything else, to stderr as JSON lines."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": JsonLines}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {"idlm.serving": {"level": "INFO"}},
        }
    )


class AccessLog:
    """ASGI middleware; what routes put into `scope["state"]["facts"]` comes into the request's line."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, and write about it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, facts = perf_counter(), dict[str, Any]()
        id = _request_id(scope)
        scope.setdefault("state", {})["facts"] = facts
        answer = _Watched(send, id)
        try:
            await self.app(scope, receive, answer.send)
        except Exception:
            errors.exception("bug", extra={"facts": {"request_id": id}})
            if answer.status is not None:
                raise  # too late for an answer; the connection is closed
            await ApiError(500, "an error inside the server; its log has the details").response()(
                scope, receive, answer.send
            )
        finally:
            self._write(scope, id, answer.status or 499, perf_counter() - started, facts)

    def _write(self, scope: Scope, id: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "none")  # the pattern, or scanners would make endless labels
        self.meters.requests.labels(route, str(status)).inc()
        self.meters.request_seconds.labels(route).observe(seconds)
        if status < 400 and scope["path"] in QUIET:
            return
        line = {
            "request_id": id,
            "client": (scope.get("client") or ["?"])[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 6),
        }
        access.info("request", extra={"facts": line | facts})


def _request_id(scope: Scope) -> str:
    """The client's own X-Request-Id if it is harmless, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


class _Watched:
    """Adds the request's id to an answer and notes its status."""

    def __init__(self, send: Send, id: str) -> None:
        self._send, self._id = send, id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id.encode())]
        await self._send(message)
