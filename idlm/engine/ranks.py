"""`Ranks`: the processes of an engine whose model is split (`idlm.models.parallel`).

Rank 0 is the process with the engine. It schedules, measures and plans. Every other rank has a
runner, and does on its device what rank 0 does on its own: whatever changes a runner's state is
sent to it, in order, before rank 0 does it.

    rank 0    Engine -> LeadingRunner -> the device
                              |  method and arguments
    rank k            FollowingRunner -> the device

A step is a function of that state and of its arguments, and the noise is a function of seed and
position. So all ranks commit the same tokens, and none are sent. Two things are: what guides allow,
since rank 0 has the matchers; and a checksum of each result, so that a rank whose result differs
ends.

A rank that ends, ends all: rank 0's next call raises `RankError`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from socket import SHUT_RDWR, socket, socketpair
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from idlm.config import EngineConfig
from idlm.engine.guide import Constraint, GuidedRows
from idlm.engine.prefill import Chunk
from idlm.engine.preflight import Wanted
from idlm.engine.request import Request, Result
from idlm.engine.runner import PendingStep, Runner
from idlm.engine.step import StepKey, Verify
from idlm.errors import InputError

log = logging.getLogger("idlm")

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The network interface of gloo's sockets: all ranks are on one machine."""
HEAR_SECONDS = 5.0
"""How long rank 0, after an error of its own, waits to hear that another rank has ended."""
END_SECONDS = 5.0


class RankError(RuntimeError):
    """A rank has ended, and so has the engine."""


@dataclass(frozen=True)
class Start:
    """What a rank is started with; `store` is the file by which the ranks find each other."""

    rank: int
    store: str
    wanted: Wanted
    config: EngineConfig


def join(start: Start) -> None:
    """Become a rank. All ranks call this together."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    size, backend = start.config.tensor_parallel_size, "gloo"
    options: dict[str, Any] = {}
    if start.wanted.device != "cpu":
        torch.cuda.set_device(start.rank)
        backend, options = "nccl", {"device_id": torch.device("cuda", start.rank)}
    store = dist.FileStore(start.store, size)
    dist.init_process_group(backend, store=store, rank=start.rank, world_size=size, **options)


class Ranks:
    """The other ranks, as rank 0 sees them. They load the model while rank 0 does.

    Args:
        wanted: what `preflight` has checked.
    """

    def __init__(self, wanted: Wanted, config: EngineConfig) -> None:
        self.problem: str | None = None
        """Why there are no ranks any more."""
        self._heard = threading.Event()
        self._closing = False
        self._cuda = wanted.device != "cpu"
        self._folder = TemporaryDirectory(prefix="idlm-ranks-")
        start = Start(0, str(Path(self._folder.name) / "store"), wanted, config)
        others = range(1, config.tensor_parallel_size)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket] = []
        self._links: list[Connection[Any, Any]] = []
        for rank in others:
            self._begin(replace(start, rank=rank))
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            with self._explained():
                join(start)
        except BaseException:
            self.close()
            raise

    def _begin(self, start: Start) -> None:
        """Start the process of a rank."""
        ours, theirs = socketpair()
        numbers = {"RANK": start.rank, "LOCAL_RANK": start.rank}
        numbers |= {"WORLD_SIZE": start.config.tensor_parallel_size}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "idlm.engine.rank", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {name: str(number) for name, number in numbers.items()},
            )
        self._processes.append(process)
        self._sockets.append(ours)
        self._links.append(Connection(os.dup(ours.fileno())))
        self._links[-1].send(start)

    def send(self, method: str, *arguments: object) -> None:
        """Have the other ranks call a method of their runner."""
        for link in self._links:
            link.send((method, arguments))

    @contextmanager
    def doing(self, method: str, *arguments: object) -> Iterator[None]:
        """Have the other ranks do what rank 0 does inside.

        Raises:
            RankError: one has ended.
        """
        with self._explained():
            if self.problem is not None:
                raise RankError(self.problem)
            self.send(method, *arguments)
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an error inside that a rank has ended, if that is why."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if not isinstance(error, RankError) and self._heard.wait(HEAR_SECONDS):
                raise RankError(self.problem) from error
            raise

    def _watch(self) -> None:
        """Wait until a rank fails or ends."""
        ready = wait(self._links)
        number = next(at for at, link in enumerate(self._links) if link in ready)
        try:
            reason = str(self._links[number].recv())
        except (EOFError, OSError):
            reason = f"its process ended with status {self._processes[number].wait()}"
        if not self._closing:
            self.problem = f"rank {number + 1} has ended ({reason}), and so has the engine"
            log.error("%s", self.problem)
            self._heard.set()
            if self._cuda:  # a sum on a GPU would wait for ever
                _abort()

    def close(self) -> None:
        """End the other ranks."""
        if self._closing:
            return
        self._closing = True
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(SHUT_RDWR)
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for link, ours in zip(self._links, self._sockets, strict=True):
            link.close()
            ours.close()
        if self._cuda:
            _abort()
        elif dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()


def _abort() -> None:
    """Give this process's group up, and the sums on a GPU that wait for other ranks."""
    with suppress(Exception):
        dist.distributed_c10d._abort_process_group()


class Checksums:
    """Checksums of the results of steps. Each is asked for two steps later, since the host reads
    results one step late."""

    def __init__(self) -> None:
        self._steps: deque[PendingStep] = deque()

    def add(self, step: PendingStep) -> PendingStep:
        self._steps.append(step)
        return step

    def next(self) -> int:
        """That of the step before the last one, before the next is launched."""
        if len(self._steps) < 2:
            return 0
        return zlib.crc32(self._steps.popleft().read().packed.contiguous().numpy().tobytes())


class LeadingRunner(Runner):
    """Rank 0's runner: the others do the same. `parts` are the arguments of `Runner`."""

    def __init__(self, ranks: Ranks, *parts: Any) -> None:
        super().__init__(*parts)
        self._ranks, self._sums = ranks, Checksums()

    def seat(self, request: Request) -> None:
        with self._ranks.doing("seat", _bare(request)):
            super().seat(request)

    def replace_verify(self, verify: Verify) -> None:
        raise InputError("acceptance cannot be simulated with several ranks; leave them out")

    def forget(self) -> None:
        with self._ranks.doing("forget"):
            super().forget()

    def clear(self, slot: int) -> None:
        with self._ranks.doing("clear", slot):
            super().clear(slot)

    def replace_from(self, long: int) -> None:
        with self._ranks.doing("replace_from", long):
            super().replace_from(long)

    def map_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        with self._ranks.doing("map_pages", list(entries)):
            super().map_pages(entries)

    def lengthen_spare(self, length: int) -> None:
        with self._ranks.doing("lengthen_spare", length):
            super().lengthen_spare(length)

    def prepare(self, key: StepKey) -> None:
        with self._ranks.doing("prepare", key):
            super().prepare(key)

    def step(
        self,
        key: StepKey,
        slots: Sequence[int],
        tokens: int,
        chunks: Sequence[Chunk] = (),
        matchers: Sequence[Constraint | None] = (),
        windows: bool = False,
    ) -> PendingStep:
        with_guide = [matcher is not None or None for matcher in matchers]
        work = key, list(slots), tokens, list(chunks), with_guide
        with self._ranks.doing("checked_step", self._sums.next(), *work):
            return self._sums.add(super().step(key, slots, tokens, chunks, matchers, windows))

    def guided(self, matchers: Sequence[Constraint | None]) -> GuidedRows:
        return _Sent(self._ranks, matchers, self.idlm.vocab_size)


class _Sent(GuidedRows):
    """What rank 0's matchers allow, which it sends to the others."""

    def __init__(
        self, ranks: Ranks, matchers: Sequence[Constraint | None], vocab_size: int
    ) -> None:
        super().__init__(matchers, vocab_size)
        self._ranks = ranks

    def bits(self, paths: Sequence[Sequence[list[int]]]) -> Tensor:
        bits = super().bits(paths)
        self._ranks.send("bits", tuple(bits.shape), bits.numpy().tobytes())
        return bits


def _bare(request: Request) -> Request:
    """A request without what only the engine needs."""
    kept = request.result
    result = Result(kept.prompt_token_ids, kept.seed, [], [], kept.timing, kept.token_ids)
    return replace(request, result=result, stream=None, matcher=None, page_keys=[])


def rank_device(wanted: Wanted, config: EngineConfig, rank: int = 0) -> str:
    """The device of a rank's weights."""
    several = config.tensor_parallel_size > 1 and wanted.device != "cpu"
    return f"{wanted.device}:{rank}" if several else wanted.device


Inbox = Any
"""A queue of (method, arguments)."""


class FollowingRunner(Runner):
    """The runner of a rank that does as rank 0 does. `parts`: the arguments of `Runner`."""

    def __init__(self, inbox: Inbox, *parts: Any) -> None:
        super().__init__(*parts)
        self._inbox, self._sums = inbox, Checksums()

    @torch.inference_mode()
    def follow(self) -> None:
        """Do as rank 0 does, for ever."""
        while True:
            method, arguments = self._inbox.get()
            getattr(self, method)(*arguments)

    def checked_step(self, checksum: int, *work: Any) -> None:
        """A step, if this rank has had the results of rank 0 so far.

        Raises:
            RuntimeError: it has not.
        """
        if self._sums.next() != checksum:
            raise RuntimeError("it computed other tokens than rank 0")
        self._sums.add(super().step(*work))

    def guided(self, matchers: Sequence[Constraint | None]) -> GuidedRows:
        return _Received(self._inbox, matchers, self.idlm.vocab_size)


class _Received(GuidedRows):
    """What rank 0's matchers allow."""

    def __init__(
        self, inbox: Inbox, matchers: Sequence[Constraint | None], vocab_size: int
    ) -> None:
        super().__init__(matchers, vocab_size)
        self._inbox = inbox

    def bits(self, paths: Sequence[Sequence[list[int]]]) -> Tensor:
        _, (shape, data) = self._inbox.get()
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
