"""`serve`: the socket, the HTTP server and the engine, until a signal ends them."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
import uvloop

from idlm.errors import InputError
from idlm.serving import observe
from idlm.serving.app import create_app
from idlm.serving.client import EngineClient
from idlm.serving.config import Limits, ServeConfig
from idlm.serving.errors import EngineDown
from idlm.serving.limits import Connection
from idlm.serving.prompts import Prompts

BACKLOG = 2048
MOST_CONNECTIONS = 4096
KEEP_ALIVE_SECONDS = 60
START_SECONDS = 3600.0
"""A large model takes long to load, and longer to download."""
GRACE_SECONDS = 5
"""After the drain: time for clients to read the last bytes."""


def serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until a signal; `announce` is called with the URL once the engine is ready.

    The first SIGTERM or SIGINT drains the server, the second ends it at once.

    Raises:
        InputError: the address is not available, or the model cannot be served as configured.
    """
    with (
        bind(config.host, config.port) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(config, listener, announce))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free port.

    Raises:
        InputError: the address is in use or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host} port {port}: {reason}; give another --host or --port"
        ) from None


async def _serve(
    config: ServeConfig, listener: socket.socket, announce: Callable[[str], None]
) -> None:
    prompts = Prompts.load(config.worker.model, config.worker.engine.max_model_len)
    observe.configure()
    client = EngineClient(config.worker, config.limits)
    server = HttpServer(config, client, prompts)
    starting = asyncio.create_task(
        _start(client, server, lambda: announce(url(config.host, listener)))
    )
    try:
        await server.serve(sockets=[listener])
        if starting.done():
            starting.result()  # raises the engine's error, if that ended the server
    finally:
        starting.cancel()
        await client.close()


def url(host: str, listener: socket.socket) -> str:
    """The base URL of the API."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"


async def _start(client: EngineClient, server: HttpServer, announce: Callable[[], None]) -> None:
    """Start the engine while the HTTP server already runs and answers that it is not ready."""
    try:
        await client.start()
        await client.wait_ready(START_SECONDS)
        gc.collect()
        gc.freeze()  # these objects stay; a collection that visits them would delay all streams
        announce()
    except (InputError, EngineDown) as error:
        server.should_exit = True
        raise InputError(str(error)) from error


def _connection(limits: Limits) -> Callable[..., Connection]:
    return partial(
        Connection,
        header_seconds=limits.header_seconds,
        stall_seconds=limits.body_seconds,
        most=MOST_CONNECTIONS,
    )


class HttpServer(uvicorn.Server):
    """uvicorn's server; its shutdown drains the engine."""

    def __init__(self, config: ServeConfig, client: EngineClient, prompts: Prompts) -> None:
        limits = config.limits
        super().__init__(
            uvicorn.Config(
                create_app(config, client, prompts),
                http=_connection(limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(limits.drain_seconds) + GRACE_SECONDS,
            )
        )
        self._client, self._drain_seconds = client, limits.drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server after the drain, the second at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections and samples, wait for the running ones, and close."""
        draining = asyncio.create_task(self._client.drain(self._drain_seconds))
        await super().shutdown(sockets)
        draining.cancel()
