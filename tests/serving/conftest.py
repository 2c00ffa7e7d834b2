"""One real server for all tests of this folder: uvicorn in a thread, the engine in its process, a bundled model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2 as httpx
import pytest
import uvloop

from idlm import LLM
from idlm.models.sources import WEIGHTS
from idlm.serving.client import EngineClient
from idlm.serving.config import EngineConfig, Limits, ServeConfig
from idlm.serving.prompts import Prompts
from idlm.serving.server import HttpServer, bind, url

KEY = "a-key"
ADAPTER = str(WEIGHTS / "lora")
CONFIG = ServeConfig(
    EngineConfig(
        "nano-base", {"math": ADAPTER}, branches="all", dtype="float64", max_num_seqs=8, threads=1, kv_memory="64MiB"
    ),
    name="nano",
    port=0,
    api_keys=("another-key", KEY),
    limits=Limits(queue_requests=64, header_seconds=1.0, body_seconds=1.0, timeout=120.0, n=4, prompts=4),
)


@dataclass
class Running:
    """A server, where it is, and what it is made of."""

    url: str
    port: int
    http: HttpServer
    client: EngineClient

    def open(self, key: str | None = KEY) -> httpx.Client:
        """A plain HTTP client for it."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url.removesuffix("/v1"), headers=headers, timeout=60)


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    found: list[Running] = []
    started = threading.Event()

    async def main() -> None:
        with bind(CONFIG.host, 0) as listener:
            client = EngineClient(CONFIG.engine, CONFIG.limits)
            http = HttpServer(CONFIG, client, Prompts.load(CONFIG.engine.model))
            await client.start()
            found.append(Running(url(CONFIG.host, listener), listener.getsockname()[1], http, client))
            serving = asyncio.create_task(http.serve(sockets=[listener]))
            await client.wait_ready(120)
            started.set()
            await serving
            await client.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(180)
    yield found[0]
    found[0].http.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def http(served: Running) -> Iterator[httpx.Client]:
    with served.open() as client:
        yield client


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The same model offline, decoding without drafts."""
    return LLM("nano-base", stride=1, dtype="float64", max_num_seqs=4, kv_memory="32MiB")
