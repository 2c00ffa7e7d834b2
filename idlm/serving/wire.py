"""What the server and the engine's process say to each other, and the frames it travels in.

A frame is 4 bytes of length and that much msgpack of a list of messages: whatever a step brings
costs one write and one read, however many samples run. Every message is checked against its type
when it is read; nothing in it is executed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TypeVar

import msgspec

from idlm.engine.request import Logprob
from idlm.params import SamplingParams

T = TypeVar("T")
HEADER = 4
MAX_FRAME = 64 * 2**20
"""Bytes of a message list. A prompt of a million tokens takes 5 MB; what a step brings, far less.
"""


class Message(msgspec.Struct, tag=True, omit_defaults=True):
    """Any message; its type's name is its tag."""


class Submit(Message):
    """One sample, to be run.

    Attributes:
        id: chosen by the server, unique.
        params: with the sample's own seed.
        adapter: its name; None: the engine's first. drafting: False is plain AR.
        timeout: seconds. salt: of the prefix cache.
        trace: send where every token came from.
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


class Abort(Message):
    """End a sample in whatever state it is; unknown ids are ignored."""

    id: str


class Delta(Message):
    """What a step brought a sample: one forward, if there are tokens.

    Attributes:
        sources: as in `Result`, one a token, if asked for.
        logprobs: as in `Result`, one entry a token, if asked for.
    """

    id: str
    tokens: list[int] = []
    text: str = ""
    sources: list[str] | None = None
    logprobs: list[dict[int, Logprob]] | None = None


class Finished(Message):
    """A sample's end; its last tokens came in the `Delta` before.

    Attributes:
        reason, stop: finish and stop reason of `Result`.
        drafted, accepted: drafts looked at and accepted, over all depths.
        prompt_logprobs: if asked for; the first prompt token has none.
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
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Refused(Message):
    """A sample that cannot be run; the others are not touched."""

    id: str
    reason: str


class Ready(Message):
    """The engine is there; what its prompts are checked with."""

    vocab_size: int
    mask_id: int
    context: int


class Failed(Message):
    """The engine cannot start as configured; its process ends."""

    reason: str


class Stats(Message):
    """Counters of the engine, sent at least once a second while it lives; totals since its start
    unless said otherwise.

    Attributes:
        running, waiting: samples now. pages_total, pages_live, pages_cached: now.
        plans: steps by plan.
        reached, accepted: drafts by depth.
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
    evictions: int = 0
    plans: dict[str, int] = {}
    reached: list[int] = []
    accepted: list[int] = []


ToEngine = Submit | Abort
FromEngine = Ready | Failed | Delta | Finished | Refused | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[list[ToEngine]] = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine: msgspec.msgpack.Decoder[list[FromEngine]] = msgspec.msgpack.Decoder(list[FromEngine])


class FrameError(Exception):
    """What came, or was to be sent, is no list of messages of a size that is allowed."""


def frame(messages: Sequence[Message]) -> bytes:
    """The bytes that carry `messages`.

    Raises:
        FrameError: they are too long, or hold a number or text that msgpack has no form for.
    """
    try:
        body = _encoder.encode(messages)
    except (OverflowError, UnicodeEncodeError) as error:
        raise FrameError(f"cannot be sent: {error}") from None
    return _size(len(body)).to_bytes(HEADER, "big") + body


def receive(file: BinaryIO) -> Iterator[list[ToEngine]]:
    """The engine's side: what comes, until the other side closes.

    Raises:
        FrameError: it is too long, or no list of these messages.
    """
    while len(header := file.read(HEADER)) == HEADER:
        body = file.read(_size(int.from_bytes(header, "big")))
        yield _decode(_to_engine, body)


async def read(reader: asyncio.StreamReader) -> list[FromEngine]:
    """The server's side: the next list.

    Raises:
        EOFError: the other side has closed. FrameError: as `receive`.
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
