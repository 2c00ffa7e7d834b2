"""`EngineClient`: the engine process as the server sees it; `Ticket`: a sample in that process.

The socket is always read and every message goes to its ticket at once, so a slow reader of one
ticket delays neither the engine nor another ticket. A ticket holds at most its sample's max_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace as replace_config

from msgspec.structs import replace

from idlm.chat_template import check_ids
from idlm.errors import InputError
from idlm.serving.config import Limits, WorkerConfig
from idlm.serving.errors import EngineDown
from idlm.serving.limits import Quota
from idlm.serving.supervisor import Supervisor
from idlm.serving.wire import (
    Abort,
    Changed,
    Delta,
    Finished,
    FrameError,
    FromEngine,
    LoadAdapter,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    UnloadAdapter,
    frame,
)

GUARD_SECONDS = 5.0
"""How long after a sample's timeout, which the engine enforces, the ticket fails by itself."""


class Ticket:
    """A sample in the engine process, with one reader.

    Args:
        tokens: what it takes of the quota.
        abort: called with the id to abort the sample.
    """

    def __init__(self, id: str, tokens: int, abort: Callable[[str], None]) -> None:
        self.id, self.tokens = id, tokens
        self._abort: Callable[[str], None] | None = abort
        self._items: asyncio.Queue[Delta | Finished | Exception] = asyncio.Queue()
        self._read = False

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        return self

    async def __anext__(self) -> Delta | Finished:
        """The next event; `Finished` is the last.

        Raises:
            EngineDown: the engine process ended. InputError: the engine refused the sample.
        """
        if self._read:
            raise StopAsyncIteration
        item = await self._items.get()
        self._read = not isinstance(item, Delta)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """Abort the sample; may be called again, and after its end.

        Its share of the quota is free once the engine confirms.
        """
        if self._abort is not None:
            self._abort(self.id)
        self._abort = None

    def put(self, item: Delta | Finished | Exception) -> None:
        """Queue an event for the reader; anything but a `Delta` is the last."""
        self._items.put_nowait(item)


class EngineClient:
    """Starts and restarts the engine process, and submits samples to it.

    Attributes:
        info: what the engine reports when it is ready; None before it was ready for the first time.
        stats: the engine's counters; they restart at zero with each process.
        restarts: how many processes were lost; changes together with `stats`.
        quota: the samples in the engine, running or waiting.
        adapters: the engine's adapters, by name.
    """

    def __init__(self, config: WorkerConfig, limits: Limits) -> None:
        self.config, self.limits = config, limits
        self.info: Ready | None = None
        self.stats = Stats()
        self.restarts = 0
        self.quota = Quota(limits)
        self.adapters: dict[str, str] = dict(config.adapters)
        self._changes: dict[str, asyncio.Future[str | None]] = {}
        self._supervisor = Supervisor(config, self._receive, self._lose)
        self._supervising: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._draining = False
        self._tickets: dict[str, tuple[Ticket, asyncio.TimerHandle]] = {}

    @property
    def ready(self) -> bool:
        """Whether the engine takes samples: it is up and not draining."""
        return self._up.is_set() and not self._draining

    async def start(self) -> None:
        """Start the engine process without waiting for it; see `wait_ready`."""
        self._supervising = asyncio.create_task(self._supervisor.run())

    async def wait_ready(self, timeout: float) -> Ready:
        """Wait up to `timeout` seconds for the engine; call `start` before.

        Raises:
            InputError: the engine cannot start as configured. EngineDown: it was not ready in time.
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
        """Take no more samples and wait for the running ones.

        After `seconds` the rest are aborted and raise `EngineDown`.
        """
        self._draining = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._tickets and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for ticket, _ in list(self._tickets.values()):
            ticket.cancel()
            ticket.put(self._down())

    async def close(self) -> None:
        """End the engine process; samples that are still in it raise `EngineDown`."""
        self._draining = True
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)

    def submit(self, submits: Sequence[Submit]) -> list[Ticket]:
        """Submit all samples of one request, or none; returns a ticket for each, in order.

        A sample runs for at most `limits.timeout`. Prompts and token ids are checked here and not
        again in the engine.

        Raises:
            Busy: the quota has no room now. EngineDown: there is no engine now.
            InputError: the samples are more than the quota ever takes, or a token id is out of
                range.
        """
        if not self.ready or self.info is None:
            raise self._down()
        submits = [self._checked(submit, self.info) for submit in submits]
        frames = [_frame(submit) for submit in submits]
        tokens = [_tokens(submit, self.info.context) for submit in submits]
        self.quota.take(len(submits), sum(tokens))
        tickets = [self._register(*pair) for pair in zip(submits, tokens, strict=True)]
        self._supervisor.send(b"".join(frames))
        return tickets

    async def change(self, message: LoadAdapter | UnloadAdapter) -> str | None:
        """Load or unload an adapter; returns why the engine refused it, None if it is done.

        Raises:
            EngineDown: there is no engine, or it ended before its answer.
        """
        if not self.ready:
            raise self._down()
        done = self._changes[message.id] = asyncio.get_running_loop().create_future()
        self._supervisor.send(_frame(message))
        return await done

    def _changed(self, message: Changed) -> None:
        """Note the engine's adapters, also for the process that may take its place."""
        started = {
            name: folder
            for name, folder in self.config.adapters.items()
            if message.adapters.get(name) == folder
        }
        loaded = {name: folder for name, folder in message.adapters.items() if name not in started}
        self.adapters = message.adapters
        config = replace_config(self._supervisor.config, adapters=started, loaded=loaded)
        self._supervisor.config = config
        self._answer(message.id, message.error)

    def _answer(self, id: str, answer: str | None | EngineDown) -> None:
        done = self._changes.pop(id, None)
        if done is None or done.done():  # the client has left
            return
        if isinstance(answer, EngineDown):
            done.set_exception(answer)
        else:
            done.set_result(answer)

    def _checked(self, submit: Submit, model: Ready) -> Submit:
        """The sample with its timeout, after its checks."""
        check_ids(submit.prompt, model)
        submit.params.check_vocabulary(model.vocab_size)
        if submit.timeout is None:
            return replace(submit, timeout=self.limits.timeout)
        if not submit.timeout > 0:  # false for NaN too
            raise InputError(f"timeout={submit.timeout}; give seconds, more than 0", "timeout")
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
        """Fail a ticket whose sample the engine should have ended at its timeout."""
        ticket.cancel()
        ticket.put(EngineDown("the engine did not answer within the request's timeout"))

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Delta):
            if message.id in self._tickets:
                self._tickets[message.id][0].put(message)
        elif isinstance(message, Finished):
            self._settle(message.id, message)
        elif isinstance(message, Refused):
            self._settle(message.id, InputError(message.reason, message.param, message.code))
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Changed):
            self._changed(message)
        elif isinstance(message, Ready):
            self.info, self.adapters = message, message.adapters
            self._up.set()

    def _settle(self, id: str, end: Finished | Exception) -> None:
        """Close the ticket of a sample that has left the engine."""
        if id in self._tickets:
            ticket, guard = self._tickets.pop(id)
            guard.cancel()
            self.quota.give_back(ticket.tokens)
            ticket.put(end)

    def _lose(self) -> None:
        """Fail all tickets: the engine process has ended."""
        self._up.clear()
        self.stats = Stats()
        self.restarts += not self._draining
        for id in list(self._tickets):
            self._settle(id, self._down())
        for id in list(self._changes):
            self._answer(id, self._down())

    def _down(self) -> EngineDown:
        if self._draining:
            return EngineDown("the server is shutting down")
        return EngineDown("the engine is not running; it is being started, try again soon")


def _tokens(submit: Submit, context: int) -> int:
    """The most tokens that the prompt and the output can have together."""
    return min(len(submit.prompt) + submit.params.max_tokens, context)


def _frame(message: Message) -> bytes:
    try:
        return frame([message])
    except FrameError as error:
        raise InputError(f"the request {error}") from None
