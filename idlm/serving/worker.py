"""The engine's process: `python -m idlm.serving.worker SOCKET CONFIG`.

SOCKET is the number of an inherited file descriptor, CONFIG an `EngineConfig` as JSON.

    reader thread: socket -> inbox        loop: inbox -> engine.step() -> one frame for all that the step brought

It lives as long as its socket. Whatever the engine raises ends the process; the server starts another.
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
from queue import Empty, SimpleQueue
from time import monotonic
from typing import NoReturn

import msgspec

from idlm import __version__
from idlm.engine.llm import LLM
from idlm.errors import InputError
from idlm.params import Guide, SamplingParams
from idlm.serving import logs
from idlm.serving.channel import FrameError, frame, receive
from idlm.serving.config import EngineConfig
from idlm.serving.messages import Abort, Failed, Message, Ready, Refused, Stats, Submit, ToEngine
from idlm.serving.reports import Reports

log = logging.getLogger("idlm.serving")

STATS_SECONDS, STATS_AFTER_END_SECONDS = 1.0, 0.2
MOST_PROMPT_LOGPROBS = 500_000
"""Entries of one sample's prompt log-probabilities: they come in one frame, of about 40 bytes an entry."""


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


class Worker:
    """Runs what comes over a link on an LLM's engine."""

    def __init__(self, llm: LLM, link: Link) -> None:
        self.llm, self.engine, self.link = llm, llm.engine, link
        self._reports = Reports(llm.engine, llm.idlm.tokenizer)
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
        if isinstance(message, Submit) and message.guide is not None:
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
        """Beside the loop, since it takes up to a second; `Engine.add` then finds the guide compiled."""
        try:
            self.engine.intake.matcher(_params(submit))
            self.link.inbox.put([Compiled(submit)])
        except Exception as error:  # the loop refuses or fails with it: a sample must not wait for what never comes
            self.link.inbox.put([Compiled(submit, error)])

    def _add_compiled(self, compiled: Compiled) -> None:
        aborted = self._compiling.pop(compiled.submit.id)
        if compiled.error is not None:
            raise compiled.error
        self._add(compiled.submit)
        if aborted:
            self.engine.abort(self._reports.numbers[compiled.submit.id])

    def _add(self, submit: Submit) -> None:
        """Give the engine a sample, checked as `LLM.generate` checks it.

        Raises:
            InputError: it cannot be run.
        """
        prompt = self.llm.encode(submit.prompt)
        params = _params(submit)
        params.check_vocabulary(self.llm.idlm.vocab_size)
        if params.prompt_logprobs is not None and len(prompt) * (params.prompt_logprobs + 1) > MOST_PROMPT_LOGPROBS:
            raise InputError(
                f"prompt_logprobs={params.prompt_logprobs} of {len(prompt)} prompt tokens are more than "
                f"{MOST_PROMPT_LOGPROBS} entries; ask for fewer"
            )
        options = submit.adapter, submit.drafting, submit.priority, submit.timeout, submit.salt
        self._reports.open(self.engine.add(prompt, params, submit.seed, *options), submit)

    def _step(self) -> list[Message]:
        updates = self.engine.step()
        if any(update.result is not None for update in updates):  # the server is to see soon what has become free
            self._next_stats = min(self._next_stats, self._sent_stats + STATS_AFTER_END_SECONDS)
        return [message for update in updates for message in self._reports.of(update)]

    def _stats(self) -> Stats:
        self._sent_stats = monotonic()
        self._next_stats = self._sent_stats + STATS_SECONDS
        return self._reports.stats()


def _params(submit: Submit) -> SamplingParams:
    try:
        guide = None if submit.guide is None else Guide(submit.guide.kind, submit.guide.text)
        return SamplingParams(**submit.params, n=1, seed=submit.seed, guide=guide)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"sampling parameters: {error}") from None


def load(config: EngineConfig) -> LLM:
    """The model, ready to run.

    Raises:
        InputError: it cannot be had so.
    """
    return LLM(
        config.model,
        adapters=config.adapters,
        stride=config.stride,
        branches=config.branches,
        dtype=config.dtype,
        device=config.device,
        max_num_seqs=config.max_num_seqs,
        kv_memory=config.kv_memory,
        page_size=config.page_size,
        prefill_tokens=config.prefill_tokens,
        deterministic=config.deterministic,
        weights=config.weights,
        threads=config.threads,
    )


def describe(llm: LLM, model: str) -> Ready:
    """What the server wants to know of the engine."""
    idlm, pool = llm.idlm, llm.engine.scheduler.pool
    return Ready(
        version=__version__,
        model=model,
        vocab_size=idlm.vocab_size,
        context=idlm.context,
        mask_id=idlm.mask_id,
        eos_ids=sorted(idlm.eos_ids),
        adapters=llm.engine.intake.adapters,
        drafts=llm.stride > 1,
        stride=llm.stride,
        pages=pool.total,
        page_size=pool.page_size,
    )


def main(file_descriptor: int, config: EngineConfig) -> int:
    """Load the model, say so, and run; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the server drains, then closes
        signal.signal(number, signal.SIG_IGN)
    link = Link(file_descriptor)
    try:
        llm = load(config)
        llm.engine.warm_up()
        gc.collect()
        gc.freeze()  # what is here now stays; looking through it again would hold all requests up
        link.send([describe(llm, config.model)])
        Worker(llm, link).run()
    except InputError as error:
        link.send([Failed(str(error))])
        return 2
    except Exception:
        log.exception("the engine failed")
        return 1


if __name__ == "__main__":
    logs.configure()
    sys.exit(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=EngineConfig)))
