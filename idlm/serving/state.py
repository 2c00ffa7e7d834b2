"""`Server`: what every route needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from time import time

from fastapi import Request

from idlm import __version__
from idlm.serving.client import EngineClient, EngineDown
from idlm.serving.config import AR_SUFFIX, ServeConfig
from idlm.serving.errors import ApiError
from idlm.serving.messages import Ready
from idlm.serving.metrics import Meters
from idlm.serving.prompts import Prompts
from idlm.serving.protocol import Generation


@dataclass(frozen=True)
class Target:
    """Who answers a request: an adapter by name (None: the engine's first), with or without drafts."""

    adapter: str | None = None
    drafting: bool = True


@dataclass
class Server:
    """The parts of a server.

    Attributes:
        started: when, in seconds of the epoch.
    """

    config: ServeConfig
    client: EngineClient
    prompts: Prompts
    meters: Meters
    started: int = field(default_factory=lambda: int(time()))

    @property
    def targets(self) -> dict[str, Target]:
        """What a request can name as its model."""
        name = self.config.name
        adapters = {one: Target(one) for one in self.config.engine.adapters}
        return {name: Target(), name + AR_SUFFIX: Target(drafting=False)} | adapters

    @property
    def fingerprint(self) -> str:
        """Changes when anything does that may change an output."""
        digest = hashlib.blake2b(repr((__version__, self.config.engine)).encode(), digest_size=6)
        return f"idlm-{digest.hexdigest()}"

    def target(self, model: str) -> Target:
        """Who answers for this name.

        Raises:
            ApiError: 404: nobody does.
        """
        if model not in self.targets:
            names = ", ".join(self.targets)
            raise ApiError(404, f"model {model[:80]!r} is not served here; use {names}", "model", "model_not_found")
        return self.targets[model]

    def accept(self, body: Generation) -> Ready:
        """Look at what a request asks for before anything is done for it; returns what the engine said of itself.

        Raises:
            ApiError: nobody answers for its model, or it is out of bounds. EngineDown, Busy: there is no engine, or no
                room.
        """
        self.target(body.model)
        body.check(self.config.limits)
        engine = self.engine()
        self.client.check_room()
        return engine

    def engine(self) -> Ready:
        """What the engine said of itself.

        Raises:
            EngineDown: it is not there.
        """
        if self.client.info is None:
            raise EngineDown("the engine is starting; try again soon")
        if not self.client.ready:
            raise EngineDown("the engine is being started again, or the server is shutting down; try again soon")
        return self.client.info


def the_server(request: Request) -> Server:
    """The server that a request came to."""
    server: Server = request.app.state.server
    return server
