"""The engine process: `python -m idlm.serving.worker SOCKET CONFIG`.

SOCKET is the number of an inherited file descriptor, CONFIG a `WorkerConfig` as JSON.

    reader thread: socket -> inbox
    loop:          inbox -> engine.step() -> one frame with all that the step produced

The process ends when its socket is closed. Any error of the engine ends it too; the server then
starts another.
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
from idlm.engine.request import Result, Terms, Update
from idlm.errors import InputError
from idlm.serving import observe
from idlm.serving.config import WorkerConfig
from idlm.serving.observe import add_totals
from idlm.serving.wire import (
    Abort,
    Changed,
    Delta,
    Failed,
    Finished,
    FrameError,
    LoadAdapter,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    ToEngine,
    UnloadAdapter,
    frame,
    receive,
)
from idlm.serving.worker_adapters import AdapterRead, WorkerAdapters

log = logging.getLogger("idlm.serving")

STATS_SECONDS, STATS_AFTER_END_SECONDS = 1.0, 0.2
MOST_PROMPT_LOGPROBS = 500_000
"""Entries of one sample's prompt log-probabilities, which are sent in one frame, about 30 bytes for
each entry."""


@dataclass(frozen=True)
class Compiled:
    """A sample whose guide has been compiled, or refused with `error`."""

    submit: Submit
    error: Exception | None = None


FromServer = ToEngine | Compiled | AdapterRead
"""What the loop acts on: the server's messages, and what threads have prepared."""


class Link:
    """The worker's end of the socket. A thread reads it; the process ends when the server closes
    it."""

    def __init__(self, file_descriptor: int) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._socket.set_inheritable(False)
        self.inbox: SimpleQueue[Sequence[FromServer]] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, messages: Sequence[Message]) -> None:
        """Write one frame; blocks while the server does not read."""
        with suppress(ConnectionError):  # the server is gone; the reader thread ends the process
            if messages:
                self._socket.sendall(frame(messages))

    def _read(self) -> None:
        try:
            for messages in receive(self._socket.makefile("rb")):
                self.inbox.put(messages)
        except ConnectionError:  # closed with unread data
            pass
        except (OSError, FrameError):
            log.exception("the server's socket failed")
        os._exit(0)  # at once, whatever the main thread does: there is no server to answer


@dataclass
class Sample:
    """A sample in the engine: its request, its growing result, and how many tokens and forwards
    were reported."""

    submit: Submit
    result: Result
    tokens: int = 0
    forwards: int = 0


class Reports:
    """The samples of one engine, and what has been reported of them.

    Attributes:
        engine_ids: the engine's id of each unfinished sample, by the server's id.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.engine_ids: dict[str, str] = {}
        self._samples: dict[str, Sample] = {}
        self._ended = Stats()

    def open(self, engine_id: str, submit: Submit) -> None:
        """Follow a sample that the engine has accepted under `engine_id`."""
        self.engine_ids[submit.id] = engine_id
        self._samples[engine_id] = Sample(submit, self.engine.result(engine_id))

    def of(self, update: Update) -> list[Message]:
        """The messages for an update; the last update closes the sample."""
        sample = self._samples[update.request_id]
        out: list[Message] = []
        if update.tokens or update.text:
            out.append(self._delta(sample, update))
        if update.result is not None:
            del self._samples[update.request_id], self.engine_ids[sample.submit.id]
            self._ended = add_totals(self._ended, _counted(update.result))
            out.append(self._finished(sample))
        return out

    def stats(self) -> Stats:
        """The engine's counters and those of all samples so far."""
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
        """Log-probabilities are those of the update alone: the result may be ahead of it."""
        delta = Delta(sample.submit.id, update.tokens, update.text)
        new = slice(sample.tokens, sample.tokens + len(update.tokens))
        sample.tokens = new.stop
        if sample.result.logprobs is not None:
            delta.logprobs = sample.result.logprobs[new]
        if sample.submit.trace:
            delta.sources = list(update.sources)
        if sample.result.windows is not None and update.tokens:
            delta.window = sample.result.windows[sample.forwards]
        sample.forwards += bool(update.tokens)
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
            windows=result.reached[0] if result.reached else 0,
            verified=result.drafted,
            accepted_at=result.accepted,
            prompt_logprobs=result.prompt_logprobs,
        )


def _counted(result: Result) -> Stats:
    """What one sample adds to the totals that the engine does not keep itself."""
    return Stats(
        cached_tokens=result.cached_tokens,
        forwards=result.forwards,
        reached=result.reached,
        accepted=result.accepted,
        drafted=result.drafted,
        prompt_tokens=len(result.prompt_token_ids) if result.token_ids else 0,
    )


class Worker:
    """Runs the samples that come over a link on the engine of an LLM."""

    def __init__(self, llm: LLM, link: Link, adapters: WorkerAdapters | None = None) -> None:
        self.llm, self.engine, self.link = llm, llm.engine, link
        self._adapters = adapters
        self._reports = Reports(llm.engine)
        self._sent_stats = 0.0
        self._next_stats = 0.0
        self._compiler = ThreadPoolExecutor(1)
        self._compiling: dict[str, bool] = {}
        """By id, the samples whose guide is being compiled; True: aborted meanwhile."""

    def run(self) -> NoReturn:
        while True:
            out = self._take()
            if self.engine.busy:
                out += self._step()
            if monotonic() >= self._next_stats:
                out.append(self._stats())
            self.link.send(out)

    def _take(self) -> list[Message]:
        """Act on all messages in the inbox; an idle engine waits for one until the next stats are
        due."""
        refused: list[Message] = []
        wait = not self.engine.busy
        try:
            while True:
                for message in self.link.inbox.get(wait, max(0.0, self._next_stats - monotonic())):
                    refused += self._act(message)
                wait = False
        except Empty:
            return refused

    def _act(self, message: FromServer) -> Sequence[Refused | Changed]:
        if isinstance(message, LoadAdapter | UnloadAdapter | AdapterRead):
            assert self._adapters is not None  # noqa: S101
            return self._adapters.act(message)
        if isinstance(message, Abort):
            if message.id in self._compiling:
                self._compiling[message.id] = True
            elif message.id in self._reports.engine_ids:
                self.engine.abort(self._reports.engine_ids[message.id])
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
            return [Refused(submit.id, str(error), error.param, error.code)]
        return []

    def _compile(self, submit: Submit) -> None:
        """Compile a guide beside the loop, since it takes up to a second; `Engine.add` then finds
        it."""
        try:
            self.engine.admission.matcher(submit.params)
            self.link.inbox.put([Compiled(submit)])
        # the loop refuses the sample or fails: it must not wait for ever
        except Exception as error:
            self.link.inbox.put([Compiled(submit, error)])

    def _add_compiled(self, compiled: Compiled) -> None:
        aborted = self._compiling.pop(compiled.submit.id)
        if compiled.error is not None:
            raise compiled.error
        self._add(compiled.submit)
        if aborted:
            self.engine.abort(self._reports.engine_ids[compiled.submit.id])

    def _add(self, submit: Submit) -> None:
        """Submit a sample to the engine; the server has checked its token ids.

        Raises:
            InputError: it cannot be run.
        """
        prompt, params = submit.prompt, submit.params
        if (
            params.prompt_logprobs is not None
            and len(prompt) * (params.prompt_logprobs + 1) > MOST_PROMPT_LOGPROBS
        ):
            raise InputError(
                f"prompt_logprobs={params.prompt_logprobs} of {len(prompt)} prompt tokens "
                f"are more than {MOST_PROMPT_LOGPROBS} entries; ask for fewer",
                "prompt_logprobs",
            )
        how = submit.adapter, submit.drafting, submit.priority, submit.timeout, submit.salt
        terms = Terms(*how, windows=submit.windows)
        self._reports.open(self.engine.add(prompt, params, params.seed or 0, terms), submit)

    def _step(self) -> list[Message]:
        updates = self.engine.step()
        if any(update.result is not None for update in updates):
            # the server should soon see which slots and pages are free
            self._next_stats = min(self._next_stats, self._sent_stats + STATS_AFTER_END_SECONDS)
        return [message for update in updates for message in self._reports.of(update)]

    def _stats(self) -> Stats:
        self._sent_stats = monotonic()
        self._next_stats = self._sent_stats + STATS_SECONDS
        return self._reports.stats()


def main(file_descriptor: int, config: WorkerConfig) -> int:
    """Load the model, report that it is ready, and run; returns the exit status."""
    # signals reach the whole process group; the server drains and then closes the socket
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    link = Link(file_descriptor)
    try:
        llm = LLM(
            config.model,
            adapters=config.adapters,
            dtype=config.dtype,
            device=config.device,
            config=config.engine,
            changing=bool(config.lora_dirs),
        )
        adapters = WorkerAdapters(llm, config.adapters, lambda read: link.inbox.put([read]))
        adapters.restore(config.loaded)
        llm.engine.warm_up()
        gc.collect()
        gc.freeze()  # these objects stay; a collection that visits them would delay all requests
        defaults = llm.idlm.sampling_defaults if config.engine.generation_config == "auto" else {}
        sizes = llm.idlm.vocab_size, llm.idlm.mask_id, llm.idlm.context
        link.send([Ready(*sizes, defaults, adapters.folders)])
        Worker(llm, link, adapters).run()
    except InputError as error:
        link.send([Failed(str(error))])
        return 2
    except Exception:
        log.exception("the engine failed")
        return 1


if __name__ == "__main__":
    observe.configure()
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=WorkerConfig)))
