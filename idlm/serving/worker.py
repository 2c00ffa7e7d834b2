"""The engine's process: `python -m idlm.serving.worker SOCKET CONFIG`.

SOCKET is the number of an inherited file descriptor, CONFIG an `WorkerConfig` as JSON.

    reader thread: socket -> inbox        loop: inbox -> engine.step() -> one frame for all that the
    step brought

It lives as long as its socket. Whatever the engine raises ends the process; the server starts
another.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from queue import Empty, SimpleQueue
from time import monotonic
from typing import NoReturn

import msgspec

from idlm.engine.engine import Engine
from idlm.engine.llm import LLM
from idlm.engine.request import Result, Update
from idlm.errors import InputError
from idlm.serving import observe
from idlm.serving.config import WorkerConfig
from idlm.serving.observe import add_totals
from idlm.serving.wire import (
    Abort,
    Delta,
    Failed,
    Finished,
    FrameError,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    ToEngine,
    frame,
    receive,
)

log = logging.getLogger("idlm.serving")

STATS_SECONDS, STATS_AFTER_END_SECONDS = 1.0, 0.2
MOST_PROMPT_LOGPROBS = 500_000
"""Entries of one sample's prompt log-probabilities: they come in one frame, of about 30 bytes an
entry."""


@dataclass(frozen=True)
class Compiled:
    """A sample whose guide has been compiled, or refused."""

    submit: Submit
    error: Exception | None = None


class Link:
    """The worker's end of the socket. A thread reads; the process ends when the server closes it."""

    def __init__(self, file_descriptor: int) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._socket.set_inheritable(False)
        self.inbox: SimpleQueue[Sequence[ToEngine | Compiled]] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, messages: Sequence[Message]) -> None:
        """Write one frame; waits where the server does not read."""
        with suppress(ConnectionError):  # the server is gone: the other thread sees it too
            if messages:
                self._socket.sendall(frame(messages))

    def _read(self) -> None:
        try:
            for messages in receive(self._socket.makefile("rb")):
                self.inbox.put(messages)
        except ConnectionError:  # closed, with something unread
            pass
        except (OSError, FrameError):
            log.exception("the server's socket failed")
        os._exit(0)  # at once, whatever the other thread does: there is nobody left to tell


@dataclass
class Sample:
    """A sample in the engine: what was asked, its result as it grows, and how much of it has been
    reported."""

    submit: Submit
    result: Result
    tokens: int = 0


class Reports:
    """The samples of one engine, and what has been said of them.

    Attributes:
        numbers: the engine's id of each sample that runs or waits, by the server's.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.numbers: dict[str, str] = {}
        self._samples: dict[str, Sample] = {}
        self._ended = Stats()

    def open(self, number: str, submit: Submit) -> None:
        """Follow a sample that the engine has just been given, by the engine's own id."""
        self.numbers[submit.id] = number
        self._samples[number] = Sample(submit, self.engine.result(number))

    def of(self, update: Update) -> list[Message]:
        """The messages that an update comes to; its last closes the sample."""
        sample = self._samples[update.request_id]
        out: list[Message] = []
        if update.tokens or update.text:
            out.append(self._delta(sample, update))
        if update.result is not None:
            del self._samples[update.request_id], self.numbers[sample.submit.id]
            self._ended = add_totals(self._ended, _counted(update.result))
            out.append(self._finished(sample))
        return out

    def stats(self) -> Stats:
        """The counters."""
        scheduler, metrics = self.engine.scheduler, self.engine.metrics
        samples = (_counted(sample.result) for sample in self._samples.values())
        now = Stats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            pages_total=scheduler.pool.total,
            pages_live=scheduler.pool.live,
            pages_cached=scheduler.pool.cached,
            steps=metrics.steps,
            tokens=metrics.tokens,
            prefill_tokens=metrics.prefill_tokens,
            preemptions=metrics.preemptions,
            evictions=scheduler.pool.evictions,
            plans=dict(metrics.plans),
        )
        return add_totals(reduce(add_totals, samples, self._ended), now)

    def _delta(self, sample: Sample, update: Update) -> Delta:
        """An update; the result may be further already."""
        delta = Delta(sample.submit.id, update.tokens, update.text)
        new = slice(sample.tokens, sample.tokens + len(update.tokens))
        sample.tokens = new.stop
        if sample.result.logprobs is not None:
            delta.logprobs = sample.result.logprobs[new]
        if sample.submit.trace:
            delta.sources = list(update.sources)
        return delta

    def _finished(self, sample: Sample) -> Finished:
        result = sample.result
        return Finished(
            id=sample.submit.id,
            reason=result.finish_reason,
            stop=result.stop_reason,
            prompt_tokens=len(result.prompt_token_ids),
            cached_tokens=result.cached_tokens,
            completion_tokens=len(result.token_ids),
            forwards=result.forwards,
            drafted=sum(result.reached),
            accepted=sum(result.accepted),
            prompt_logprobs=result.prompt_logprobs,
        )


def _counted(result: Result) -> Stats:
    """What one sample adds to the totals that the engine itself does not keep."""
    return Stats(
        cached_tokens=result.cached_tokens,
        forwards=result.forwards,
        reached=result.reached,
        accepted=result.accepted,
    )


class Worker:
    """Runs what comes over a link on an LLM's engine."""

    def __init__(self, llm: LLM, link: Link) -> None:
        self.llm, self.engine, self.link = llm, llm.engine, link
        self._reports = Reports(llm.engine)
        self._sent_stats = 0.0
        self._next_stats = 0.0
        self._compiler = ThreadPoolExecutor(1)
        self._compiling: dict[str, bool] = {}
        """Samples whose guide is being compiled; True: aborted meanwhile."""

    def run(self) -> NoReturn:
        """Until the process ends."""
        while True:
            out = self._take()
            if self.engine.busy:
                out += self._step()
            if monotonic() >= self._next_stats:
                out.append(self._stats())
            self.link.send(out)

    def _take(self) -> list[Message]:
        """Act on all that has come; with nothing to run, wait for it, till the next stats are due."""
        refused: list[Message] = []
        wait = not self.engine.busy
        try:
            while True:
                for message in self.link.inbox.get(wait, max(0.0, self._next_stats - monotonic())):
                    refused += self._act(message)
                wait = False
        except Empty:
            return refused

    def _act(self, message: ToEngine | Compiled) -> list[Refused]:
        if isinstance(message, Abort):
            if message.id in self._compiling:
                self._compiling[message.id] = True
            elif message.id in self._reports.numbers:
                self.engine.abort(self._reports.numbers[message.id])
            return []
        if isinstance(message, Submit) and message.params.guide is not None:
            self._compiling[message.id] = False
            self._compiler.submit(self._compile, message)
            return []
        try:
            if isinstance(message, Submit):
                self._add(message)
            else:
                self._add_compiled(message)
        except InputError as error:
            submit = message if isinstance(message, Submit) else message.submit
            return [Refused(submit.id, str(error))]
        return []

    def _compile(self, submit: Submit) -> None:
        """Beside the loop, since it takes up to a second; `Engine.add` then finds the guide
        compiled."""
        try:
            self.engine.admission.matcher(submit.params)
            self.link.inbox.put([Compiled(submit)])
        # the loop refuses or fails with it: a sample must not wait for what never comes
        except Exception as error:
            self.link.inbox.put([Compiled(submit, error)])

    def _add_compiled(self, compiled: Compiled) -> None:
        aborted = self._compiling.pop(compiled.submit.id)
        if compiled.error is not None:
            raise compiled.error
        self._add(compiled.submit)
        if aborted:
            self.engine.abort(self._reports.numbers[compiled.submit.id])

    def _add(self, submit: Submit) -> None:
        """Give the engine a sample, whose ids the server has checked.

        Raises:
            InputError: it cannot be run.
        """
        prompt, params = submit.prompt, submit.params
        if (
            params.prompt_logprobs is not None
            and len(prompt) * (params.prompt_logprobs + 1) > MOST_PROMPT_LOGPROBS
        ):
            raise InputError(
                f"prompt_logprobs={params.prompt_logprobs} of {len(prompt)} prompt tokens are more than "
                f"{MOST_PROMPT_LOGPROBS} entries; ask for fewer"
            )
        options = submit.adapter, submit.drafting, submit.priority, submit.timeout, submit.salt
        self._reports.open(self.engine.add(prompt, params, params.seed or 0, *options), submit)

    def _step(self) -> list[Message]:
        updates = self.engine.step()
        if any(
            update.result is not None for update in updates
        ):  # the server is to see soon what has become free
            self._next_stats = min(self._next_stats, self._sent_stats + STATS_AFTER_END_SECONDS)
        return [message for update in updates for message in self._reports.of(update)]

    def _stats(self) -> Stats:
        self._sent_stats = monotonic()
        self._next_stats = self._sent_stats + STATS_SECONDS
        return self._reports.stats()


def main(file_descriptor: int, config: WorkerConfig) -> int:
    """Load the model, say so, and run; returns the exit status."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they reach the whole group; the server drains, then closes
        signal.signal(number, signal.SIG_IGN)
    link = Link(file_descriptor)
    try:
        llm = LLM(
            config.model,
            adapters=config.adapters,
            dtype=config.dtype,
            device=config.device,
            config=config.engine,
        )
        llm.engine.warm_up()
        gc.collect()
        gc.freeze()  # what is here now stays; looking through it again would hold all requests up
        link.send([Ready(llm.idlm.vocab_size, llm.idlm.mask_id, llm.idlm.context)])
        Worker(llm, link).run()
    except InputError as error:
        link.send([Failed(str(error))])
        return 2
    except Exception:
        log.exception("the engine failed")
        return 1


if __name__ == "__main__":
    observe.configure()
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=WorkerConfig)))
