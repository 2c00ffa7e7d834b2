"""What the server and the engine's process say to each other: msgpack of these types, each behind its length.

Every message is checked against its type when it is read; nothing in it is ever executed.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, tag=True, omit_defaults=True):
    """Any message; its type's name is its tag."""


class Guide(msgspec.Struct, frozen=True):
    """What an output has to match: `kind` is "json_object", "json_schema", "regex" or "grammar", `text` its source."""

    kind: str
    text: str


class Submit(Message):
    """One sample, to be run.

    Attributes:
        id: chosen by the server, unique.
        params: fields of `SamplingParams`, without n and seed.
        adapter: its name; None: the engine's first. drafting: False is plain AR.
        timeout: seconds. salt: of the prefix cache.
        trace: send what became of every token's draft.
    """

    id: str
    prompt: list[int]
    params: dict[str, object]
    seed: int
    adapter: str | None = None
    drafting: bool = True
    priority: int = 0
    timeout: float | None = None
    salt: bytes = b""
    guide: Guide | None = None
    trace: bool = False


class Abort(Message):
    """End a sample in whatever state it is; unknown ids are ignored."""

    id: str


class TokenTrace(msgspec.Struct, frozen=True):
    """Where a token came from: `source` as in `Result.sources`, and the number of the forward, the prefill being 1."""

    source: str
    forward: int


class Logprob(msgspec.Struct, frozen=True):
    """A token's log-probability and rank; `text` is the token alone."""

    token: int
    logprob: float
    rank: int
    text: str


class Delta(Message):
    """What a step brought a sample.

    Attributes:
        logprobs: for each token its own first, then the most likely.
        trace: one entry a token.
    """

    id: str
    tokens: list[int] = []
    text: str = ""
    logprobs: list[list[Logprob]] | None = None
    trace: list[TokenTrace] | None = None


class Finished(Message):
    """A sample's end; its last tokens came in the `Delta` before.

    Attributes:
        reason, stop: finish and stop reason of `Result`.
        drafted, accepted: drafts looked at and accepted, over all depths.
        prompt_logprobs: if asked for; the first prompt token has none.
    """

    id: str
    reason: str
    stop: str | int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    forwards: int
    drafted: int
    accepted: int
    prompt_logprobs: list[list[Logprob] | None] | None = None


class Refused(Message):
    """A sample that cannot be run; the others are not touched."""

    id: str
    reason: str


class Ready(Message):
    """The engine is there.

    Attributes:
        mask_id, eos_ids: token ids. adapters: names, the default first; drafts: whether it can draft at all.
    """

    version: str
    model: str
    vocab_size: int
    context: int
    mask_id: int
    eos_ids: list[int]
    adapters: list[str]
    drafts: bool
    stride: int
    pages: int
    page_size: int


class Failed(Message):
    """The engine cannot start as configured; its process ends."""

    reason: str


class Stats(Message):
    """Counters of the engine, sent at least once a second while it lives; totals since its start unless said otherwise.

    Attributes:
        running, waiting: samples now. pages_total, pages_live, pages_cached: now.
        plan, reason: of the last step. plans: steps by plan.
        reached, accepted: drafts by depth.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_live: int = 0
    pages_cached: int = 0
    steps: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    forwards: int = 0
    preemptions: int = 0
    evictions: int = 0
    plan: str = ""
    reason: str = ""
    plans: dict[str, int] = {}
    reached: list[int] = []
    accepted: list[int] = []


ToEngine = Submit | Abort
FromEngine = Ready | Failed | Delta | Finished | Refused | Stats
