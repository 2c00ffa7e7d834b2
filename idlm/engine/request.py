"""`Request`: what one caller asked for and how far it has come; `Result`: what the caller gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from idlm.engine.guide import Matcher
from idlm.engine.text import TextStream
from idlm.params import SamplingParams


@dataclass
class Timing:
    """When things happened, in seconds of `time.perf_counter`; `worst_gap` is the longest wait
    between two outputs."""

    arrival: float
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    worst_gap: float = 0.0

    def mark(self, now: float) -> None:
        """Output came."""
        if self.last_token is None:
            self.first_token = now
        else:
            self.worst_gap = max(self.worst_gap, now - self.last_token)
        self.last_token = now


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and its rank among all (1 is the likeliest)."""

    logprob: float
    rank: int


@dataclass
class Result:
    """One request, finished or on its way.

    Attributes:
        prompt_token_ids, token_ids: the prompt and the output; the output keeps its stop token.
        text: the output as text; empty where the model has no tokenizer.
        finish_reason: "stop", "length", "abort", "timeout", or "error" where its guide left no
            token to go on with.
        stop_reason: the stop string or stop id that ended it; None for the model's own end token;
            after an error, why.
        seed: of the noise: the same seed gives the same tokens at any stride, in any batch.
        forwards: forward passes that committed tokens of it; the prefill counts as one.
        reached: by depth (index k - 1): drafts looked at, all before them having been accepted.
        accepted: by depth: drafts accepted.
        sources: for each token "first" (from the prefill), "accepted", "corrected" or "bonus".
        logprobs: for each token a mapping of token ids, its own first, to `Logprob`; None unless
            asked for.
        prompt_logprobs: the same for the prompt; its first entry is None.
        cached_tokens: prompt tokens that were in the prefix cache.
        samples: with n > 1, the other samples of the same prompt.
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
    samples: list[Result] = field(default_factory=list)

    @property
    def tpf(self) -> float:
        """Tokens per forward, the prefill counted."""
        return len(self.token_ids) / self.forwards if self.forwards else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By depth: accepted / reached; 0 where no draft was reached."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted, self.reached, strict=True)]


class Update(NamedTuple):
    """What one engine step brought one request.

    Attributes:
        text: what the tokens settle of the output's text; it may come later than they do.
        result: once it has finished.
        sources: of each token, as in `Result`.
    """

    request_id: str
    tokens: list[int]
    text: str
    result: Result | None = None
    sources: Sequence[str] = ()


@dataclass(eq=False)
class Request:
    """A request inside the engine.

    Attributes:
        limit: the length (prompt and output) at which it ends.
        adapter: index of the adapter that drafts; `drafting` False: plain AR.
        order: (priority, number of arrival): the lower one goes first.
        deadline: in seconds of `time.perf_counter`; None: it may take forever.
        slot: where it sits; None while it waits.
        pages: what its page table names, in order.
        computed: tokens of its text whose prefill has been launched.
        page_keys: of its full pages, as far as the scheduler has needed them.
        matcher: follows the output along its guide, if it has one.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    result: Result
    limit: int
    stop_ids: frozenset[int]
    adapter: int
    drafting: bool
    order: tuple[int, int]
    deadline: float | None
    stream: TextStream | None
    salt: bytes = b""
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    matcher: Matcher | None = None

    @property
    def text(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt + self.result.token_ids

    @property
    def length(self) -> int:
        """Tokens of the text, as far as the host knows."""
        return len(self.prompt) + len(self.result.token_ids)

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.result.timing.finished is not None

    def extend(self, tokens: Sequence[int], drafted: int, accepted: int) -> tuple[list[int], str]:
        """Take what one forward committed; returns the tokens kept and the text they add.

        `drafted` drafts were looked at and `accepted` of them stood; those past the request's end
        are not counted.
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
        for depth in range(min(len(kept), drafted)):
            result.reached[depth] += 1
            result.accepted[depth] += depth < accepted
        if ended is not None:
            result.finish_reason = "stop"
            result.stop_reason = kept[-1] if kept[-1] in self.params.stop_token_ids else None
        return kept, added

    def _push(self, tokens: list[int]) -> str:
        return "" if self.stream is None else self.stream.push(tokens)

    @property
    def complete(self) -> bool:
        """Whether the output ends here by itself."""
        return self.result.finish_reason in ("stop", "error") or self.length >= self.limit

    def finish(self, reason: str | None = None) -> str:
        """End it; returns the text that had been held back."""
        rest = "" if self.stream is None else self.stream.finish()
        self.result.text = "" if self.stream is None else self.stream.text
        self.result.finish_reason = reason or self.result.finish_reason
        self.result.timing.finished = perf_counter()
        return rest


def _sources(tokens: int, drafted: int, accepted: int) -> list[str]:
    """Of the first `tokens` tokens of a forward that looked at so many drafts."""
    return [*["accepted"] * accepted, "corrected" if accepted < drafted else "bonus"][:tokens]
