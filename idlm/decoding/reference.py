"""The oracle: AR decoding and ISD written as plainly as they can be, everything recomputed at every step.

`forward(tokens [T], positions [T], visible [T, T])` gives logits [T, V]; a row whose token is `mask_id` is a MASK row.
Nothing is cached or laid out statically, and the verification rules are spelled out again for one draft at a time, so
that agreement with the fast path says something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from idlm.decoding.law import history, law
from idlm.decoding.noise import Stream, gumbel, uniform
from idlm.decoding.verify import residual
from idlm.decoding.window import outcomes, parse_branches
from idlm.params import SamplingParams

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Allowed = Callable[[Sequence[int]], Tensor]
"""A guide: from the output so far the tokens that may come next, bool [V]; all of them past the guide's end."""


@dataclass
class Decoded:
    """Tokens of one request, and how they came about.

    Attributes:
        tokens: the output, its stop token included.
        forwards: forward passes, the prefill included.
        reached: how often a draft at depth k (index k - 1) was looked at, all before it having been accepted.
        accepted: how often it was accepted.
    """

    tokens: list[int] = field(default_factory=list)
    forwards: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass
class _Request:
    """What stays the same while one request is decoded."""

    forward: Forward
    prompt: list[int]
    params: SamplingParams
    mask_id: int
    stop_ids: frozenset[int]
    seed: int
    allowed: Allowed | None

    def law(self, logits: Tensor, output: Sequence[int]) -> Tensor:
        """The law [V] of the token that comes after `output`."""
        before = history(self.prompt, output, [], logits.shape[-1])
        held_back = self.stop_ids if len(output) < self.params.min_tokens else ()
        allowed = None if self.allowed is None else self.allowed(output)
        return law(logits[None], self.params, before, self.mask_id, held_back, allowed)[0]

    def noise(self, position: int, vocab_size: int, stream: Stream = Stream.TOKEN) -> Tensor:
        """The noise [V] at a position; none when greedy."""
        if self.params.greedy:
            return torch.zeros(vocab_size, dtype=torch.float64)
        return gumbel(self.seed, torch.tensor([position]), vocab_size, stream)[0]

    def sample(self, log_p: Tensor, position: int, stream: Stream = Stream.TOKEN) -> int:
        """A token of the law `log_p` [V], with the noise at its position."""
        return int((log_p + self.noise(position, len(log_p), stream)).argmax())

    def done(self, output: Sequence[int]) -> bool:
        """Whether the output is complete."""
        return len(output) >= self.params.max_tokens or bool(output and output[-1] in self.stop_ids)


def ar(
    forward: Forward,
    prompt: Sequence[int],
    params: SamplingParams,
    mask_id: int,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    allowed: Allowed | None = None,
) -> Decoded:
    """Plain autoregressive decoding: one token a forward."""
    request = _Request(forward, list(prompt), params, mask_id, frozenset(stop_ids), seed, allowed)
    decoded = Decoded()
    while not request.done(decoded.tokens):
        text = request.prompt + decoded.tokens
        rows = torch.ones(len(text), len(text)).tril() > 0
        logits = forward(torch.tensor(text), torch.arange(len(text)), rows)
        decoded.forwards += 1
        decoded.tokens.append(request.sample(request.law(logits[-1], decoded.tokens), len(text)))
    return decoded


def isd(
    forward: Forward,
    prompt: Sequence[int],
    params: SamplingParams,
    mask_id: int,
    stride: int,
    branches: str | Iterable[int] = "all",
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    allowed: Allowed | None = None,
) -> Decoded:
    """Introspective strided decoding with any stride and any set of branches."""
    request = _Request(forward, list(prompt), params, mask_id, frozenset(stop_ids), seed, allowed)
    chosen = parse_branches(branches, stride)
    depth = stride - 1
    decoded = Decoded(reached=[0] * depth, accepted=[0] * depth)
    drafts: list[int] = []
    draft_laws: list[Tensor] = []
    while not request.done(decoded.tokens):
        text = request.prompt + decoded.tokens
        verify_logits, branch_logits = _window(request, text, drafts, outcomes(chosen, len(drafts)), depth)
        decoded.forwards += 1
        fresh, stood = _verify(request, decoded.tokens, drafts, draft_laws, verify_logits)
        for token in fresh:
            if not request.done(decoded.tokens):
                decoded.tokens.append(token)
                _count(decoded, len(text) + len(drafts), len(text), len(request.prompt), stood)
        drafts, draft_laws = [], []
        if stood in branch_logits and not request.done(decoded.tokens):
            drafts, draft_laws = _draft(request, decoded.tokens, branch_logits[stood])
    return decoded


def _count(decoded: Decoded, end: int, start: int, prompt_length: int, stood: int) -> None:
    """Count the draft that claimed the token just committed; the bonus position, `end`, had none."""
    position = prompt_length + len(decoded.tokens) - 1
    if position < end:
        decoded.reached[position - start] += 1
        decoded.accepted[position - start] += position - start < stood


def _window(
    request: _Request, text: list[int], drafts: list[int], branches: Iterable[int], depth: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits of the verify rows [1 + v, V], and by outcome those of its masks [depth, V]; one forward."""
    rows: list[tuple[int, int]] = [(token, position) for position, token in enumerate(text + drafts)]
    sees: list[set[int]] = [set(range(i + 1)) for i in range(len(rows))]
    at: dict[int, list[int]] = {}
    for j in branches if depth else ():
        before = set(range(len(text) + j))
        at[j] = []
        for k in range(1, depth + 1):
            at[j].append(len(rows))
            rows.append((request.mask_id, len(text) - 1 + j + k))
            sees.append(before | set(at[j]))
    visible = torch.tensor([[other in seen for other in range(len(rows))] for seen in sees])
    tokens, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    logits = request.forward(tokens, positions, visible)
    first = len(text) - 1
    return logits[first : first + 1 + len(drafts)], {j: logits[indices] for j, indices in at.items()}


def _verify(
    request: _Request, output: list[int], drafts: list[int], draft_laws: list[Tensor], logits: Tensor
) -> tuple[list[int], int]:
    """The tokens that one window commits, and how many of them are drafts."""
    start = len(request.prompt) + len(output)
    for k, draft in enumerate(drafts):
        log_p = request.law(logits[k], output + drafts[:k])
        token = _judge(request, log_p, draft, draft_laws[k], start + k)
        if token is not None:
            return [*drafts[:k], token], k
    log_p = request.law(logits[len(drafts)], output + drafts)
    return [*drafts, request.sample(log_p, start + len(drafts))], len(drafts)


def _judge(request: _Request, log_p: Tensor, draft: int, log_q: Tensor, position: int) -> int | None:
    """None where the draft stands, else the token that replaces it."""
    params = request.params
    if params.verification == "ratio":
        chance = math.exp(min(0.0, float(log_p[draft] - log_q[draft])))
        if float(uniform(request.seed, torch.tensor([position]))[0]) < chance:
            return None
        rest = residual(torch.stack([log_p, log_p]), log_q[None])[0]
        return request.sample(rest, position)
    token = request.sample(log_p, position)
    likely = params.tau is not None and float(log_p[draft]) >= float(log_p.max()) + math.log(params.tau)
    return None if token == draft or likely else token


def _draft(request: _Request, output: list[int], logits: Tensor) -> tuple[list[int], list[Tensor]]:
    """The drafts after `output` and their laws, one by one: each counts the drafts before it in its penalties."""
    stream = Stream.DRAFT if request.params.verification == "ratio" else Stream.TOKEN
    drafts: list[int] = []
    laws: list[Tensor] = []
    for row in logits:
        log_q = request.law(row, output + drafts)
        position = len(request.prompt) + len(output) + len(drafts)
        laws.append(log_q)
        drafts.append(request.sample(log_q, position, stream))
    return drafts, laws
