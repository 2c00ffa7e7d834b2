"""`Server`: the parts that every route needs. `Job`: the samples of one HTTP request."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter, time
from typing import Any

from fastapi import Request
from msgspec import UNSET, UnsetType

from idlm import __version__
from idlm.errors import InputError
from idlm.params import SamplingParams, Thinking
from idlm.serving.client import EngineClient, Ticket
from idlm.serving.config import AR_SUFFIX, Limits, ServeConfig
from idlm.serving.errors import ApiError, EngineDown
from idlm.serving.observe import Meters, Timing
from idlm.serving.prompts import Prompts
from idlm.serving.reasoning import Reasoner
from idlm.serving.responses import CompletionDetails, PromptDetails, Usage
from idlm.serving.schema import CompletionRequest
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.vllm_metrics import RequestMetrics, SpeculativeDecoding
from idlm.serving.wire import Delta, Finished, Ready, Submit

Body = ChatRequest | CompletionRequest
Event = tuple[int, Delta | Finished]
"""The index of a sample in its request, and its event."""
MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """What a model name stands for: an adapter (None: the engine's default), with or without
    drafts."""

    adapter: str | None = None
    drafting: bool = True


@dataclass
class Server:
    """The parts of a server.

    Attributes:
        started: seconds since the epoch.
    """

    config: ServeConfig
    client: EngineClient
    prompts: Prompts
    meters: Meters
    reasoner: Reasoner | None = None
    started: int = field(default_factory=lambda: int(time()))

    @property
    def targets(self) -> dict[str, Target]:
        """The model itself, its AR variant and the adapters, by name."""
        name = self.config.name
        adapters = {adapter: Target(adapter) for adapter in self.client.adapters}
        return {name: Target(), name + AR_SUFFIX: Target(drafting=False)} | adapters

    @property
    def fingerprint(self) -> str:
        """Changes with the version and the engine's options, which may change an output."""
        digest = hashlib.blake2b(repr((__version__, self.config.worker)).encode(), digest_size=6)
        return f"idlm-{digest.hexdigest()}"

    def name(self, model: str | None) -> str:
        """The name of the model that a request means: the one it gives, or the base."""
        return model or self.config.name

    def target(self, model: str | None) -> Target:
        """The target of a model name; None: the base with its default adapter.

        Raises:
            ApiError: 404: no such model.
        """
        model = self.name(model)
        if model not in self.targets:
            names = ", ".join(self.targets)
            raise ApiError(
                404,
                f"model {model[:80]!r} is not served here; use {names}",
                "model",
                "model_not_found",
            )
        return self.targets[model]

    def accept(self, body: Body) -> None:
        """Check a request before any work is done for it.

        Raises:
            ApiError: there is no such model, or a field is out of bounds.
            EngineDown, Busy: there is no engine, or no room in the queue.
        """
        self.target(body.model)
        body.check(self.config.limits)
        self.engine()
        self.client.quota.check()

    def engine(self) -> Ready:
        """What the engine reported when it became ready.

        Raises:
            EngineDown: it is not ready now.
        """
        if self.client.info is None:
            raise EngineDown("the engine is starting; try again soon")
        if not self.client.ready:
            raise EngineDown(
                "the engine is being started again, or the server is shutting down; try again soon"
            )
        return self.client.info


def the_server(request: Request) -> Server:
    """The `Server` of the application that received the request."""
    server: Server = request.app.state.server
    return server


class Job:
    """The samples of one request in the engine: n of the first prompt, n of the second, and so on.

    Attributes:
        head: id, created, model and system_fingerprint of the response.
        prompts: the ids of each prompt.
        ends: the end of each finished sample, by its index.
        tokens: by sample, how many tokens have come so far.
        thinking: the thoughts that the samples may begin with.
        reasoning_tokens: tokens of thoughts so far, of all samples.
    """

    def __init__(
        self, server: Server, request: Request, body: Body, prompts: Sequence[list[int]]
    ) -> None:
        self.head: dict[str, Any] = {
            "id": f"{body.kind}-{secrets.token_hex(16)}",
            "created": int(time()),
            "model": server.name(body.model),
            "system_fingerprint": server.fingerprint,
        }
        self.samples, self.prompts = body.samples, prompts
        self.tokens = [0] * (len(prompts) * body.samples)
        self.tickets: list[Ticket] = []
        self.ends: dict[int, Finished] = {}
        self.thinking: Thinking | None = None
        self.reasoning_tokens = 0
        self._facts: dict[str, Any] = request.scope["state"]["facts"]
        self._meters = server.meters
        self._started = perf_counter()

    async def events(self) -> AsyncIterator[Event]:
        """The events of all samples in the order in which they come.

        Raises:
            EngineDown: the engine process ended. InputError: it refused a sample.
            ApiError: 408: the timeout is over. 503: the engine aborted the sample.
        """
        timings = [Timing(self._meters, self._started) for _ in self.tickets]
        states = [self.thinking.first if self.thinking else None for _ in self.tickets]
        async for index, event in _merged(self.tickets):
            timings[index].see(event)
            if isinstance(event, Delta):
                states[index] = self._count_thoughts(states[index], event.tokens)
            if isinstance(event, Finished):
                self._end(index, event)
            else:
                self.tokens[index] += len(event.tokens)
                if "outputs" in self._facts:
                    self._facts["outputs"][index] += event.text
            yield index, event

    def _count_thoughts(self, state: int | None, tokens: Sequence[int]) -> int | None:
        """Add the tokens of thoughts among `tokens`; returns the state after them."""
        thinking = self.thinking
        if thinking is None:
            return None
        for token in () if state is None else tokens:
            state = thinking.after(state, token)
            self.reasoning_tokens += state is not None and state > 0
        return state

    def _end(self, index: int, event: Finished) -> None:
        self.ends[index] = event
        self._facts.setdefault("finish_reasons", []).append(event.reason)
        self._facts["completion_tokens"] = sum(end.completion_tokens for end in self.ends.values())
        if event.reason == "timeout":
            raise ApiError(
                408,
                "the request took longer than its timeout; raise it or ask for less",
                code="timeout",
            )
        if event.reason == "error":  # guide and bans leave no token, or it exceeds its limits
            raise ApiError(400, f"the output cannot go on: {event.stop}")
        if event.reason not in ("stop", "length"):
            raise ApiError(503, "the server ended the request", code="aborted")

    def cancel(self) -> None:
        """Abort every sample that has not finished."""
        if len(self.ends) < len(self.tickets):
            self._facts["cancelled"] = True
        for ticket in self.tickets:
            ticket.cancel()

    def usage_so_far(self) -> Usage:
        """Token counts of all samples until now."""
        prompt, completion = sum(map(len, self.prompts)), sum(self.tokens)
        return Usage(prompt, completion, prompt + completion)

    def usage(self) -> Usage:
        """Token counts of all samples; call it when all have finished."""
        ends = [self.ends[index] for index in range(len(self.tickets))]
        prompts = ends[:: self.samples]
        prompt, completion = (
            sum(end.prompt_tokens for end in prompts),
            sum(end.completion_tokens for end in ends),
        )
        accepted, drafted = sum(end.accepted for end in ends), sum(end.drafted for end in ends)
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptDetails(sum(end.cached_tokens for end in prompts)),
            CompletionDetails(accepted, drafted - accepted, self.reasoning_tokens),
        )

    def metrics(self) -> RequestMetrics | UnsetType:
        """The acceptance of drafts, if there is a single sample; call it when it has finished."""
        if len(self.tickets) > 1 or not self.ends[0].accepted_at:
            return UNSET
        return RequestMetrics(SpeculativeDecoding.of(self.ends[0]))


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[Event]:
    """The events of all tickets as they come; the first error ends it."""
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
        for task in pumps:
            task.cancel()


def admit(request: Request, body: Body, prompts: Sequence[list[int]]) -> Job:
    """Submit all samples of a request to the engine, or none.

    Raises:
        ApiError, InputError: the request cannot be run. Busy, EngineDown: it cannot be run now.
    """
    server = the_server(request)
    engine, limits = server.engine(), server.config.limits
    prompts = [body.truncated(ids, engine.context) for ids in prompts]
    job = Job(server, request, body, prompts)
    facts = request.scope["state"]["facts"]
    guide = body.form_or_calls(body.guide(limits), server.prompts)
    facts |= {
        "model": server.name(body.model),
        "prompt_tokens": sum(map(len, prompts)),
        "samples": len(prompts) * body.samples,
    }
    submits = []
    for ids in prompts:
        job.thinking = body.thoughts(server.reasoner, ids)
        bounds = (len(ids), engine.context, limits, engine.sampling.get("max_tokens"))
        params = body.sampling(room(body.asked_tokens, *bounds), guide, engine.sampling)
        params = replace(params, thinking=job.thinking)
        if job.thinking is not None and server.reasoner is not None and server.reasoner.special:
            params = replace(params, skip_special_tokens=False)
        submits += [_submit(server, request, body, ids, sample) for sample in params.samples()]
    job.tickets = server.client.submit(submits)
    if server.config.log_prompts:
        facts |= {
            "prompts": [server.prompts.decode(ids) for ids in prompts],
            "outputs": [""] * len(submits),
        }
    return job


def _submit(
    server: Server, request: Request, body: Body, prompt: list[int], params: SamplingParams
) -> Submit:
    target = server.target(body.model)
    return Submit(
        id=secrets.token_hex(8),
        prompt=prompt,
        params=params,
        adapter=target.adapter,
        drafting=target.drafting,
        priority=body.priority or 0,
        timeout=body.timeout,
        salt=_salt(server, request, body),
        trace=body.idlm.traced,
        windows=body.idlm.windows,
    )


def _salt(server: Server, request: Request, body: Body) -> bytes:
    """What has to be equal for two requests to share a cached prefix, apart from the prefix."""
    key = request.scope["state"]["salt"] if server.config.salt_by_key else b""
    own = b"" if body.cache_salt is None else hashlib.sha256(body.cache_salt.encode()).digest()
    return bytes(key + own)


def room(
    requested: int | None,
    prompt_tokens: int,
    context: int,
    limits: Limits,
    default: int | None = None,
) -> int:
    """max_tokens of a sample: what the request asks for, else the model's `default`, else what the
    context and `limits` leave.

    A request for more than the context leaves is accepted: the output then ends at the context, as
    in `LLM`.

    Raises:
        InputError: more than `limits.max_tokens`.
    """
    bound = MOST_TOKENS if limits.max_tokens is None else limits.max_tokens
    if requested is not None and requested > bound:
        raise InputError(
            f"max_tokens={requested} is more than the {bound} of this server; lower it",
            "max_tokens",
        )
    if requested is None:
        requested = bound if default is None else min(default, bound)
    return min(requested, max(1, context - prompt_tokens))
