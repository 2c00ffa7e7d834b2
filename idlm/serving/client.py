"""`EngineClient`: the server's side of the engine process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from idlm.serving.config import EngineConfig, Limits
from idlm.serving.messages import Delta, Finished, Ready, Stats, Submit


class Busy(Exception):
    """The queue is full; `retry_after` says in how many whole seconds (at least 1) it may have room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineDown(Exception):
    """There is no engine now; the message says why."""


class Ticket:
    """One sample that is with the engine."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """What the engine says of it, as it comes; ends after `Finished`.

        Raises:
            EngineDown: the engine is gone. InputError: it refused the sample.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """End the sample; any number of times, also after its end. Its share of the queue is free once it has ended."""
        raise NotImplementedError


class EngineClient:
    """Starts the engine's process, starts it again when it dies, and gives it samples to run."""

    def __init__(self, config: EngineConfig, limits: Limits) -> None:
        self.config, self.limits = config, limits
        self.ready = False
        self.info: Ready | None = None
        self.stats = Stats()
        self.restarts = 0
        self.running = 0
        self.queued_tokens = 0

    async def start(self) -> None:
        """Start the engine's process; it is ready some time later."""
        raise NotImplementedError

    async def wait_ready(self, timeout: float) -> Ready:
        """Wait for the engine, so many seconds at most.

        Raises:
            InputError: it cannot start as configured. EngineDown: it was not ready in time.
        """
        raise NotImplementedError

    async def drain(self, seconds: float) -> None:
        """Take no more samples and wait for those there are; what is left after so many seconds is aborted."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the engine's process."""
        raise NotImplementedError

    def submit(self, submits: Sequence[Submit]) -> list[Ticket]:
        """Give the engine all samples of one request, or none.

        Raises:
            Busy: the queue has no room for them. EngineDown: there is no engine. Neither is waited for.
            InputError: they are more than the queue ever takes, or hold a number or text that cannot be sent.
        """
        raise NotImplementedError
