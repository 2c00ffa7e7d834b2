"""`EngineClient`: the server's side of the engine process; `Ticket`: one sample that is with it.

The socket is always read, and what comes goes to the tickets at once: a slow reader of one ticket
holds up neither the engine nor another ticket. What gathers in a ticket is bounded by its sample's
max_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from msgspec.structs import replace

from idlm.chat_template import check_ids
from idlm.errors import InputError
from idlm.serving.config import Limits, WorkerConfig
from idlm.serving.errors import EngineDown
from idlm.serving.limits import Quota
from idlm.serving.supervisor import Supervisor
from idlm.serving.wire import (
    Abort,
    Delta,
    Finished,
    FrameError,
    FromEngine,
    Ready,
    Refused,
    Stats,
    Submit,
    frame,
)

GUARD_SECONDS = 5.0
"""What a sample's own timeout, which the engine keeps, may be overdrawn by before its reader is
told."""


class Ticket:
    """One sample that is with the engine, for one reader.

    Args:
        tokens: its share of the queue.
        abort: called to end it.
    """

    def __init__(self, id: str, tokens: int, abort: Callable[[str], None]) -> None:
        self.id, self.tokens = id, tokens
        self._abort: Callable[[str], None] | None = abort
        self._items: asyncio.Queue[Delta | Finished | Exception] = asyncio.Queue()
        self._read = False

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        return self

    async def __anext__(self) -> Delta | Finished:
        """What the engine says of it next; `Finished` is the last.

        Raises:
            EngineDown: the engine is gone. InputError: it refused the sample.
        """
        if self._read:
            raise StopAsyncIteration
        item = await self._items.get()
        self._read = not isinstance(item, Delta)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """End it; any number of times, also after its end. Its share of the queue is free once the
        engine is done."""
        if self._abort is not None:
            self._abort(self.id)
        self._abort = None

    def put(self, item: Delta | Finished | Exception) -> None:
        """Hand its reader something; anything but a `Delta` is the last it reads."""
        self._items.put_nowait(item)


class EngineClient:
    """Starts the engine's process, starts it again when it dies, and gives it samples to run.

    Attributes:
        info: what the engine said of itself; None before it was ready for the first time.
        stats: its counters; they begin anew with each process.
        restarts: processes that were lost, each followed by another; changes together with `stats`.
        quota: the samples that are with the engine, running or waiting.
    """

    def __init__(self, config: WorkerConfig, limits: Limits) -> None:
        self.config, self.limits = config, limits
        self.info: Ready | None = None
        self.stats = Stats()
        self.restarts = 0
        self.quota = Quota(limits)
        self._supervisor = Supervisor(config, self._receive, self._lose)
        self._supervising: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._draining = False
        self._tickets: dict[str, tuple[Ticket, asyncio.TimerHandle]] = {}

    @property
    def ready(self) -> bool:
        """Whether there is an engine that takes samples."""
        return self._up.is_set() and not self._draining

    async def start(self) -> None:
        """Start the engine's process; `wait_ready` tells when it is there."""
        self._supervising = asyncio.create_task(self._supervisor.run())

    async def wait_ready(self, timeout: float) -> Ready:
        """Wait for the engine, so many seconds at most; after `start`.

        Raises:
            InputError: it cannot start as configured. EngineDown: it was not ready in time.
        """
        if self._supervising is None:
            raise RuntimeError("wait_ready before start")
        up = asyncio.ensure_future(self._up.wait())
        try:
            await asyncio.wait(
                {up, self._supervising}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            up.cancel()
        if self._supervising.done() and not self._supervising.cancelled():
            self._supervising.result()
        if self.info is None or not self._up.is_set():
            raise EngineDown(f"the engine was not ready within {timeout:g} s")
        return self.info

    async def drain(self, seconds: float) -> None:
        """Take no more samples and wait for those there are; after so many seconds the rest raise
        `EngineDown`."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._tickets and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for ticket, _ in list(self._tickets.values()):
            ticket.cancel()
            ticket.put(self._down())

    async def close(self) -> None:
        """End the engine's process; samples still with it raise `EngineDown`."""
        self._draining = True
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)

    def submit(self, submits: Sequence[Submit]) -> list[Ticket]:
        """Give the engine all samples of one request, or none; a ticket for each, in order.

        Each runs for `limits.timeout` at most. Prompts and token ids are checked here, for the
        engine too.

        Raises:
            Busy: the queue has no room for them. EngineDown: there is no engine. Neither is waited
                for.
            InputError: they are more than the queue ever takes, or hold what the model does not
                take.
        """
        if not self.ready or self.info is None:
            raise self._down()
        submits = [self._checked(one, self.info) for one in submits]
        frames = [_frame(one) for one in submits]
        tokens = [_tokens(one, self.info.context) for one in submits]
        self.quota.take(len(submits), sum(tokens))
        tickets = [self._register(one, share) for one, share in zip(submits, tokens, strict=True)]
        self._supervisor.send(b"".join(frames))
        return tickets

    def _checked(self, submit: Submit, model: Ready) -> Submit:
        """The sample with the time that it has."""
        check_ids(submit.prompt, model)
        submit.params.check_vocabulary(model.vocab_size)
        if submit.timeout is None:
            return replace(submit, timeout=self.limits.timeout)
        if not submit.timeout > 0:  # NaN neither
            raise InputError(f"timeout={submit.timeout}; give seconds, more than 0")
        return replace(submit, timeout=min(submit.timeout, self.limits.timeout))

    def _register(self, submit: Submit, tokens: int) -> Ticket:
        ticket = Ticket(submit.id, tokens, self._abort)
        loop = asyncio.get_running_loop()
        guard = loop.call_later((submit.timeout or 0) + GUARD_SECONDS, self._overdue, ticket)
        self._tickets[submit.id] = ticket, guard
        return ticket

    def _abort(self, id: str) -> None:
        if id in self._tickets:
            self._supervisor.send(frame([Abort(id)]))

    def _overdue(self, ticket: Ticket) -> None:
        """The engine should have ended it by itself."""
        ticket.cancel()
        ticket.put(EngineDown("the engine did not answer within the request's timeout"))

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Delta):
            if message.id in self._tickets:
                self._tickets[message.id][0].put(message)
        elif isinstance(message, Finished):
            self._settle(message.id, message)
        elif isinstance(message, Refused):
            self._settle(message.id, InputError(message.reason))
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Ready):
            self.info = message
            self._up.set()

    def _settle(self, id: str, end: Finished | Exception) -> None:
        """A sample is no longer with the engine."""
        if id in self._tickets:
            ticket, guard = self._tickets.pop(id)
            guard.cancel()
            self.quota.give_back(ticket.tokens)
            ticket.put(end)

    def _lose(self) -> None:
        """The process is gone, and with it all that it ran."""
        self._up.clear()
        self.stats = Stats()
        self.restarts += not self._draining
        for id in list(self._tickets):
            self._settle(id, self._down())

    def _down(self) -> EngineDown:
        if self._draining:
            return EngineDown("the server is shutting down")
        return EngineDown("the engine is not running; it is being started, try again soon")


def _tokens(submit: Submit, context: int) -> int:
    """The most tokens the sample's text may come to have, as far as the engine lets it grow."""
    return min(len(submit.prompt) + submit.params.max_tokens, context)


def _frame(submit: Submit) -> bytes:
    try:
        return frame([submit])
    except FrameError as error:
        raise InputError(f"the request {error}") from None
