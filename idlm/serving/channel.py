"""Frames between server and engine process: 4 bytes of length, then that much msgpack of a list of messages.

A list, so that whatever a step brings costs one write and one read, however many samples run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TypeVar

import msgspec

from idlm.serving.messages import FromEngine, Message, ToEngine

T = TypeVar("T")
HEADER = 4
MAX_FRAME = 64 * 2**20
"""Bytes of a message list. A prompt of a million tokens takes 5 MB; what a step brings, far less."""

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


def checked_frame(message: ToEngine) -> bytes:
    """The frame of a message built from a caller's values, which the engine is certain to read.

    Raises:
        FrameError: a value is not of the type that the message declares, or as `frame`.
    """
    framed = frame([message])
    _decode(_to_engine, framed[HEADER:])
    return framed


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
