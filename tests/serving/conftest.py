"""One real server for all tests of this folder: uvicorn in a thread, the engine in its process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2 as httpx
import psutil
import pytest

from idlm import LLM
from idlm.config import EngineConfig
from idlm.models.sources import WEIGHTS
from idlm.serving import client as client_module
from idlm.serving import supervisor
from idlm.serving.client import EngineClient
from idlm.serving.config import Limits, ServeConfig, WorkerConfig
from idlm.serving.prompts import Prompts
from idlm.serving.server import HttpServer, bind, url
from tests.serving.clock import Clock
from tests.waiting import HANG_SECONDS, wait_until

SECONDS = 300.0
"""For headers and bodies."""
STALL_SECONDS = 3600.0
KEY = "a-key"
ADAPTER = str(WEIGHTS / "lora")
CONFIG = ServeConfig(
    WorkerConfig(
        "nano-base",
        {"math": ADAPTER},
        dtype="float64",
        engine=EngineConfig(branches="all", max_num_seqs=8, threads=1, kv_memory="64MiB"),
    ),
    name="nano",
    port=0,
    api_keys=("another-key", KEY),
    limits=Limits(
        queue_requests=64,
        header_seconds=SECONDS,
        body_seconds=SECONDS,
        timeout=HANG_SECONDS,
        n=4,
        prompts=4,
    ),
    vllm_metrics=True,
)


@dataclass
class Running:
    """A server with its address and its parts."""

    url: str
    port: int
    http: HttpServer
    client: EngineClient
    loop: Clock
    worker: psutil.Process | None = None

    def open(self, key: str | None = KEY) -> httpx.Client:
        """A plain HTTP client for it."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=self.url.removesuffix("/v1"), headers=headers, timeout=HANG_SECONDS
        )


def workers() -> list[psutil.Process]:
    """The engine processes of this process, the newest last; another server's may be among them."""
    children = psutil.Process().children()
    found = [child for child in children if "idlm.serving.worker" in child.cmdline()]
    return sorted(found, key=psutil.Process.create_time)


@contextmanager
def held(process: psutil.Process | None) -> Iterator[None]:
    """Pause an engine process, so that it sends nothing while the test needs it."""
    assert process is not None
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def running(prompts: Prompts, engine: bool, config: ServeConfig = CONFIG) -> Iterator[Running]:
    """A server in a thread; without an engine only routes such as /health succeed."""
    found: list[Running] = []
    started = threading.Event()

    async def main() -> None:
        with bind(config.host, 0) as listener:
            client = EngineClient(config.worker, config.limits)
            http = HttpServer(config, client, prompts)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, Clock)
            found.append(
                Running(url(config.host, listener), listener.getsockname()[1], http, client, loop)
            )
            if engine:
                await client.start()
            serving = asyncio.create_task(http.serve(sockets=[listener]))
            if engine:
                await client.wait_ready(HANG_SECONDS)
                found[0].worker = workers()[-1]
            started.set()
            await serving
            await client.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=Clock) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: started.is_set() or not thread.is_alive())
    assert started.is_set()
    yield found[0]
    found[0].http.should_exit = True
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


@pytest.fixture(scope="session", autouse=True)
def patience() -> Iterator[None]:
    """The engine of a busy machine may be slow; tests of these bounds move the clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "GUARD_SECONDS", HANG_SECONDS)
        patch.setattr(supervisor, "STALL_SECONDS", STALL_SECONDS)
        yield


@pytest.fixture(scope="session")
def served() -> Iterator[Running]:
    with running(Prompts.load(CONFIG.worker.model), engine=True) as server:
        yield server


@pytest.fixture(scope="session")
def engineless() -> Iterator[Running]:
    """A server whose clock can be put forward without effect on an engine's samples."""
    with running(Prompts(None, "none", 16), engine=False) as server:
        yield server


@pytest.fixture
def http(served: Running) -> Iterator[httpx.Client]:
    with served.open() as client:
        yield client


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The same model offline, without drafts."""
    return LLM("nano-base", stride=1, dtype="float64", max_num_seqs=4, kv_memory="32MiB")
