"""`Job`: the samples of one HTTP request, from their admission by the engine to their end."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import MISSING, fields
from time import perf_counter, time
from typing import Any

from fastapi import Request

from idlm.chat_template import check_ids
from idlm.errors import InputError
from idlm.params import SEED_LIMIT, SamplingParams
from idlm.serving.client import EngineDown, Ticket
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.messages import Delta, Finished, Submit
from idlm.serving.protocol import Generation, the_guide
from idlm.serving.responses import CompletionDetails, PromptDetails, Usage
from idlm.serving.state import Server, the_server

Event = tuple[int, Delta | Finished]
"""The number of a sample among the request's, and what happened to it."""
MOST_TOKENS = 2**31 - 1


class Job:
    """Samples that are with the engine: n of the first prompt, n of the second, and so on.

    Attributes:
        head: id, created, model and system_fingerprint of the answer.
        ends: the end of each sample, once it is there.
    """

    def __init__(self, server: Server, request: Request, model: str, id: str, samples: int) -> None:
        self.head: dict[str, Any] = {
            "id": id,
            "created": int(time()),
            "model": model,
            "system_fingerprint": server.fingerprint,
        }
        self.samples = samples
        self.tickets: list[Ticket] = []
        self.ends: dict[int, Finished] = {}
        self._facts: dict[str, Any] = request.scope["state"]["facts"]
        self._meters = server.meters
        self._started = perf_counter()

    async def events(self) -> AsyncIterator[Event]:
        """What happens to the samples, as it happens.

        Raises:
            EngineDown: the engine is gone. InputError: it refused a sample.
            ApiError: 408: the time is over. 503: the server ended it.
        """
        timings = [self._meters.timing(self._started) for _ in self.tickets]
        async for index, event in _merged(self.tickets):
            timings[index].see(event)
            if isinstance(event, Finished):
                self._end(index, event)
            elif "outputs" in self._facts:
                self._facts["outputs"][index] += event.text
            yield index, event

    def _end(self, index: int, event: Finished) -> None:
        self.ends[index] = event
        self._facts.setdefault("finish_reasons", []).append(event.reason)
        self._facts["completion_tokens"] = sum(end.completion_tokens for end in self.ends.values())
        if event.reason == "timeout":
            raise ApiError(408, "the request took longer than its timeout; raise it or ask for less", code="timeout")
        if event.reason == "error":  # the guide leaves nothing, or has become too costly
            raise ApiError(400, f"the output cannot go on: {event.stop}")
        if event.reason not in ("stop", "length"):
            raise ApiError(503, "the server ended the request", code="aborted")

    def cancel(self) -> None:
        """End every sample that has not ended."""
        if len(self.ends) < len(self.tickets):
            self._facts["cancelled"] = True
        for ticket in self.tickets:
            ticket.cancel()

    def usage(self) -> Usage:
        """Over all samples; call it when all have ended."""
        ends = [self.ends[index] for index in range(len(self.tickets))]
        prompts = ends[:: self.samples]
        prompt, completion = sum(end.prompt_tokens for end in prompts), sum(end.completion_tokens for end in ends)
        accepted, drafted = sum(end.accepted for end in ends), sum(end.drafted for end in ends)
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptDetails(sum(end.cached_tokens for end in prompts)),
            CompletionDetails(accepted, drafted - accepted),
        )


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[Event]:
    """The events of all tickets, whoever has one; the first error ends it."""
    if len(tickets) == 1:
        async for event in tickets[0]:
            yield 0, event
        return
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def pump(index: int, ticket: Ticket) -> None:
        try:
            async for event in ticket:
                queue.put_nowait((index, event))
            queue.put_nowait(None)
        except (EngineDown, InputError) as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(tickets)]
    left = len(tickets)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for one in pumps:
            one.cancel()


def admit(
    request: Request,
    body: Generation,
    prompts: Sequence[Sequence[int]],
    kind: str,
    params_for: Callable[[int], SamplingParams],
) -> Job:
    """Give the engine all samples of a request, or none.

    Args:
        kind: what the answer's id begins with.
        params_for: sampling parameters for a prompt of so many tokens.

    Raises:
        ApiError, InputError: the request cannot be run. Busy, EngineDown: not now.
    """
    server = the_server(request)
    engine = server.engine()
    job = Job(server, request, body.model, f"{kind}-{secrets.token_hex(16)}", body.samples)
    submits = []
    for ids in prompts:
        checked = check_ids(ids, engine)
        params = params_for(len(checked))
        params.check_vocabulary(engine.vocab_size)
        submits += _submits(server, request, body, checked, params)
    facts = request.scope["state"]["facts"]
    facts |= {"model": body.model, "prompt_tokens": sum(map(len, prompts)), "samples": len(submits)}
    if server.config.log_prompts:
        facts |= {"prompts": [server.prompts.decode(ids) for ids in prompts], "outputs": [""] * len(submits)}
    job.tickets = server.client.submit(submits)
    return job


def _submits(
    server: Server, request: Request, body: Generation, prompt: list[int], params: SamplingParams
) -> list[Submit]:
    """The samples of one prompt; sample i has seed + i, as in `LLM`."""
    target, limits = server.target(body.model), server.config.limits
    seed = secrets.randbelow(SEED_LIMIT) if params.seed is None else params.seed
    guide = the_guide(body.guides(), limits)
    return [
        Submit(
            id=secrets.token_hex(8),
            prompt=prompt,
            params=_fields(params),
            seed=(seed + sample) % SEED_LIMIT,
            adapter=target.adapter,
            drafting=target.drafting,
            priority=body.priority or 0,
            timeout=min(body.timeout or limits.timeout, limits.timeout),
            salt=request.scope["state"]["salt"] if server.config.salt_by_key else b"",
            guide=guide,
            trace=body.idlm.trace,
        )
        for sample in range(params.n)
    ]


def _fields(params: SamplingParams) -> dict[str, object]:
    """What differs from the defaults."""
    values = {one.name: (getattr(params, one.name), one) for one in fields(params)}
    return {
        name: value
        for name, (value, one) in values.items()
        if name not in ("n", "seed")
        and value != (one.default if one.default_factory is MISSING else one.default_factory())
    }


def room(asked: int | None, prompt_tokens: int, context: int, limits: Limits) -> int:
    """max_tokens of a sample: what is asked for, or all that the context and the server's bound leave.

    More than the context leaves is not refused: the output then ends at the context, as in `LLM`.

    Raises:
        ApiError: 400: more than the server's bound.
    """
    bound = MOST_TOKENS if limits.max_tokens is None else limits.max_tokens
    if asked is not None and asked > bound:
        raise ApiError(400, f"max_tokens={asked} is more than the {bound} of this server; lower it", "max_tokens")
    return min(bound if asked is None else asked, max(1, context - prompt_tokens))
