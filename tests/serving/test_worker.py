"""The engine process alone: its messages over the socket, and its end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any, NoReturn, cast

import msgspec
import pytest

from idlm import LLM, SamplingParams
from idlm.config import EngineConfig
from idlm.serving import worker as worker_module
from idlm.serving.config import WorkerConfig
from idlm.serving.wire import (
    HEADER,
    Delta,
    FromEngine,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    frame,
)
from idlm.serving.worker import Link, Worker
from tests.engine.tiny import tiny_idlm
from tests.waiting import HANG_SECONDS

CONFIG = WorkerConfig(
    "nano", dtype="float64", engine=EngineConfig(branches="all", max_num_seqs=4, threads=1)
)
DECODER = msgspec.msgpack.Decoder(list[FromEngine])


class Peer:
    """The server's end of the socket."""

    def __init__(self, process: subprocess.Popen[bytes], ours: socket.socket) -> None:
        self.process, self.socket = process, ours
        self._file = ours.makefile("rb")

    def send(self, *messages: Message) -> None:
        self.socket.sendall(frame(messages))

    def read(self) -> list[FromEngine]:
        size = int.from_bytes(self._file.read(HEADER), "big")
        return DECODER.decode(self._file.read(size))

    def until(self, kind: type[Message]) -> Message:
        while True:
            for message in self.read():
                if isinstance(message, kind):
                    return message

    def close(self) -> int:
        """Close the socket; returns the exit status of the process."""
        self._file.close()
        self.socket.close()
        return self.process.wait(timeout=HANG_SECONDS)


@contextmanager
def worker(config: WorkerConfig) -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    command = [
        sys.executable,
        "-m",
        "idlm.serving.worker",
        str(theirs.fileno()),
        msgspec.json.encode(config).decode(),
    ]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        try:
            yield Peer(process, ours)
        finally:
            process.kill()


def long_sample(id: str) -> Submit:
    return Submit(id, [5, 6, 7], SamplingParams(max_tokens=500, ignore_eos=True, seed=0))


def test_it_says_what_it_is_speaks_unasked_and_ends_with_its_socket() -> None:
    with worker(CONFIG) as peer:
        ready = peer.until(Ready)
        assert ready == Ready(vocab_size=640, mask_id=3, context=512)
        assert [[type(message) for message in peer.read()] for _ in range(3)] == [[Stats]] * 3
        for number in (signal.SIGINT, signal.SIGTERM):
            peer.process.send_signal(number)
        peer.send(
            Submit("bad", [5], SamplingParams(), adapter="none"),
            *[long_sample(str(index)) for index in range(6)],
        )
        assert peer.until(Refused) == Refused(
            "bad", "adapter 'none' is not loaded; use one of default"
        )
        peer.until(Delta)
        assert peer.close() == 0  # in the middle of its steps


@pytest.mark.parametrize("source, sent", [
    ("auto", {"temperature": 0.0, "top_k": 7, "banned_tokens": [9]}), ("none", {}),
])  # fmt: skip
def test_it_sends_the_defaults_of_the_model(
    source: str, sent: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint / "base", tmp_path / "base")
    keys = {"do_sample": False, "top_k": 7, "suppress_tokens": [9]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(keys))
    engine = EngineConfig(stride=1, threads=1, kv_memory="8MiB", generation_config=source)
    with worker(WorkerConfig(str(tmp_path / "base"), engine=engine)) as peer:
        assert peer.until(Ready).sampling == sent


class Over(Exception):
    """Ends a test."""


class Quiet:
    """A link without messages, and its inbox; a wait only moves its own clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[tuple[float, list[type[Message]]]] = []
        self.inbox = self

    def get(self, wait: bool, seconds: float) -> NoReturn:
        self.now += seconds if wait else 0.0
        raise Empty

    def send(self, messages: Sequence[Message]) -> None:
        self.sent.append((self.now, [type(message) for message in messages]))
        if len(self.sent) == 4:
            raise Over


def test_it_speaks_at_once_and_then_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Quiet()
    monkeypatch.setattr(worker_module, "monotonic", lambda: quiet.now)
    with pytest.raises(Over):
        Worker(LLM(tiny_idlm("llama")), cast(Link, quiet)).run()
    assert quiet.sent == [(0.0, [Stats]), (1.0, [Stats]), (2.0, [Stats]), (3.0, [Stats])]
