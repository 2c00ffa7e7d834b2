"""The oracle: law, noise, rules, AR and ISD of a single request, written for clarity.

It shares no function with the fast path (`law`, `noise`, `verify`), which the tests compare with
it. Each step recomputes everything, row by row, in float64; the noise uses Python's integers.
`forward(tokens [T], positions [T], visible [T, T])` returns logits [T, V]; a row whose token is
`mask_id` is a MASK row. Of what is visible, a layer with a sliding window w sees the rows less than
w positions back.

Shapes: T rows of a forward, V logit columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from idlm.decoding.window import outcomes, parse_branches
from idlm.params import SamplingParams

NEVER = -math.inf
LONGEST = 8
"""Tokens of a match that count when drafts are looked up."""
TOKEN, DRAFT, ACCEPT = range(3)
"""Streams of noise: each seed has three."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Head = Callable[[Tensor, int | None], Tensor]
"""A draft head: maps a MASK row's output of the forward, and the token before the one that it
drafts, to logits [V]. The forward may then give more than logits of a row; None stands for the
token before a verify row, whose logits know it. See `reference_heads`."""
Drafted = tuple[list[int], list[Tensor]]
"""Drafts, and the laws [V] that they were sampled from."""
Allowed = Callable[[Sequence[int]], Tensor]
"""A guide: maps the output so far to the tokens that may follow, bool [V]. After its end it allows
all."""


def split_mix(start: int, index: int) -> int:
    """Output `index` of the SplitMix64 generator that `start` seeds; unsigned 64-bit words."""
    word = (start + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def uniform(seed: int, stream: int, position: int, token: int = 0) -> float:
    """A number in the open interval (0, 1): (the upper 52 bits of a word + 0.5) / 2**52."""
    word = split_mix(split_mix(split_mix(seed, stream), position), token)
    return ((word >> 12) + 0.5) / 2**52


def gumbel(seed: int, stream: int, position: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise -log(-log(u)) of each token, float64 [V]."""
    uniforms = [uniform(seed, stream, position, token) for token in range(vocab_size)]
    return torch.tensor([-math.log(-math.log(u)) for u in uniforms], dtype=torch.float64)


def adjusted(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Iterable[int] = (),
    allowed: Tensor | None = None,
) -> Tensor:
    """Apply penalties, bias, bans and guide to the logits [V] of the token after `output`: float64.

    `banned` holds MASK, and the stop ids while the request has fewer than `min_tokens` tokens.
    `params.bad_words` holds no text.
    """
    scores = logits.to(torch.float64, copy=True)
    rate = params.repetition_penalty
    for token in {*prompt, *output}:
        if token < len(scores):  # a prompt may hold ids past the logit columns
            scores[token] = scores[token] / rate if scores[token] > 0 else scores[token] * rate
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    bad = [
        int(word[-1])
        for word in params.bad_words
        if [*output][max(0, len(output) + 1 - len(word)) :] == [*word[:-1]]
    ]
    only = range(len(scores)) if params.allowed_token_ids is None else params.allowed_token_ids
    for token in (*params.banned_tokens, *banned, *bad, *set(range(len(scores))).difference(only)):
        if token < len(scores):
            scores[token] = NEVER
    return scores if allowed is None else scores.masked_fill(~allowed, NEVER)


def law(scores: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities [V] of adjusted logits [V]; at temperature 0 a point mass on the argmax. If
    all are -inf, so is the result."""
    if scores.max() == NEVER:
        return scores
    if params.greedy:
        point = torch.full_like(scores, NEVER)
        point[scores.argmax()] = 0.0
        return point
    scores = scores / params.temperature
    if params.top_k > 0:  # tokens equal to the k-th are kept too
        kth = scores.sort(descending=True).values[min(params.top_k, len(scores)) - 1]
        scores = scores.masked_fill(scores < kth, NEVER)
    if params.top_p < 1:
        scores = _top_p(scores, params.top_p)
    p = scores.softmax(dim=0)
    return scores.masked_fill(p < params.min_p * p.max(), NEVER).log_softmax(dim=0)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens [V] whose total probability reaches `top_p`."""
    p, mass = scores.softmax(dim=0), 0.0
    kept = torch.full_like(scores, NEVER)
    for token in scores.argsort(descending=True, stable=True).tolist():
        if mass >= top_p:
            break
        kept[token] = scores[token]
        mass += float(p[token])
    return kept


def coupled(log_p: Tensor, draft: int, noise: Tensor) -> int | None:
    """None (accepted) if `draft` equals the AR token argmax(log p + noise), else that token."""
    token = int((log_p + noise).argmax())
    return None if token == draft else token


def relaxed(log_p: Tensor, draft: int, noise: Tensor, tau: float) -> int | None:
    """APPROXIMATE: as `coupled`, but also accept a draft with p at least `tau` times the largest.

    The output does not follow the model's law, except greedily with tau = 1 and without ties.
    """
    likely = float(log_p[draft]) >= float(log_p.max()) + math.log(tau)
    return None if likely else coupled(log_p, draft, noise)


def ratio(log_p: Tensor, draft: int, log_q: Tensor, chance: float, noise: Tensor) -> int | None:
    """None (accepted) with probability min(1, p / q), else a sample of normalise(max(0, p - q)).

    The result has the law p exactly if `draft` is a sample of q, `chance` is uniform in (0, 1) and
    the noise is independent of both.
    """
    if math.log(chance) < float(log_p[draft] - log_q[draft]):
        return None
    return int((residual(log_p, log_q) + noise).argmax())


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log of max(0, p - q) [V], not normalised; p if rounding leaves no mass."""
    mass = (log_p.exp() - log_q.exp()).clamp(min=0)
    return mass.log() if mass.sum() > 0 else log_p


def look_up(text: Sequence[int], depth: int) -> tuple[int, list[int]]:
    """Of all matches of the text's end earlier in the text, the length of the longest, up to
    `LONGEST`, and the tokens that followed it. Of equally long ones the last counts. At the end of
    the text they begin again."""
    last = len(text) - 1
    longest, end = 0, -1
    for at in range(last):
        matched = 0
        while matched < min(at + 1, LONGEST) and text[at - matched] == text[last - matched]:
            matched += 1
        if matched and matched >= longest:
            longest, end = matched, at
    if not longest:
        return 0, []
    after = list(text[end + 1 :])
    return longest, [after[k % len(after)] for k in range(depth)]


@dataclass
class Request:
    """The constants of a request. Its methods take the output so far."""

    prompt: Sequence[int]
    params: SamplingParams
    mask_id: int
    stop_ids: Collection[int] = ()
    seed: int = 0
    allowed: Allowed | None = None
    head: Head = lambda row, before: row  # noqa: E731

    def law(self, logits: Tensor, output: Sequence[int]) -> Tensor:
        """Log-probabilities [V] of the token after `output`."""
        held = self.stop_ids if len(output) < self.params.min_tokens else ()
        allowed = None if self.allowed is None else self.allowed(output)
        banned = (self.mask_id, *held)
        return law(adjusted(logits, self.params, self.prompt, output, banned, allowed), self.params)

    def noise(self, position: int, vocab_size: int, stream: int = TOKEN) -> Tensor:
        """The noise [V] of a position; zeros if the request is greedy."""
        if self.params.greedy:
            return torch.zeros(vocab_size, dtype=torch.float64)
        return gumbel(self.seed, stream, position, vocab_size)

    def sample(self, log_p: Tensor, position: int, stream: int = TOKEN) -> int:
        """Sample a token from the law `log_p` [V], which leaves one, with the noise of its
        position."""
        return int((log_p + self.noise(position, len(log_p), stream)).argmax())

    def verify(
        self, output: list[int], drafts: list[int], laws: Sequence[Tensor], logits: Tensor
    ) -> tuple[list[int], int]:
        """Verify a window: the tokens that it commits, and how many of them are drafts. Only drafts
        are committed if the law leaves no token after them.

        `laws` are those that the drafts were sampled from; `logits` [1 + drafts, V] are the verify
        rows.
        """
        start = len(self.prompt) + len(output)
        for k, draft in enumerate(drafts):
            log_p = self.law(logits[k], output + drafts[:k])
            if log_p.max() == NEVER:
                return drafts[:k], k
            token = self.judge(log_p, draft, laws[k], start + k)
            if token is not None:
                return [*drafts[:k], token], k
        log_p = self.law(logits[len(drafts)], output + drafts)
        if log_p.max() == NEVER:
            return drafts, len(drafts)
        return [*drafts, self.sample(log_p, start + len(drafts))], len(drafts)

    def judge(self, log_p: Tensor, draft: int, log_q: Tensor, position: int) -> int | None:
        """None if the draft is accepted, else the correction."""
        noise = self.noise(position, len(log_p))
        if self.params.verification == "ratio":
            return ratio(log_p, draft, log_q, uniform(self.seed, ACCEPT, position), noise)
        if self.params.tau is not None:
            return relaxed(log_p, draft, noise, self.params.tau)
        return coupled(log_p, draft, noise)

    def draft(self, output: list[int], rows: Tensor) -> Drafted:
        """Draw drafts after `output` from the MASK rows `rows` [K, .]; also return their laws.

        The law of a draft counts the drafts before it, and the head knows the last of them. They
        end where it leaves no token.
        """
        stream = DRAFT if self.params.verification == "ratio" else TOKEN
        drafts: list[int] = []
        laws: list[Tensor] = []
        for row in rows:
            before = (*self.prompt, *output, *drafts)[-1]
            log_p = self.law(self.head(row, before), output + drafts)
            if log_p.max() == NEVER:
                break
            laws.append(log_p)
            position = len(self.prompt) + len(output) + len(drafts)
            drafts.append(self.sample(laws[-1], position, stream))
        return drafts, laws

    def look_up(self, output: list[int], depth: int, vocab_size: int) -> tuple[int, Drafted]:
        """The length of the longest match of the text's end, and the drafts after it with their
        laws. They were not drawn, so each law is a point mass."""
        matched, drafts = look_up([*self.prompt, *output], depth)
        laws = []
        for draft in drafts:
            laws.append(torch.full((vocab_size,), NEVER, dtype=torch.float64))
            laws[-1][draft] = 0.0
        return matched, (drafts, laws)

    def done(self, output: Sequence[int]) -> bool:
        """Whether the output ends in a stop id or has `max_tokens` tokens."""
        return len(output) >= self.params.max_tokens or bool(output and output[-1] in self.stop_ids)


@dataclass
class Decoded:
    """The output of a request and its statistics.

    Attributes:
        tokens: the output, with its stop token.
        forwards: forward passes, with the prefill.
        reached: by depth: the drafts that were verified after all before them were accepted.
        accepted: by depth: the drafts that were accepted.
        stuck: the law left no token after the output.
    """

    tokens: list[int] = field(default_factory=list)
    forwards: int = 0
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    stuck: bool = False


def ar(forward: Forward, request: Request) -> Decoded:
    """Autoregressive decoding: one token per forward pass, of the whole text each time."""
    decoded = Decoded()
    while not request.done(decoded.tokens):
        text = [*request.prompt, *decoded.tokens]
        rows = torch.ones(len(text), len(text)).tril() > 0
        logits = forward(torch.tensor(text), torch.arange(len(text)), rows)
        decoded.forwards += 1
        log_p = request.law(logits[-1], decoded.tokens)
        if log_p.max() == NEVER:
            decoded.stuck = True
            break
        decoded.tokens.append(request.sample(log_p, len(text)))
    return decoded


def isd(
    forward: Forward,
    request: Request,
    stride: int,
    branches: str | Iterable[int] = "all",
    long: int | None = None,
) -> Decoded:
    """Introspective Strided Decoding: verify, commit, draft from the branch of the outcome.

    With a `head` of the request the drafts are chained. With `long`, drafts are also looked up:
    where there are no others, and in the place of others after a match of `long` tokens. The
    branches "lookup" need it.
    """
    chosen = parse_branches(branches, stride)
    depth = stride - 1
    decoded = Decoded(reached=[0] * depth, accepted=[0] * depth)
    drafts: list[int] = []
    laws: list[Tensor] = []
    while not request.done(decoded.tokens):
        text = [*request.prompt, *decoded.tokens]
        masks = {j: depth for j in outcomes(chosen, len(drafts))} if depth else {}
        verify_rows, branch_rows = _window(forward, request.mask_id, text, drafts, masks)
        verify_logits = torch.stack([request.head(row, None) for row in verify_rows])
        decoded.forwards += 1
        committed, accepted = request.verify(decoded.tokens, drafts, laws, verify_logits)
        for k, token in enumerate(committed):
            if request.done(decoded.tokens):
                break
            decoded.tokens.append(token)
            if k < len(drafts):  # the bonus has no draft
                decoded.reached[k] += 1
                decoded.accepted[k] += k < accepted
        drafts, laws = [], []
        if len(committed) == accepted and not request.done(decoded.tokens):
            decoded.stuck = True
            break
        if accepted in branch_rows and not request.done(decoded.tokens):
            drafts, laws = request.draft(decoded.tokens, branch_rows[accepted])
        if long is not None and not request.done(decoded.tokens):
            matched, found = request.look_up(decoded.tokens, depth, verify_logits.shape[1])
            if matched >= (long if drafts else 1):
                drafts, laws = found
    return decoded


def _window(
    forward: Forward, mask_id: int, text: list[int], drafts: list[int], masks: dict[int, int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """What `forward` gives for the verify rows [1 + drafts, .] and for the `masks[j]` MASK rows of
    each outcome j.

    The rows of the forward are the whole text, the drafts, then the MASK rows of each outcome.
    """
    rows = [(token, position) for position, token in enumerate(text + drafts)]
    sees = [set(range(i + 1)) for i in range(len(rows))]  # text and drafts are causal
    branch_rows: dict[int, list[int]] = {j: [] for j in masks}
    for j, depth in masks.items():
        for k in range(1, depth + 1):
            branch_rows[j].append(len(rows))
            rows.append((mask_id, len(text) - 1 + j + k))
            # a MASK row sees the text, j drafts, and the rows of its branch up to itself
            sees.append({*range(len(text) + j), *branch_rows[j]})
    visible = torch.tensor([[column in seen for column in range(len(rows))] for seen in sees])
    tokens, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = forward(tokens, positions, visible)
    pending = len(text) - 1
    verify_rows = found[pending : pending + 1 + len(drafts)]
    return verify_rows, {j: found[indices] for j, indices in branch_rows.items()}
