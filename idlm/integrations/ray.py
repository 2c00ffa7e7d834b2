"""`app`: the server as an application of Ray Serve.

    serve run idlm.integrations.ray:app model=nano
    serve deploy deploy/ray.yaml

Each replica is a whole server, with an engine in a process of its own; Ray's proxies are the HTTP
server, and its controller starts, checks and scales the replicas. The routes are those of
`idlm serve`. A client that leaves ends its samples: Ray passes its disconnect on.

Ray's PrefixCacheAffinityRouter reads the arguments of calls between deployments and not the bodies
of HTTP requests, so requests here are spread by Ray's own choice, the shorter of two queues.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from idlm.config import EngineConfig
from idlm.errors import InputError
from idlm.serving.app import create_app
from idlm.serving.client import EngineClient
from idlm.serving.config import WAITING_ROOM, Limits, ServeConfig, WorkerConfig
from idlm.serving.errors import EngineDown
from idlm.serving.prompts import Prompts

START_SECONDS = 3600.0
"""As `idlm serve`: a large model takes long to load, and longer to download."""
OPTIONS = ("model", "name", "adapters", "dtype", "device", "api_keys", "engine")
"""Arguments of the application; `engine` has those of `EngineConfig`."""


def configured(args: dict[str, Any]) -> ServeConfig:
    """The configuration of a replica.

    Raises:
        InputError: an argument is not known, or the model is missing.
    """
    unknown = sorted(set(args) - set(OPTIONS))
    if unknown or not args.get("model"):
        wrong = f"{unknown[0]!r} is no argument" if unknown else "there is no model"
        raise InputError(f"{wrong}; use model and, if needed, {', '.join(OPTIONS[1:])}")
    given: dict[str, Any] = {"stride": 4, "branches": "planner"} | dict(args.get("engine") or {})
    try:
        engine = EngineConfig(**given)
    except TypeError as error:
        raise InputError(f"engine: {error}; its options are those of EngineConfig") from None
    places = {name: args[name] for name in ("dtype", "device") if name in args}
    worker = WorkerConfig(args["model"], dict(args.get("adapters") or {}), engine=engine, **places)
    limits = Limits(queue_requests=max(WAITING_ROOM * engine.max_num_seqs, Limits().n))
    keys = tuple(args.get("api_keys") or ())
    return ServeConfig(worker, args.get("name") or args["model"], api_keys=keys, limits=limits)


@serve.deployment
@serve.ingress()
class Replica:
    """An engine and the server's routes.

    Raises:
        InputError: the model cannot be served as configured.
    """

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        self._config = configured(args)
        worker = self._config.worker
        self._prompts = Prompts.load(worker.model, worker.engine.max_model_len)
        self._client = EngineClient(worker, self._config.limits)
        await self._client.start()
        await self._client.wait_ready(START_SECONDS)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes; Ray asks for them once the engine is ready."""
        return create_app(self._config, self._client, self._prompts)

    async def check_health(self) -> None:
        """Ray replaces a replica whose engine stays away.

        Raises:
            EngineDown: the engine takes no requests now.
        """
        if not self._client.ready:
            raise EngineDown("the engine is not running")

    async def __del__(self) -> None:
        """Ray lets requests end before; then the engine's process ends."""
        await self._client.close()


def app(args: dict[str, Any]) -> serve.Application:
    """The application, from the arguments of `serve run` or of a configuration file.

    Raises:
        InputError: an argument is not known, or the model is missing.
    """
    configured(args)  # what is wrong is said before a replica is made
    deployment: Any = Replica
    return deployment.bind(args)
