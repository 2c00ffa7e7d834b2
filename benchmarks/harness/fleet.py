"""`Fleet`: replicas of one model behind a router, the SGLang Model Gateway (`smg`)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.harness.client import Answer
from benchmarks.harness.process import HANG_SECONDS, ServerProcess, free_port, idlm_serve
from benchmarks.harness.workload import CHAT, COMPLETIONS, Asked, as_chat, bodies

SMG = Path("build/integrations/router/bin/smg")
"""Where `make integrations` installs it."""
PROBES = (
    *("--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"),
    *("--worker-startup-check-interval", "1"),
)
"""A replica whose engine is lost answers /health, and only /ready says that it takes nothing."""


class Fleet:
    """Replicas with a thread each and the router before them, all of them ready inside `with`.

    Args:
        smg: the router's program.
        model, replicas, options: what is served, how often, and more options of `idlm serve`.
        policy: the router's.
    """

    def __init__(
        self,
        smg: Path,
        model: str,
        replicas: int,
        options: Sequence[str] = (),
        policy: str = "cache_aware",
    ) -> None:
        command = idlm_serve(model, "--name", model, "--threads", "1", *options)
        self.replicas = [ServerProcess(command) for _ in range(replicas)]
        urls = [f"http://127.0.0.1:{replica.port}" for replica in self.replicas]
        launch = [str(smg), "launch", "--host", "127.0.0.1", "--log-level", "warn"]
        launch += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        launch += [*PROBES, "--policy", policy, "--worker-urls", *urls]
        self.router = ServerProcess(launch, ready="/readiness")
        self._started = ExitStack()

    def __enter__(self) -> Fleet:
        with ExitStack() as started:
            for replica in self.replicas:
                started.enter_context(replica)
            started.enter_context(self.router)
            for replica in self.replicas:
                self.wait_seen(replica)
            self._started = started.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._started.close()

    def wait_seen(self, replica: ServerProcess) -> None:
        """Wait until the router sends requests to a replica.

        Raises:
            RuntimeError: it did not in time; the message holds the end of the router's log.
        """
        until = time.monotonic() + HANG_SECONDS
        while not self._sees(replica):
            if time.monotonic() > until:
                raise RuntimeError(f"the router sees no replica:\n{self.router.log_end()}")
            time.sleep(0.1)

    def _sees(self, replica: ServerProcess) -> bool:
        status, body = self.router.get("/workers")
        workers = json.loads(body)["workers"] if status == 200 else []
        url = f"http://127.0.0.1:{replica.port}"
        return any(worker["url"] == url and worker["is_healthy"] for worker in workers)


def requests(model: str, count: int, tokens: int, seed: int, stream: bool = True) -> list[Asked]:
    """Word problems to completions and to chat in turn."""
    made = bodies(model, count, tokens, seed, stream=stream)
    return [
        (CHAT, as_chat(body)) if place % 2 else (COMPLETIONS, body)
        for place, body in enumerate(made)
    ]


def said(answer: Answer) -> str:
    """The text of an answer of completions or chat, whole or streamed, as far as it came."""
    parts = answer.events() if answer.streamed else [answer.json()]
    choices = [choice for part in parts for choice in part.get("choices", ())]
    words = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    return "".join(
        choice.get("text") or word.get("content") or ""
        for choice, word in zip(choices, words, strict=True)
    )


def doubled(answer: Answer) -> bool:
    """Whether more than one answer is in a stream: other ids, two ends, a second [DONE]."""
    events = answer.events() if answer.streamed else []
    ids = {event["id"] for event in events if "id" in event}
    ends = [c for event in events for c in event.get("choices", ()) if c["finish_reason"]]
    return len(ids) > 1 or len(ends) > 1 or answer.body.count(b"data: [DONE]") > 1
