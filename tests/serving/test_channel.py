from __future__ import annotations

import asyncio
import io

import pytest

from idlm.serving import channel
from idlm.serving.channel import HEADER, FrameError, checked_frame, frame, read, receive
from idlm.serving.messages import (
    Abort,
    Delta,
    Failed,
    Finished,
    FromEngine,
    Guide,
    Logprob,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    TokenTrace,
)

SUBMIT = Submit(
    id="a",
    prompt=[1, 2, 2**40],
    params={"temperature": 0.1, "logit_bias": {5: -1.5}, "stop": ["\0é"], "ignore_eos": True, "top_k": -1},
    seed=2**63 - 1,
    adapter="x",
    drafting=False,
    timeout=1.5,
    salt=b"\0\xff",
    guide=Guide("regex", "a+"),
    trace=True,
)
ENTRY = [Logprob(3, -0.125, 1, "t")]
FROM_ENGINE: list[Message] = [
    Ready("0", "m", 10, 20, 9, [1], ["d"], True, 4, 5, 6),
    Failed("why"),
    Delta("a", [3], "t", [ENTRY], [TokenTrace("bonus", 7)]),
    Delta("b"),
    Finished("a", "stop", "END", 1, 2, 3, 4, 5, 6, [None, ENTRY]),
    Refused("a", "why"),
    Stats(running=3, plans={"ar": 2}, reached=[4, 5], accepted=[3, 1]),
]


async def read_all(data: bytes, step: int) -> list[FromEngine]:
    """What comes of bytes that arrive `step` at a time."""
    reader, messages = asyncio.StreamReader(), []
    for start in range(0, len(data), step):
        reader.feed_data(data[start : start + step])
    reader.feed_eof()
    while not reader.at_eof():
        messages += await read(reader)
    return messages


def test_the_engine_reads_what_was_sent_to_it() -> None:
    sent = frame([SUBMIT, Abort("a")]) + frame([]) + checked_frame(Abort("b"))
    assert list(receive(io.BytesIO(sent))) == [[SUBMIT, Abort("a")], [], [Abort("b")]]


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_the_server_reads_what_was_sent_to_it(step: int) -> None:
    sent = frame(FROM_ENGINE) + frame(FROM_ENGINE[:2])
    assert asyncio.run(read_all(sent, step)) == FROM_ENGINE + FROM_ENGINE[:2]


def test_an_end_within_a_list_is_an_end() -> None:
    with pytest.raises(EOFError):
        asyncio.run(read_all(frame(FROM_ENGINE)[:-1], 100))


def test_a_list_over_the_bound_is_not_sent_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = frame([SUBMIT])
    monkeypatch.setattr(channel, "MAX_FRAME", len(sent) - HEADER - 1)
    with pytest.raises(FrameError, match="bytes; at most"):
        frame([SUBMIT])
    with pytest.raises(FrameError, match="bytes; at most"):
        list(receive(io.BytesIO(sent)))
    with pytest.raises(FrameError, match="bytes; at most"):
        asyncio.run(read_all(sent, 1000))


def test_each_side_refuses_what_is_not_for_it() -> None:
    for body in (b"\xc1", b"\x93\x01", frame(FROM_ENGINE)[HEADER:]):
        with pytest.raises(FrameError, match="no list of messages"):
            list(receive(io.BytesIO(len(body).to_bytes(HEADER, "big") + body)))
    with pytest.raises(FrameError, match="no list of messages"):
        asyncio.run(read_all(frame([SUBMIT]), 1000))


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([True], {}),
        (["1"], {}),
        ([1.5], {}),
        ([2**64], {}),
        ([1], {"top_k": 2**70}),
        ([1], {"stop": "\ud800"}),
    ],
)
def test_what_the_engine_could_not_read_is_not_sent(prompt: list[int], params: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        checked_frame(Submit("a", prompt, params, 0))
