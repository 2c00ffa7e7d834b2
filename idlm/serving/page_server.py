"""`show`: the playground for a server elsewhere: the page's files, and a proxy of the API.

    browser --- / and /ui/... ---> this process
            --- /v1/...       ---> this process ---> the server's API

So the other server need not allow the page's origin. The proxy passes on only paths under /v1, to
the one server that it was started for, and answers only its own page.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import httpx2 as httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from idlm.errors import InputError
from idlm.serving import page
from idlm.serving.errors import ApiError
from idlm.serving.server import bind

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
PASSED = ("authorization", "content-type", "accept")
"""Headers of a request that the other server gets."""
RETURNED = ("content-type", "retry-after", "x-request-id", "www-authenticate")
MOST_BODY = 4 * 2**20
TIMEOUT = httpx.Timeout(600.0, connect=10.0)


def base_url(url: str) -> str:
    """The base of an API, which ends with /v1 unless the URL has a path of its own.

    Raises:
        InputError: it is no URL of a server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(
            f"--url {url!r} is no URL of a server; write for example http://127.0.0.1:8000/v1"
        )
    return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")


def create_app(base: str, port: int) -> FastAPI:
    """The application: it answers pages of `port` on this machine with the API at `base`."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    client = httpx.AsyncClient(timeout=TIMEOUT)
    app.include_router(page.router)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST"])
    async def proxy(request: Request, path: str) -> Response:
        try:
            _check_origin(request, port)
            return await _passed_on(client, request, f"{base}/{path}")
        except ApiError as error:
            return error.response(request.scope["path"])

    return app


def _check_origin(request: Request, port: int) -> None:
    """Refuse requests of other pages, also of those that have made their name point here.

    Raises:
        ApiError: 403.
    """
    own = {f"{name}:{port}" for name in NAMES}
    origin = request.headers.get("origin")
    if request.headers.get("host") not in own or (
        origin is not None and origin.removeprefix("http://") not in own
    ):
        raise ApiError(403, "this proxy answers its own page only")


async def _passed_on(client: httpx.AsyncClient, request: Request, url: str) -> Response:
    """Send a request on; its response comes back as it arrives.

    Raises:
        ApiError: 413: the body is too large. 502: the other server cannot be reached.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise ApiError(413, f"the body is larger than {MOST_BODY} bytes; send less")
    headers = {name: request.headers[name] for name in PASSED if name in request.headers}
    made = client.build_request(request.method, url, content=body, headers=headers)
    try:
        answer = await client.send(made, stream=True)
    except httpx.HTTPError as error:
        raise ApiError(502, f"cannot reach {url}: {error or type(error).__name__}") from None
    kept = {name: answer.headers[name] for name in RETURNED if name in answer.headers}
    closing = BackgroundTask(answer.aclose)
    return StreamingResponse(_parts(answer), answer.status_code, kept, background=closing)


async def _parts(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The bytes of a response as they come; a page that leaves closes the other connection."""
    try:
        async for part in answer.aiter_bytes():
            yield part
    finally:
        await answer.aclose()


def show(url: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page for the API at `url` until a signal; `announce` gets the page's URL.

    Raises:
        InputError: the URL or the port cannot be used.
    """
    base = base_url(url)
    with bind(HOST, port) as listener:
        taken = listener.getsockname()[1]
        config = uvicorn.Config(
            create_app(base, taken),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        announce(f"http://{HOST}:{taken}/")
        uvicorn.Server(config).run(sockets=[listener])
