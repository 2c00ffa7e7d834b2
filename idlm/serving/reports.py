"""`Reports`: what the server is told of an engine: of each sample's updates and its end, and the counters."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from idlm.engine import request
from idlm.engine.engine import Engine
from idlm.engine.request import Result, Update
from idlm.serving.messages import Delta, Finished, Logprob, Message, Stats, Submit, TokenTrace


@dataclass
class Sample:
    """A sample in the engine: what was asked, its result as it grows, and how much of it has been reported."""

    submit: Submit
    result: Result
    tokens: int = 0
    forwards: int = 0


@dataclass
class Totals:
    """Sums over results; `reached` and `accepted` by depth."""

    forwards: int = 0
    cached_tokens: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Count one more."""
        self.forwards += result.forwards
        self.cached_tokens += result.cached_tokens
        self.reached = _plus(self.reached, result.reached)
        self.accepted = _plus(self.accepted, result.accepted)


class Reports:
    """The samples of one engine, and what has been said of them.

    Attributes:
        numbers: the engine's id of each sample that runs or waits, by the server's.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.numbers: dict[str, str] = {}
        self._samples: dict[str, Sample] = {}
        self._ended = Totals()
        self._texts: dict[int, str] = {}

    def open(self, number: str, submit: Submit) -> None:
        """Follow a sample that the engine has just been given, by the engine's own id."""
        self.numbers[submit.id] = number
        self._samples[number] = Sample(submit, self.engine.result(number))

    def of(self, update: Update) -> list[Message]:
        """The messages that an update comes to; its last closes the sample."""
        sample = self._samples[update.request_id]
        out: list[Message] = []
        if update.tokens or update.text:
            out.append(self._delta(sample, update))
        if update.result is not None:
            del self._samples[update.request_id], self.numbers[sample.submit.id]
            self._ended.add(update.result)
            out.append(self._finished(sample))
        return out

    def stats(self) -> Stats:
        """The counters."""
        scheduler, metrics, planner = self.engine.scheduler, self.engine.metrics, self.engine.planner
        totals = copy(self._ended)
        for sample in self._samples.values():
            totals.add(sample.result)
        return Stats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            pages_total=scheduler.pool.total,
            pages_live=scheduler.pool.live,
            pages_cached=scheduler.pool.cached,
            steps=metrics.steps,
            tokens=metrics.tokens,
            prefill_tokens=metrics.prefill_tokens,
            cached_tokens=totals.cached_tokens,
            forwards=totals.forwards,
            preemptions=metrics.preemptions,
            evictions=scheduler.pool.evictions,
            plan=planner.current.name,
            reason=planner.reason,
            plans=dict(metrics.plans),
            reached=totals.reached,
            accepted=totals.accepted,
        )

    def _delta(self, sample: Sample, update: Update) -> Delta:
        """An update with tokens is one forward; the result may be further already."""
        delta = Delta(sample.submit.id, update.tokens, update.text)
        new = slice(sample.tokens, sample.tokens + len(update.tokens))
        sample.tokens = new.stop
        sample.forwards += bool(update.tokens)
        if sample.result.logprobs is not None:
            delta.logprobs = [self._logprobs(entry) for entry in sample.result.logprobs[new]]
        if sample.submit.trace:
            delta.trace = [TokenTrace(source, sample.forwards) for source in update.sources]
        return delta

    def _finished(self, sample: Sample) -> Finished:
        result, prompt = sample.result, sample.result.prompt_logprobs or []
        return Finished(
            id=sample.submit.id,
            reason=result.finish_reason,
            stop=result.stop_reason,
            prompt_tokens=len(result.prompt_token_ids),
            cached_tokens=result.cached_tokens,
            completion_tokens=len(result.token_ids),
            forwards=result.forwards,
            drafted=sum(result.reached),
            accepted=sum(result.accepted),
            prompt_logprobs=[None if entry is None else self._logprobs(entry) for entry in prompt] or None,
        )

    def _logprobs(self, entry: dict[int, request.Logprob]) -> list[Logprob]:
        return [Logprob(token, one.logprob, one.rank, self._text(token)) for token, one in entry.items()]

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = "" if self.tokenizer is None else str(self.tokenizer.decode([token]))
        return self._texts[token]


def _plus(sums: list[int], values: list[int]) -> list[int]:
    return [a + b for a, b in zip(sums, values, strict=True)] if sums else list(values)
