"""The response to a completions request; the rest of the way is that of `answers`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from idlm.engine.request import Logprob
from idlm.engine.text import TextStream
from idlm.serving.answers import LOWEST_LOGPROB, Answer, Entry, likeliest, reason
from idlm.serving.jobs import Job
from idlm.serving.prompts import Prompts
from idlm.serving.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from idlm.serving.schema import CompletionRequest
from idlm.serving.wire import Delta, Finished

NO_LAW = Logprob(0.0, 0)
"""Stands for the log-probability of a prompt's first token, which has none."""


class CompletionAnswer(Answer):
    """Builds the response to a completions request. Choice i * n + k is sample k of prompt i."""

    def __init__(self, job: Job, body: CompletionRequest, prompts: Prompts) -> None:
        super().__init__(job, body, prompts)
        self._body = body
        tickets = [] if body.logprobs is None else job.tickets
        special = body.skip_special_tokens is not False
        self._streams = [prompts.stream(special) for _ in tickets]  # for `text_offset`

    def response(self, samples: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        if self._body.prompt_only:
            samples = [() for _ in samples]
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        choices = [self._choice(index, deltas) for index, deltas in enumerate(samples)]
        return Completion(**self.job.head, choices=choices, usage=usage)

    def _choice(self, index: int, deltas: Sequence[Delta]) -> CompletionChoice:
        end = self.job.ends[index]
        return CompletionChoice(
            index,
            self._echoed(index) + "".join(delta.text for delta in deltas),
            "length" if self._body.prompt_only else reason(end),
            self._whole_logprobs(index, deltas) if self._body.logprobs is not None else None,
            self.ids(*deltas),
            self.prompt_ids(index),
            self.prompt_logprobs(index, self._body.prompt_logprobs),
            self.trace(index, *deltas, end),
        )

    def _whole_logprobs(self, index: int, deltas: Sequence[Delta]) -> CompletionLogprobs:
        """Those of the output, after those of the prompt if it is echoed."""
        output = [entry for delta in deltas for entry in delta.logprobs or ()]
        if not self._body.echo:
            return self._logprobs(output, self._streams[index])
        ids, prompt = self._prompt(index)
        first: Entry = {ids[0]: NO_LAW}
        entries = [first, *(entry for entry in self.job.ends[index].prompt_logprobs or () if entry)]
        shown = self._logprobs(entries, self.prompts.stream(isinstance(prompt, str)))
        added = self._logprobs(output, self._streams[index], offset=len(self._echoed(index)))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            getattr(shown, name).extend(getattr(added, name))
        return shown

    def _prompt(self, index: int) -> tuple[list[int], str | list[int]]:
        """The ids of a sample's prompt, and the prompt as it was given."""
        number = index // self.job.samples
        return self.job.prompts[number], self._body.prompts[number]

    def _echoed(self, index: int) -> str:
        """The prompt's text if the request has `echo`, else ""."""
        if not self._body.echo:
            return ""
        ids, prompt = self._prompt(index)
        whole = isinstance(prompt, str) and self._body.truncate_prompt_tokens is None
        return str(prompt) if whole else self.prompts.decode(ids)

    def chunks(self, index: int, event: Delta | Finished) -> list[msgspec.Struct]:
        """No chunk if a step's text is held back and no log-probabilities, ids or trace are due."""
        choice = CompletionChoice(index, "")
        if self.begins(index):
            choice.text, choice.prompt_token_ids = self._echoed(index), self.prompt_ids(index)
        choice.idlm = self.trace(index, event)
        if isinstance(event, Finished):
            choice.finish_reason = reason(event)
            return [self.chunk([choice])]
        choice.text += event.text
        if self._body.logprobs is not None:
            choice.logprobs = self._logprobs(event.logprobs or (), self._streams[index])
        choice.token_ids = self.ids(event)
        due = choice.logprobs is not None or self._with_ids or self._traced
        return [self.chunk([choice])] if choice.text or due else []

    def chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**self.job.head, choices=choices, usage=self.shown(usage))

    def _logprobs(
        self, entries: Sequence[Entry], text: TextStream | None, offset: int = 0
    ) -> CompletionLogprobs:
        """OpenAI's four lists, one entry for each token.

        Args:
            text: decodes the tokens, to know where each begins: where the text is that is whole
                without it. Tokens of one character begin where it does.
            offset: where `text` begins.
        """
        shown = CompletionLogprobs([], [], [], [])
        for entry in entries:
            token, found = next(iter(entry.items()))
            shown.tokens.append(self.prompts.token_name(token))
            shown.text_offset.append(offset + (0 if text is None else len(text.text)))
            law = found is not NO_LAW
            shown.token_logprobs.append(max(found.logprob, LOWEST_LOGPROB) if law else None)
            shown.top_logprobs.append(self._by_text(entry) if law else None)
            if text is not None:
                text.push([token])
        return shown

    def _by_text(self, entries: Entry) -> dict[str, float]:
        """If two tokens have the same text, the likelier one's log-probability is shown."""
        shown = likeliest(entries, self._body.logprobs or 0)
        rising = sorted(shown.items(), key=lambda pair: pair[1].logprob)
        return {
            self.prompts.token_name(token): max(entry.logprob, LOWEST_LOGPROB)
            for token, entry in rising
        }
