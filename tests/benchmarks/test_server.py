"""The server's benchmarks on a small scale: they run, and their checks hold."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from benchmarks.harness.client import Answer, ask_all
from benchmarks.harness.faults import disconnect, drain, kill
from benchmarks.harness.overload import open_loop, overload
from benchmarks.harness.process import HANG_SECONDS, ServerProcess, idlm_serve
from benchmarks.harness.results import percentile
from benchmarks.harness.workload import COMPLETIONS, bodies
from benchmarks.server_faults import holds

# the benchmark's own bounds in seconds are for a machine that does nothing else; here it counts
# what comes before what
COMMAND = idlm_serve("nano", "--threads", "1", "--branches", "all")


def test_faults() -> None:
    async def faults() -> None:
        with ServerProcess([*COMMAND, "--max-num-seqs", "8"]) as server:
            found = await disconnect(server, "nano", 40, 16, HANG_SECONDS)
            assert holds(found), found
            assert found["left"]["in the answer"] > 0
            assert all(found["statuses"].values())
            found = await overload(server, "nano", 2, 3.0)
            assert (
                found["overload"]["hanging"] == 0
                and sum(found["overload"]["statuses"].values()) >= 8
            ), found
            found = await kill(server, "nano", 1, 8, HANG_SECONDS)
            assert holds(found) and set(found["told_by_route"].values()) == {2}, found

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(faults())


def test_an_overload_in_no_time_has_requests_all_the_same() -> None:
    """As on a machine so slow that no request is due before the time is over."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
        writer.write(
            b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            answers, hanging = await open_loop(port, 1000.0, 0.0, 3, "nano")
        assert [answer.status for answer in answers] == [429] * 3 and hanging == 0

    asyncio.run(main())


def test_drain() -> None:
    found = asyncio.run(drain(COMMAND, 8, 0.1))
    assert holds(found) and found["told_with_an_error"] > 0, found


def test_a_server_that_does_not_start_is_reported_with_its_log() -> None:
    with (
        pytest.raises(RuntimeError, match="no/such/model"),
        ServerProcess(idlm_serve("no/such/model")),
    ):
        pass


def test_what_an_answer_was() -> None:
    stream = {"content-type": "text/event-stream; charset=utf-8"}
    told = Answer(
        0.0,
        9,
        200,
        stream,
        [(1.0, b'data: {"choices": []}\n\n'), (2.0, b'data: {"error": {"a": 1}}\n\n')],
    )
    assert told.error == {"a": 1} and not told.finished and (told.first, told.last) == (1.0, 2.0)
    assert Answer(
        0.0, 9, 200, stream, [(1.0, b"data: {}\n\ndata: [DONE]\n\n")], complete=True
    ).finished
    named = 'event: response.%s\ndata: {"type": "response.%s", "response": {"error": {"c": 1}}}\n\n'
    for name, error, finished in (("failed", {"c": 1}, False), ("completed", None, True)):
        event = (named % (name, name)).encode()
        answer = Answer(0.0, 9, 200, stream, [(1.0, event)], complete=True)
        assert (answer.error, answer.finished) == (error, finished)
    assert not Answer(0.0, 9, 503, {}, [(1.0, b'{"error": {"b": 2}}')], complete=True).finished
    assert not Answer(0.0).finished


def test_percentiles_are_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0 and percentile(list(range(1, 101)), 0.99) == 99


def test_a_port_without_a_server_is_an_error() -> None:
    with pytest.raises((ConnectionError, ExceptionGroup)):
        asyncio.run(ask_all(1, COMPLETIONS, bodies("nano", 1), 1))
