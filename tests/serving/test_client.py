"""The client with a real engine process of the bundled model; all tests share it and leave it
empty."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from idlm import LLM, Guide, InputError, SamplingParams
from idlm.config import EngineConfig
from idlm.engine.request import Result
from idlm.serving import client as client_module
from idlm.serving.client import EngineClient, Ticket
from idlm.serving.config import Limits, WorkerConfig
from idlm.serving.errors import Busy, EngineDown
from idlm.serving.wire import Delta, Finished, Submit
from tests.serving.clock import Clock
from tests.serving.conftest import STALL_SECONDS, workers
from tests.waiting import HANG_SECONDS, soon

CONFIG = WorkerConfig(
    "nano", dtype="float64", engine=EngineConfig(branches="all", max_num_seqs=8, threads=1)
)
LIMITS = Limits(queue_requests=16, timeout=2 * STALL_SECONDS)
Run = Callable[[Coroutine[Any, Any, None]], None]


@contextmanager
def serving(config: WorkerConfig) -> Iterator[tuple[asyncio.Runner, EngineClient]]:
    async def start() -> EngineClient:
        client = EngineClient(config, LIMITS)
        await client.start()
        return client

    others = workers()
    with asyncio.Runner(loop_factory=Clock) as runner:
        client = runner.run(start())
        yield runner, client
        runner.run(client.close())
        assert workers() == others


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[asyncio.Runner, EngineClient]]:
    with serving(CONFIG) as (runner, client):
        runner.run(client.wait_ready(HANG_SECONDS))
        yield runner, client


@pytest.fixture
def client(served: tuple[asyncio.Runner, EngineClient]) -> Iterator[EngineClient]:
    runner, client = served
    yield client
    runner.run(settled(client))


@pytest.fixture
def run(served: tuple[asyncio.Runner, EngineClient]) -> Run:
    return served[0].run


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano", stride=4, branches="all", dtype="float64")


def submit(id: str, prompt: str | list[int] = "Tom has 3 apples.", **options: Any) -> Submit:
    """A sample; `fields` are options of `Submit` or of `SamplingParams`."""
    fields = {name: options.pop(name) for name in Submit.__struct_fields__ if name in options}
    ids = [5 + ord(character) % 50 for character in prompt] if isinstance(prompt, str) else prompt
    return Submit(id, ids, SamplingParams(**{"max_tokens": 30, "seed": 0} | options), **fields)


def endless(count: int, tokens: int = 480) -> list[Submit]:
    return [submit(f"long-{index}", max_tokens=tokens, ignore_eos=True) for index in range(count)]


async def collect(ticket: Ticket) -> tuple[list[Delta], Finished]:
    *deltas, finished = [event async for event in ticket]
    assert isinstance(finished, Finished)
    return [event for event in deltas if isinstance(event, Delta)], finished


async def settled(client: EngineClient) -> None:
    """Wait until the engine reports that it has no samples."""
    await soon(
        lambda: (
            not (
                client.quota.samples
                or client.quota.tokens
                or client.stats.running
                or client.stats.waiting
            )
        )
    )
    assert client.stats.pages_live == 0


def check_same(result: Result, deltas: list[Delta], finished: Finished) -> None:
    assert [token for delta in deltas for token in delta.tokens] == result.token_ids
    assert "".join(delta.text for delta in deltas) == result.text
    assert (finished.reason, finished.stop) == (result.finish_reason, result.stop_reason)
    assert finished.completion_tokens == len(result.token_ids)
    assert finished.prompt_tokens == len(result.prompt_token_ids)
    assert (finished.drafted, finished.accepted) == (sum(result.reached), sum(result.accepted))
    assert finished.forwards == result.forwards


def test_eight_at_once_are_what_generate_gives(client: EngineClient, run: Run, llm: LLM) -> None:
    submits = [
        submit(str(i), prompt=f"{i} and {i}", temperature=i % 2, seed=100 + i) for i in range(8)
    ]
    results = llm.generate([s.prompt for s in submits], [s.params for s in submits])

    async def check() -> None:
        ends = await asyncio.gather(*[collect(ticket) for ticket in client.submit(submits)])
        for result, (deltas, finished) in zip(results, ends, strict=True):
            check_same(result, deltas, finished)

    run(check())


def test_logprobs_and_trace(client: EngineClient, run: Run, llm: LLM) -> None:
    sample = submit("a", temperature=0, logprobs=2, prompt_logprobs=1, trace=True)
    (result,) = llm.generate(sample.prompt, sample.params)

    async def check() -> None:
        deltas, finished = await collect(client.submit([sample])[0])
        check_same(result, deltas, finished)
        logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
        assert result.logprobs is not None and result.prompt_logprobs is not None
        for entry, expected in zip(logprobs, result.logprobs, strict=True):
            assert [(token, each.rank) for token, each in entry.items()] == [
                (t, e.rank) for t, e in expected.items()
            ]
            assert [each.logprob for each in entry.values()] == pytest.approx(
                [e.logprob for e in expected.values()]
            )
        assert finished.prompt_logprobs is not None and finished.prompt_logprobs[0] is None
        assert [next(iter(entry or ())) for entry in finished.prompt_logprobs[1:]] == sample.prompt[
            1:
        ]
        assert [source for delta in deltas for source in delta.sources or []] == result.sources
        assert sum(bool(delta.tokens) for delta in deltas) == result.forwards

    run(check())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"adapter": "none"}, "adapter 'none' is not loaded"),
        ({"guide": Guide("regex", "(")}, "unclosed group"),
    ],
)
def test_one_refused_does_not_touch_the_other(
    client: EngineClient, run: Run, bad: dict[str, Any], reason: str
) -> None:
    async def check() -> None:
        refused, good = client.submit(
            [submit("bad", **bad), submit("good", max_tokens=3, ignore_eos=True)]
        )
        with pytest.raises(InputError, match=reason):
            await collect(refused)
        assert (await collect(good))[1].completion_tokens == 3

    run(check())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": []}, "a prompt has 0 tokens; this model takes 1 to 511"),
        ({"prompt": [3]}, "holds the MASK token 3"),
        ({"prompt": [640]}, "outside the vocabulary"),
        ({"prompt": [5] * 512}, "a prompt has 512 tokens"),
        ({"prompt": [True]}, "True is not a whole number"),
        ({"prompt": ["1"]}, "'1' is not a whole number"),
        ({"prompt": [1.5]}, "1.5 is not a whole number"),
        ({"prompt": [2**64]}, "of more than 64 bits"),
        ({"stop": "\ud800"}, "half of a surrogate pair"),
        ({"top_k": 2**70}, "top_k="),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temprature": 1.0}, "temprature"),
        ({"stop_token_ids": [640]}, "stop_token_ids names token 640"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"timeout": float("nan")}, "timeout=nan"),
    ],
)
def test_what_no_engine_takes_is_not_sent(
    client: EngineClient, run: Run, bad: dict[str, Any], reason: str
) -> None:
    async def check() -> None:
        with pytest.raises((InputError, TypeError), match=reason):
            client.submit([submit("good"), submit("bad", **bad)])
        assert client.quota.samples == 0
        (good,) = client.submit([submit("good", max_tokens=3, ignore_eos=True)])
        assert (await collect(good))[1].completion_tokens == 3

    run(check())


def test_cancel_frees_slot_and_pages_in_any_state(client: EngineClient, run: Run) -> None:
    async def check() -> None:
        tickets = client.submit(endless(10))  # two of them wait
        await anext(tickets[0])
        for ticket in tickets * 2:
            ticket.cancel()
        ends = [(await collect(ticket))[1].reason for ticket in tickets]
        assert ends == ["abort"] * 10
        await settled(client)

    run(check())


def test_busy_takes_no_sample_and_ends_with_the_load(client: EngineClient, run: Run) -> None:
    async def check() -> None:
        tickets = client.submit(endless(14))
        with pytest.raises(Busy) as busy:
            client.submit([submit("a"), submit("b"), submit("c")])
        assert busy.value.retry_after >= 1
        assert client.quota.samples == 14 and client.quota.tokens == 14 * (17 + 480)
        for ticket in tickets:
            ticket.cancel()
        await settled(client)
        client.submit([submit("a")])[0].cancel()

    run(check())


def test_a_timeout_ends_a_sample_as_it_is(client: EngineClient, run: Run) -> None:
    async def check() -> None:
        (ticket,) = client.submit([submit("a", timeout=0.05, max_tokens=480, ignore_eos=True)])
        assert (await collect(ticket))[1].reason == "timeout"

    run(check())


def test_a_killed_engine_tells_all_and_comes_back(client: EngineClient, run: Run) -> None:
    async def check() -> None:
        before, restarts = await collect(client.submit([submit("before")])[0]), client.restarts
        number = len(workers())
        tickets = client.submit(endless(8))
        await asyncio.gather(*[anext(ticket) for ticket in tickets])
        workers()[-1].kill()
        ends = await asyncio.gather(
            *[collect(ticket) for ticket in tickets], return_exceptions=True
        )
        assert [type(end) for end in ends] == [EngineDown] * 8
        # by its end and no limit, those are hours; and long before there is another
        assert (client.ready, client.quota.samples, client.quota.tokens) == (False, 0, 0)
        with pytest.raises(EngineDown, match="being started"):
            client.submit([submit("now")])
        tickets[0].cancel()
        await client.wait_ready(HANG_SECONDS)
        assert client.ready and client.restarts == restarts + 1 and len(workers()) == number
        assert (await collect(client.submit([submit("before")])[0]))[0] == before[0]

    run(check())


def test_a_stalled_engine_is_told_of_and_replaced(client: EngineClient, run: Run) -> None:
    async def check() -> None:
        clock = asyncio.get_running_loop()
        assert isinstance(clock, Clock)
        number, restarts = len(workers()), client.restarts
        os.kill(workers()[-1].pid, signal.SIGSTOP)
        tickets = client.submit([submit("a", timeout=HANG_SECONDS), submit("b")])
        overdue, other = (asyncio.create_task(collect(ticket)) for ticket in tickets)
        await clock.forward(HANG_SECONDS + client_module.GUARD_SECONDS / 2)
        assert not overdue.done() and client.quota.samples == 2
        await clock.forward(client_module.GUARD_SECONDS)
        with pytest.raises(EngineDown, match="within the request's timeout"):
            await overdue
        assert not other.done() and client.quota.samples == 2
        await clock.forward(STALL_SECONDS / 3)
        assert not other.done() and client.quota.samples == 2
        await clock.forward(STALL_SECONDS)
        with pytest.raises(EngineDown, match="being started"):
            await other
        assert client.quota.samples == 0
        await client.wait_ready(HANG_SECONDS)
        assert client.restarts == restarts + 1 and len(workers()) == number

    run(check())


def test_drain_waits_then_ends_the_rest(client: EngineClient, run: Run) -> None:
    async def check() -> None:
        (short,) = client.submit([submit("short", max_tokens=3)])
        await client.drain(HANG_SECONDS)
        assert (await collect(short))[1].reason in ("stop", "length")
        with pytest.raises(EngineDown, match="shutting down"):
            client.submit([submit("late")])
        assert not client.ready
        client._draining = False  # as no server does: to drain once more
        (long,) = client.submit(endless(1))
        await client.drain(0.05)
        with pytest.raises(EngineDown, match="shutting down"):
            await collect(long)
        client._draining = False

    run(check())


def test_a_start_that_cannot_succeed_says_why() -> None:
    with serving(WorkerConfig("no-such-model")) as (runner, client):
        with pytest.raises(InputError, match="no-such-model"):
            runner.run(client.wait_ready(HANG_SECONDS))
        assert not client.ready
