"""From a `Job` to the body of a response of chat or completions, whole or in chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from idlm.engine.request import Logprob
from idlm.serving.errors import ApiError
from idlm.serving.jobs import Body, Job
from idlm.serving.output import Part, output_reader
from idlm.serving.prompts import Prompts
from idlm.serving.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChoiceDelta,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Message,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
    Trace,
    Usage,
)
from idlm.serving.schema import CompletionRequest
from idlm.serving.schema_chat import ChatRequest
from idlm.serving.sending import Streamable, named_event
from idlm.serving.tools import Family
from idlm.serving.traces import Tracer
from idlm.serving.wire import Delta, Finished

Entry = Mapping[int, Logprob]
"""Log-probabilities at one position by token id; the sampled token is the first."""
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for log 0, as in OpenAI's API; JSON has no infinity."""


class Answer(Streamable):
    """A response in the form of chat and completions."""

    def __init__(self, job: Job, body: Body, prompts: Prompts) -> None:
        self.job, self.prompts = job, prompts
        self.include_usage, self._continuous = body.include_usage, body.continuous_usage
        self._with_ids = bool(body.return_token_ids)
        self._tracer = Tracer(len(job.tickets), prompts.token) if body.idlm.traced else None
        self._begun: set[int] = set()

    @abstractmethod
    def chunk(self, choices: list[Any], usage: Usage | None = None) -> msgspec.Struct:
        """A chunk of a stream; the last one has no choices, but the usage if the request asked for
        it."""

    def encode(self, chunks: Sequence[msgspec.Struct]) -> bytes:
        return b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks)

    def last(self) -> bytes:
        usage = [self.chunk([], self.job.usage())] if self.include_usage else []
        return self.encode(usage) + DONE

    def failure(self, error: ApiError) -> bytes:
        return self.encode([error.body])

    def begins(self, index: int) -> bool:
        """Whether this is the first call for a sample."""
        first = index not in self._begun
        self._begun.add(index)
        return first

    def shown(self, usage: Usage | None) -> Usage | None | UnsetType:
        """The value of a chunk's field `usage`."""
        if usage is None and self._continuous:
            return self.job.usage_so_far()
        return usage if self.include_usage else UNSET

    def ids(self, *deltas: Delta) -> list[int] | UnsetType:
        """The value of the field `token_ids`."""
        return [token for delta in deltas for token in delta.tokens] if self._with_ids else UNSET

    def prompt_ids(self, index: int) -> list[int] | UnsetType:
        """The value of the field `prompt_token_ids`."""
        return self.job.prompts[index // self.job.samples] if self._with_ids else UNSET

    def prompt_logprobs(self, index: int, top: int | None) -> PromptLogprobs | UnsetType:
        """The value of the field `prompt_logprobs`; `top` is that of the request."""
        entries = self.job.ends[index].prompt_logprobs
        if top is None or entries is None:
            return UNSET
        return [None if entry is None else self._prompt_logprob(entry, top) for entry in entries]

    def _prompt_logprob(self, entry: Entry, top: int) -> dict[str, PromptLogprob]:
        return {
            str(token): PromptLogprob(
                max(found.logprob, LOWEST_LOGPROB), found.rank, self.prompts.token(token)
            )
            for token, found in likeliest(entry, top).items()
        }

    def trace(self, index: int, *events: Delta | Finished) -> Trace | UnsetType:
        """The value of the field `idlm`."""
        return UNSET if self._tracer is None else self._tracer.of(index, *events)


class ChatAnswer(Answer):
    """Builds the response to a chat request."""

    def __init__(
        self, job: Job, body: ChatRequest, prompts: Prompts, family: Family | None
    ) -> None:
        super().__init__(job, body, prompts)
        self._body = body
        self._readers = [output_reader(body, job.thinking, prompts, family) for _ in job.tickets]

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> ChatCompletion:
        choices = [self._choice(index, deltas) for index, deltas in enumerate(samples)]
        return ChatCompletion(
            **self.job.head,
            choices=choices,
            usage=usage,
            prompt_token_ids=self.prompt_ids(0),
            prompt_logprobs=self.prompt_logprobs(0, self._body.prompt_logprobs),
            metrics=self.job.metrics(),
        )

    def _choice(self, index: int, deltas: Sequence[Delta]) -> ChatChoice:
        reader, end = self._readers[index], self.job.ends[index]
        part = reader.push("".join(delta.text for delta in deltas)) + reader.finish()
        for call in part.calls:
            call.index = UNSET
        content, thoughts = self._body.echoed + part.content, self._shown_thoughts(part)
        return ChatChoice(
            index,
            Message(
                content if content or not part.calls else None,
                reasoning=thoughts,
                reasoning_content=thoughts,
                tool_calls=part.calls or UNSET,
            ),
            _reason(end, bool(part.calls)),
            self._logprobs([entry for delta in deltas for entry in delta.logprobs or ()]),
            self.trace(index, *deltas, end),
            self.ids(*deltas),
        )

    def chunks(self, index: int, event: Delta | Finished) -> list[ChatChunk]:
        """The chunk with the role comes first, and has the prompt's ids if they are asked for."""
        first = []
        if self.begins(index):
            first = [self.chunk([ChunkChoice(index, ChoiceDelta("assistant", self._body.echoed))])]
            first[0].prompt_token_ids = self.prompt_ids(index)
        choices = self._delta(index, event) if isinstance(event, Delta) else self._end(index, event)
        return [*first, *(self.chunk([choice]) for choice in choices)]

    def _delta(self, index: int, event: Delta) -> list[ChunkChoice]:
        """What a step adds: nothing if its text is held back and no log-probabilities, trace or ids
        are due."""
        part = self._readers[index].push(event.text)
        logprobs, trace = self._logprobs(event.logprobs or ()), self.trace(index, event)
        choice = ChunkChoice(index, self._choice_delta(part), logprobs=logprobs, idlm=trace)
        choice.token_ids = self.ids(event)
        due = logprobs or trace is not UNSET or self._with_ids
        return [choice] if choice.delta != ChoiceDelta() or due else []

    def _end(self, index: int, event: Finished) -> list[ChunkChoice]:
        reader = self._readers[index]
        delta = self._choice_delta(reader.finish())
        held = [ChunkChoice(index, delta)] if delta != ChoiceDelta() else []
        reason = _reason(event, reader.calls > 0)
        return [*held, ChunkChoice(index, ChoiceDelta(), reason, idlm=self.trace(index, event))]

    def _choice_delta(self, part: Part) -> ChoiceDelta:
        thoughts = self._shown_thoughts(part)
        return ChoiceDelta(UNSET, part.content or UNSET, thoughts, thoughts, part.calls or UNSET)

    def _shown_thoughts(self, part: Part) -> str | UnsetType:
        return UNSET if self._body.include_reasoning is False else part.thoughts or UNSET

    def chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        metrics = UNSET if usage is None else self.job.metrics()
        return ChatChunk(**self.job.head, choices=choices, usage=self.shown(usage), metrics=metrics)

    def _logprobs(self, entries: Sequence[Entry]) -> ChatLogprobs | None:
        return (
            ChatLogprobs([self._logprob(entry) for entry in entries])
            if self._body.logprobs and entries
            else None
        )

    def _logprob(self, entry: Entry) -> ChatLogprob:
        """The sampled token is the first of `entry`; `top_logprobs` has it only if it is among
        them."""
        ordered = sorted(entry, key=lambda token: -entry[token].logprob)
        sampled = next(iter(entry))
        shown = (sampled, *ordered[: self._body.top_logprobs or 0])
        chosen, *top = [self._top(token, entry[token]) for token in shown]
        return ChatLogprob(chosen.token, chosen.logprob, chosen.bytes, top)

    def _top(self, token: int, logprob: Logprob) -> TopLogprob:
        text = self.prompts.token(token)
        data = list(self.prompts.token_bytes(token))
        return TopLogprob(text, max(logprob.logprob, LOWEST_LOGPROB), data)


def likeliest(entry: Entry, top: int) -> Entry:
    """The token of an entry, and the `top` likeliest ones: there may be more, for another field."""
    return {
        token: found
        for place, (token, found) in enumerate(entry.items())
        if place == 0 or found.rank <= top
    }


class TranslatedAnswer(Streamable):
    """A response in the form of another API, made of the chunks of chat.

    A stream and a whole response are made by the same steps: the whole one is what the events come
    to.
    """

    def __init__(self, chat: ChatAnswer) -> None:
        self.job, self._chat = chat.job, chat

    @abstractmethod
    def events(self, choice: ChunkChoice) -> Iterable[msgspec.Struct]:
        """The events of one chunk of chat."""

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        return [
            made
            for chunk in self._chat.chunks(index, event)
            for choice in chunk.choices
            for made in self.events(choice)
        ]

    def run(self, samples: Sequence[Sequence[Delta]]) -> None:
        """Make the events of a whole response; there is a single sample."""
        events: list[Delta | Finished] = [*samples[0], self.job.ends[0]]
        for event in events:
            self.chunks(0, event)

    def encode(self, chunks: Sequence[msgspec.Struct]) -> bytes:
        return b"".join(map(named_event, chunks))


def thought(delta: ChoiceDelta) -> str:
    """The part of a thought that a delta adds."""
    return delta.reasoning_content or ""


def _reason(end: Finished, calls: bool = False) -> FinishReason:
    if end.reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"


class CompletionAnswer(Answer):
    """Builds the response to a completions request. Choice i * n + k is sample k of prompt i."""

    def __init__(
        self, job: Job, body: CompletionRequest, prompts: Prompts, ids: Sequence[Sequence[int]]
    ) -> None:
        super().__init__(job, body, prompts)
        self._body, self._ids = body, ids
        samples = range(len(job.tickets) if body.logprobs is not None else 0)
        self._offsets = [self._output_offsets(index) for index in samples]

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        if self._body.prompt_only:
            samples = [() for _ in samples]
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        choices = [self._choice(index, deltas) for index, deltas in enumerate(samples)]
        metrics = self.job.metrics()
        return Completion(**self.job.head, choices=choices, usage=usage, metrics=metrics)

    def _choice(self, index: int, deltas: Sequence[Delta]) -> CompletionChoice:
        end = self.job.ends[index]
        shown = None
        if self._body.logprobs is not None:
            shown = CompletionLogprobs([], [], [], [])
            number = index // self.job.samples
            is_text = isinstance(self._body.prompts[number], str)
            offsets = self.prompts.offsets(skip_special_tokens=is_text)  # as in `_echoed`
            prompt = end.prompt_logprobs if self._body.echo else None
            self._show(shown, prompt or (), offsets, self._ids[number])
            output = [entry for delta in deltas for entry in delta.logprobs or ()]
            self._show(shown, output, self._offsets[index])
        return CompletionChoice(
            index,
            self._echoed(index) + "".join(delta.text for delta in deltas),
            "length" if self._body.prompt_only else _reason(end),
            shown,
            self.trace(index, *deltas, end),
            self.ids(*deltas),
            self.prompt_ids(index),
            self.prompt_logprobs(index, self._body.prompt_logprobs),
        )

    def _output_offsets(self, index: int) -> Callable[[int], int]:
        skip = self._body.skip_special_tokens is not False
        return self.prompts.offsets(len(self._echoed(index)), skip)

    def _echoed(self, index: int) -> str:
        """The prompt's text if the request has `echo`, else ""."""
        if not self._body.echo:
            return ""
        number = index // self.job.samples
        prompt, ids = self._body.prompts[number], self._ids[number]
        whole = isinstance(prompt, str) and self._body.truncate_prompt_tokens is None
        return str(prompt) if whole else self.prompts.decode(ids)

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """No chunk if a step's text is held back and no log-probabilities, trace or ids are due."""
        begins = self.begins(index)
        choice = CompletionChoice(index, self._echoed(index) if begins else "")
        choice.prompt_token_ids = self.prompt_ids(index) if begins else UNSET
        choice.idlm = self.trace(index, event)
        if isinstance(event, Finished):
            choice.finish_reason = _reason(event)
            return [self.chunk([choice])]
        choice.text += event.text
        choice.token_ids = self.ids(event)
        if self._body.logprobs is not None:
            choice.logprobs = CompletionLogprobs([], [], [], [])
            self._show(choice.logprobs, event.logprobs or (), self._offsets[index])
        has_content = choice.text or choice.logprobs is not None or choice.idlm is not UNSET
        return [self.chunk([choice])] if has_content or self._with_ids else []

    def chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        metrics = UNSET if usage is None else self.job.metrics()
        return Completion(
            **self.job.head, choices=choices, usage=self.shown(usage), metrics=metrics
        )

    def _show(
        self,
        shown: CompletionLogprobs,
        entries: Sequence[Entry | None],
        offset: Callable[[int], int],
        ids: Sequence[int] = (),
    ) -> None:
        """Append to OpenAI's four lists, one entry for each token.

        Args:
            entries: None for the first token of a prompt, which has no law.
            offset: of the next token.
            ids: the tokens of a prompt, which name those without entry.
        """
        for place, entry in enumerate(entries):
            token = ids[place] if entry is None else next(iter(entry))
            shown.tokens.append(self.prompts.token(token))
            shown.text_offset.append(offset(token))
            shown.token_logprobs.append(
                None if entry is None else max(entry[token].logprob, LOWEST_LOGPROB)
            )
            shown.top_logprobs.append(None if entry is None else self._by_text(entry))

    def _by_text(self, entries: Entry) -> dict[str, float]:
        """If two tokens have the same text, the likelier one's log-probability is shown."""
        shown = likeliest(entries, self._body.logprobs or 0)
        rising = sorted(shown.items(), key=lambda pair: pair[1].logprob)
        return {
            self.prompts.token(token): max(entry.logprob, LOWEST_LOGPROB) for token, entry in rising
        }
