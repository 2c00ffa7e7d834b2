"""The messages between the server and the engine process, and their frames.

A frame is 4 bytes of length and then a list of messages in msgpack: one write and one read for all
that a step produces, however many samples run. Every message is validated against its type when it
is read; nothing in it is executed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import msgspec

from idlm.engine.request import Logprob, WindowRecord
from idlm.params import SamplingParams

T = TypeVar("T")
HEADER = 4
MAX_FRAME = 64 * 2**20
"""Bytes of a list of messages. A prompt of a million tokens takes 5 MB, a step far less."""


class Message(msgspec.Struct, tag=True, omit_defaults=True):
    """Any message; its tag is the name of its type."""


class Submit(Message):
    """Run one sample.

    Attributes:
        id: unique, made by the server.
        params: with the sample's own seed.
        adapter: by name; None: the engine's default.
        drafting: False: AR.
        timeout: in seconds.
        salt: of the prefix cache.
        trace: report the source of each token; windows: also what every window held.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    adapter: str | None = None
    drafting: bool = True
    priority: int = 0
    timeout: float | None = None
    salt: bytes = b""
    trace: bool = False
    windows: bool = False


class Abort(Message):
    """End a sample in any state; unknown ids are ignored."""

    id: str


class LoadAdapter(Message):
    """Load an adapter from a folder under a new name; the answer is a `Changed`."""

    id: str
    name: str
    folder: str


class UnloadAdapter(Message):
    """Take an adapter's name away; the answer is a `Changed`."""

    id: str
    name: str


class Changed(Message):
    """The adapters by name and folder after a change; or why it was refused, in `error`."""

    id: str
    adapters: dict[str, str]
    error: str | None = None


class Delta(Message):
    """What one step adds to a sample; with tokens it counts as one forward.

    Attributes:
        sources: as in `Result`, for each token, if the request traces.
        logprobs: as in `Result`, for each token, if the request asks for them.
        window: of the forward, if the request asks for windows.
    """

    id: str
    tokens: list[int] = []
    text: str = ""
    sources: list[str] | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    window: WindowRecord | None = None


class Finished(Message):
    """The end of a sample; its last tokens came in the `Delta` before.

    Attributes:
        reason, stop: `finish_reason` and `stop_reason` of `Result`.
        drafted, accepted: drafts reached and accepted, over all depths.
        windows: forwards that verified drafts; verified: the drafts of these forwards.
        accepted_at: accepted drafts by depth; empty if the engine makes no drafts.
        prompt_logprobs: if the request asks for them; None for the first prompt token.
    """

    id: str
    reason: str
    stop: str | int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    forwards: int
    drafted: int
    accepted: int
    windows: int = 0
    verified: int = 0
    accepted_at: list[int] = []
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Refused(Message):
    """A sample that cannot be run; other samples are not affected."""

    id: str
    reason: str
    param: str | None = None
    code: str | None = None


class Ready(Message):
    """The engine takes requests; the fields bound the token ids and lengths of prompts.

    Attributes:
        sampling: the model's defaults, fields of `SamplingParams`.
        adapters: their folders, by name.
    """

    vocab_size: int
    mask_id: int
    context: int
    sampling: dict[str, Any] = {}
    adapters: dict[str, str] = {}


class Failed(Message):
    """The engine cannot start as configured; its process ends."""

    reason: str


class Stats(Message):
    """Counters of the engine, sent at least once a second; totals since its start unless noted.

    Attributes:
        running, waiting: samples now.
        pages_total, pages_live, pages_cached: pages now.
        plans: steps by plan.
        reached, accepted: drafts by depth.
        drafted: drafts verified, also those that were not reached.
        prompt_tokens: of the samples that have begun their output.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_live: int = 0
    pages_cached: int = 0
    steps: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    forwards: int = 0
    preemptions: int = 0
    drafted: int = 0
    prompt_tokens: int = 0
    evictions: int = 0
    plans: dict[str, int] = {}
    reached: list[int] = []
    accepted: list[int] = []

    @property
    def kv_usage(self) -> float:
        """The share of the pages that samples hold, 0 to 1."""
        return self.pages_live / max(1, self.pages_total)


ToEngine = Submit | Abort | LoadAdapter | UnloadAdapter
FromEngine = Ready | Failed | Delta | Finished | Refused | Changed | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[list[ToEngine]] = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine: msgspec.msgpack.Decoder[list[FromEngine]] = msgspec.msgpack.Decoder(list[FromEngine])


class FrameError(Exception):
    """A frame that is too long, or that does not hold a valid list of messages."""


def frame(messages: Sequence[Message]) -> bytes:
    """The bytes that carry `messages`.

    Raises:
        FrameError: they are too long, or hold an integer or a text that msgpack cannot encode.
    """
    try:
        body = _encoder.encode(messages)
    except (OverflowError, UnicodeEncodeError) as error:
        raise FrameError(f"cannot be sent: {error}") from None
    return _size(len(body)).to_bytes(HEADER, "big") + body


def receive(file: BinaryIO) -> Iterator[list[ToEngine]]:
    """The engine's side: lists of messages until the server closes the socket.

    Raises:
        FrameError: a list is too long or not valid.
    """
    while len(header := file.read(HEADER)) == HEADER:
        body = file.read(_size(int.from_bytes(header, "big")))
        yield _decode(_to_engine, body)


async def read(reader: asyncio.StreamReader) -> list[FromEngine]:
    """The server's side: the next list of messages.

    Raises:
        EOFError: the engine closed the socket. FrameError: as in `receive`.
    """
    header = await reader.readexactly(HEADER)
    return _decode(_from_engine, await reader.readexactly(_size(int.from_bytes(header, "big"))))


def _decode(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise FrameError(f"no list of messages: {error}") from None


def _size(size: int) -> int:
    if size > MAX_FRAME:
        raise FrameError(f"a message list of {size} bytes; at most {MAX_FRAME} are allowed")
    return size
