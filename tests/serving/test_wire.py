from __future__ import annotations

import asyncio
import io

import pytest

from idlm import Guide, SamplingParams
from idlm.engine.request import Logprob
from idlm.serving import wire
from idlm.serving.wire import (
    HEADER,
    Abort,
    Delta,
    Failed,
    Finished,
    FrameError,
    FromEngine,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    frame,
    read,
    receive,
)

SUBMIT = Submit(
    id="a",
    prompt=[1, 2, 2**40],
    params=SamplingParams(
        temperature=0.1,
        logit_bias={5: -1.5},
        stop=["\0é"],
        ignore_eos=True,
        top_k=-1,
        stop_token_ids=(7,),
        prompt_logprobs=2,
        guide=Guide("regex", "a+"),
        seed=2**63 - 1,
    ),
    adapter="x",
    drafting=False,
    timeout=1.5,
    salt=b"\0\xff",
    trace=True,
)
ENTRY = {3: Logprob(-0.125, 2), 1: Logprob(-0.5, 1)}
FROM_ENGINE: list[Message] = [
    Ready(10, 9, 20),
    Failed("why"),
    Delta("a", [3], "t", ["bonus"], [ENTRY]),
    Delta("b"),
    Finished("a", "stop", "END", 1, 2, 3, 4, 5, 6, 7, 8, [9, 10], [None, ENTRY]),
    Refused("a", "why"),
    Stats(running=3, plans={"ar": 2}, reached=[4, 5], accepted=[3, 1]),
]


async def read_all(data: bytes, step: int) -> list[FromEngine]:
    """The messages in bytes that arrive `step` at a time."""
    reader, messages = asyncio.StreamReader(), []
    for start in range(0, len(data), step):
        reader.feed_data(data[start : start + step])
    reader.feed_eof()
    while not reader.at_eof():
        messages += await read(reader)
    return messages


def test_the_engine_reads_what_was_sent_to_it() -> None:
    sent = frame([SUBMIT, Abort("a")]) + frame([]) + frame([Abort("b")])
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
    monkeypatch.setattr(wire, "MAX_FRAME", len(sent) - HEADER - 1)
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


def test_log_probabilities_come_in_their_order() -> None:
    (message,) = asyncio.run(read_all(frame([FROM_ENGINE[2]]), 100))
    assert (
        isinstance(message, Delta)
        and message.logprobs is not None
        and [*message.logprobs[0]] == [3, 1]
    )


def test_parameters_are_checked_where_they_are_read() -> None:
    body = frame([Submit("a", [1], SamplingParams(top_k=77))])[HEADER:]
    assert body.count(b"top_k\x4d") == 1
    bad = body.replace(b"top_k\x4d", b"top_k\xfe")  # -2
    with pytest.raises(FrameError, match="top_k=-2"):
        list(receive(io.BytesIO(len(bad).to_bytes(HEADER, "big") + bad)))


@pytest.mark.parametrize(
    "submit", [Submit("a", [2**64], SamplingParams()), Submit("\ud800", [1], SamplingParams())]
)
def test_what_has_no_form_is_not_sent(submit: Submit) -> None:
    with pytest.raises(FrameError):
        frame([submit])
