"""`Request`: a sample that a caller asked for, and its state; `Result`: what the caller gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from idlm.engine.guide import Constraint
from idlm.engine.text import TextStream
from idlm.params import SamplingParams

NO_TOKEN = "the bans of the request (bad_words, allowed_token_ids, min_tokens, ...) leave no token"


@dataclass
class Timing:
    """Times of a request's events, in seconds of `time.perf_counter`. `worst_gap` is the longest
    time between two outputs."""

    arrival: float
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    worst_gap: float = 0.0

    def mark(self, now: float) -> None:
        """Record that a forward committed tokens at the time `now`."""
        if self.last_token is None:
            self.first_token = now
        else:
            self.worst_gap = max(self.worst_gap, now - self.last_token)
        self.last_token = now


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and its rank among all tokens (1 is the likeliest)."""

    logprob: float
    rank: int


@dataclass(frozen=True)
class WindowRecord:
    """What the window of one forward held, for requests that ask for it.

    Attributes:
        position: of the pending token, counted from the start of the prompt.
        plan: the name of the step's plan; width: the rows of its window.
        drafts: those that were verified, of which the first `accepted` were accepted.
        outcomes: the numbers of accepted drafts for which the window had MASK rows.
        masks: the MASK rows of each.
    """

    position: int
    plan: str
    width: int
    pending: int
    drafts: list[int]
    accepted: int
    outcomes: list[int]
    masks: int


@dataclass
class Result:
    """The output of a request that runs or has finished.

    Attributes:
        prompt_token_ids, token_ids: the prompt and the output. The output includes its stop token.
        text: the output as text; empty if the model has no tokenizer.
        finish_reason: "stop", "length", "abort", "timeout", or "error" if the guide and the bans
            of the request leave no further token.
        stop_reason: the stop string or stop id that ended the output, None for the model's end
            token; after an error, its message.
        seed: the seed of the noise. The same seed gives the same tokens at any stride, in any
            batch.
        forwards: forward passes that committed tokens; the one with the first token is included.
        reached: by depth k (index k - 1), the drafts that were reached: all before them in their
            window were accepted.
        accepted: by depth, the drafts that were accepted.
        sources: for each token "first" (of the first forward), "accepted", "corrected" or "bonus".
        logprobs: for each token, `Logprob` by token id, its own id first; None unless requested.
        prompt_logprobs: the same for prompt tokens; the first entry is None.
        cached_tokens: prompt tokens that were found in the prefix cache.
        drafted: drafts that were verified, also those after one that was rejected.
        samples: if n > 1, the other samples of the prompt.
        windows: for each forward, its window; None unless requested.
    """

    prompt_token_ids: list[int]
    seed: int
    reached: list[int]
    accepted: list[int]
    timing: Timing
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    stop_reason: str | int | None = None
    forwards: int = 0
    sources: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cached_tokens: int = 0
    drafted: int = 0
    samples: list[Result] = field(default_factory=list)
    windows: list[WindowRecord] | None = None

    @property
    def outputs(self) -> list[Result]:
        """All samples of the prompt, under vLLM's name: `result.outputs[0].text`."""
        return [self, *self.samples]

    @property
    def tpf(self) -> float:
        """Tokens per forward, including the forward of the first token."""
        return len(self.token_ids) / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By depth: accepted / reached; 0 where no draft was reached."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted, self.reached, strict=True)]


class Update(NamedTuple):
    """The output that an engine step added to a request.

    Attributes:
        text: the text that has become certain; it may come later than its tokens.
        result: the final result if the request has finished, else None.
        sources: for each token, as in `Result`.
    """

    request_id: str
    tokens: list[int]
    text: str
    result: Result | None = None
    sources: Sequence[str] = ()


@dataclass(frozen=True)
class Terms:
    """How a request runs; its `SamplingParams` say what it writes.

    Attributes:
        adapter: the name of the adapter that drafts; None: the first.
        drafting: False: plain AR.
        priority: requests with lower numbers run first.
        timeout: seconds after which the request ends with finish reason "timeout". It keeps the
            output that it has by then.
        salt: requests share cached prefixes only if they have the same salt.
        windows: keep what every window held.
    """

    adapter: str | None = None
    drafting: bool = True
    priority: int = 0
    timeout: float | None = None
    salt: bytes = b""
    windows: bool = False


USUAL = Terms()


@dataclass(eq=False)
class Request:
    """A request inside the engine, with its state on the host.

    Attributes:
        limit: the length (prompt and output) at which the request ends.
        adapter: the index of the adapter that drafts.
        drafting: whether MASK rows draft; looking: whether drafts are looked up in its text.
            Neither: plain AR.
        order: (priority, number of arrival); requests with lower orders run first.
        deadline: in seconds of `time.perf_counter`; None: no deadline.
        slot: the request's slot; None while it waits.
        pages: the pages of its page table, in order; the trash page in place of the first
            `trimmed`, which are before every layer's sliding window.
        computed: tokens of its text that are cached or whose prefill has been launched.
        page_keys: the hashes of its first full pages, as many as the scheduler has needed.
        matcher: follows the output if the request has a guide or a budget of thoughts.
        matched, guess: of the drafts for the next window, as far as the host knows; see
            `SlotResult`.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    result: Result
    limit: int
    stop_ids: frozenset[int]
    adapter: int
    drafting: bool
    looking: bool
    order: tuple[int, int]
    deadline: float | None
    stream: TextStream | None
    salt: bytes = b""
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    trimmed: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    matcher: Constraint | None = None
    matched: int = 0
    guess: int = 0

    @property
    def text(self) -> list[int]:
        """The token ids of prompt and output, as far as the host has read them."""
        return self.prompt + self.result.token_ids

    @property
    def length(self) -> int:
        """The number of tokens of `text`."""
        return len(self.prompt) + len(self.result.token_ids)

    @property
    def finished(self) -> bool:
        """Whether the request has ended, for any reason."""
        return self.result.timing.finished is not None

    def extend(self, tokens: Sequence[int], drafted: int, accepted: int) -> tuple[list[int], str]:
        """Append the tokens that a forward committed; returns the tokens kept and their text.

        The forward verified `drafted` drafts and accepted `accepted` of them. Drafts past the
        request's end are not counted.
        """
        result, start = self.result, len(self.result.token_ids)
        before = result.forwards
        result.forwards += 1
        result.timing.mark(perf_counter())
        stops = not self.stop_ids.isdisjoint(tokens)
        ended = (
            next(at for at, token in enumerate(tokens) if token in self.stop_ids) if stops else None
        )
        kept = list(tokens if ended is None else tokens[: ended + 1])
        if self.matcher is not None and (good := self.matcher.advance(kept)) < len(kept):
            kept, ended = kept[:good], None
            result.finish_reason, result.stop_reason = "error", self.matcher.error
        added = self._push(kept)
        if self.stream is not None and self.stream.stopped_at is not None:
            kept = kept[: self.stream.stopped_at - start]
            result.finish_reason, result.stop_reason, ended = "stop", self.stream.stopped_by, None
        result.token_ids += kept
        result.sources += (
            ["first"] * len(kept) if before == 0 else _sources(len(kept), drafted, accepted)
        )
        result.drafted += drafted if len(kept) > accepted else len(kept)
        for depth in range(min(len(kept), drafted)):
            result.reached[depth] += 1
            result.accepted[depth] += depth < accepted
        if ended is not None:
            result.finish_reason = "stop"
            result.stop_reason = kept[-1] if kept[-1] in self.params.stop_token_ids else None
        return kept, added

    def fail(self) -> None:
        """End the output, since the law leaves no token after it."""
        self.result.finish_reason = "error"
        self.result.stop_reason = NO_TOKEN if self.matcher is None else self.matcher.error

    def _push(self, tokens: list[int]) -> str:
        return "" if self.stream is None else self.stream.push(tokens)

    @property
    def complete(self) -> bool:
        """Whether the output has reached a stop, an error or the limit."""
        return self.result.finish_reason in ("stop", "error") or self.length >= self.limit

    def finish(self, reason: str | None = None) -> str:
        """End the request; returns the rest of its text, which had been held back."""
        result, rest = self.result, ""
        if self.stream is not None:
            before = self.stream.stopped_at
            rest, result.text = self.stream.finish(), self.stream.text
            if before != self.stream.stopped_at and result.finish_reason != "error":
                result.finish_reason, result.stop_reason = "stop", self.stream.stopped_by
        result.finish_reason = reason or result.finish_reason
        result.timing.finished = perf_counter()
        return rest


def _sources(tokens: int, drafted: int, accepted: int) -> list[str]:
    """The sources of the first `tokens` tokens of a forward that verified `drafted` drafts."""
    return [*["accepted"] * accepted, "corrected" if accepted < drafted else "bonus"][:tokens]
