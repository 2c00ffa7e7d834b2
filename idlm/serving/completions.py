"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from idlm.serving.jobs import Job, admit, room
from idlm.serving.messages import Delta, Finished, Logprob
from idlm.serving.prompts import Prompts
from idlm.serving.protocol_completions import CompletionRequest
from idlm.serving.responses import Completion, CompletionChoice, CompletionLogprobs, FinishReason, Usage
from idlm.serving.state import Server, the_server
from idlm.serving.stream import LOWEST_LOGPROB, Sample, respond
from idlm.serving.trace import trace_of


async def completions(request: Request, body: CompletionRequest) -> Response:
    """Complete prompts.

    Raises:
        ApiError, InputError, Busy, EngineDown: what became of it instead.
    """
    server = the_server(request)
    engine, limits = server.accept(body), server.config.limits
    prompts = await server.prompts.in_thread(lambda: _encode(server, body))
    asked = 1 if body.prompt_only else body.asked_tokens
    job = admit(
        request,
        body,
        prompts,
        "cmpl",
        lambda length: body.sampling(
            room(asked, length, engine.context, limits),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        ),
    )
    answer = CompletionAnswer(job, body, server.prompts, prompts)
    return await respond(request, job, answer, bool(body.stream), body.include_usage)


def _encode(server: Server, body: CompletionRequest) -> list[list[int]]:
    return [server.prompts.text(one) if isinstance(one, str) else one for one in body.prompts]


class CompletionAnswer:
    """The answer to one completions request, whole or in chunks. Choice i * n + k is sample k of prompt i."""

    def __init__(self, job: Job, body: CompletionRequest, prompts: Prompts, ids: Sequence[Sequence[int]]) -> None:
        self._job, self._body, self._prompts, self._ids = job, body, prompts, ids
        self._written = [0] * len(job.tickets)  # characters, for the offsets of a stream
        self._begun: set[int] = set()

    def response(self, samples: Sequence[Sample], usage: Usage) -> Completion:
        """All of it."""
        if self._body.prompt_only:
            samples = [Sample() for _ in samples]
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        choices = [self._choice(index, sample) for index, sample in enumerate(samples)]
        return Completion(**self._job.head, choices=choices, usage=usage)

    def _choice(self, index: int, sample: Sample) -> CompletionChoice:
        end = self._job.ends[index]
        entries: list[list[Logprob] | None] = [*(end.prompt_logprobs or ()), *sample.logprobs]
        first = self._prompts.decode(self._ids[index // self._job.samples][:1])
        return CompletionChoice(
            index,
            self._echoed(index) + sample.text,
            "length" if self._body.prompt_only else _reason(end),
            logprobs(entries, first) if self._body.logprobs is not None else None,
            trace_of(self._prompts, sample.tokens, sample.trace, end) if self._body.idlm.trace else UNSET,
        )

    def _echoed(self, index: int) -> str:
        """The text that echo puts before the sample."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[index // self._job.samples]
        return prompt if isinstance(prompt, str) else self._prompts.decode(prompt)

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """What is new; the last chunk of a sample has its reason to end."""
        text = ""
        if index not in self._begun:
            self._begun.add(index)
            text = self._echoed(index)
        if isinstance(event, Delta):
            return self._delta(index, text + event.text, event)
        last = CompletionChoice(index, text, _reason(event))
        if self._body.idlm.trace:
            last.idlm = trace_of(self._prompts, [], [], event)
        return [self._chunk(last)]

    def _delta(self, index: int, text: str, event: Delta) -> list[msgspec.Struct]:
        """What a step adds; nothing where its text is held and nobody asked for more."""
        choice = CompletionChoice(index, text)
        if self._body.logprobs is not None:
            choice.logprobs = logprobs(event.logprobs or [], offset=self._written[index])
            self._written[index] += sum(map(len, choice.logprobs.tokens))
        if self._body.idlm.trace:
            choice.idlm = trace_of(self._prompts, event.tokens, event.trace or [])
        wanted = text or choice.logprobs is not None or choice.idlm is not UNSET
        return [self._chunk(choice)] if wanted else []

    def _chunk(self, *choices: CompletionChoice, usage: Usage | None = None) -> Completion:
        shown: Usage | None | UnsetType = usage if self._body.include_usage else UNSET
        return Completion(**self._job.head, choices=list(choices), usage=shown)

    def usage_chunk(self, usage: Usage) -> Completion:
        """The last one."""
        return self._chunk(usage=usage)


def _reason(end: Finished) -> FinishReason:
    return "length" if end.reason == "length" else "stop"


def logprobs(entries: Sequence[Sequence[Logprob] | None], first: str = "", offset: int = 0) -> CompletionLogprobs:
    """OpenAI's four lists; `first` is the text of a token without a law, the first of a prompt.

    Offsets count the tokens' own texts. Where two tokens have the same text, the likelier one's number is shown.
    """
    shown = CompletionLogprobs([], [], [], [])
    for entry in entries:
        token = first if entry is None else entry[0].text
        shown.tokens.append(token)
        shown.text_offset.append(offset)
        shown.token_logprobs.append(None if entry is None else max(entry[0].logprob, LOWEST_LOGPROB))
        shown.top_logprobs.append(None if entry is None else _by_text(entry))
        offset += len(token)
    return shown


def _by_text(entry: Sequence[Logprob]) -> dict[str, float]:
    rising = sorted(entry, key=lambda one: one.logprob)
    return {one.text: max(one.logprob, LOWEST_LOGPROB) for one in rising}
