"""`Law`: the one place where logits become the probabilities that tokens are chosen by.

Every token, draft and reported log-probability goes through `Law.scores`, so a verify row and the
MASK row that drafted for it are treated alike. The order of operations is

    1. ban MASK
    2. repetition, frequency and presence penalties
    3. logit bias, banned and allowed tokens
    4. ban the stop ids until `min_tokens` tokens are out; ban the last tokens of bad words
    5. temperature
    6. top-k, then top-p, then min-p, each on the tokens that the one before kept

A guide restricts the logits before all of these (`restrict`).

Each slot of a batch has its own settings; a single request is a batch of one. A setting that a slot
does not use leaves its scores bit-equal. Computed scores are float64; logits that only lose their
MASK column keep their type. Nothing here reads a value on the host, so a step can be recorded and
replayed.

Shapes: B slots, R rows, D tokens ahead, V logit columns. `position` int64 [B] is the position of
the token that row 0 gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.decoding.noise import Stream, gumbel
from idlm.decoding.settings import ABSENT, NEVER, Features, Settings
from idlm.params import SamplingParams

Chooser = Callable[[Tensor, Settings, bool, Stream, Tensor], Tensor]
"""The signature of `choose`, which a GPU kernel implements too."""

Filter = Callable[[Tensor, Settings, Features], Tensor]
"""The signature of `filtered`, which `idlm.kernels.keep` implements without a sort."""


def positions(position: Tensor, rows: int) -> Tensor:
    """The positions [B, R] of the tokens that the rows give."""
    return position[:, None] + torch.arange(rows, device=position.device)


def restrict(scores: Tensor, allowed: Tensor) -> Tensor:
    """Set the scores of all tokens that are not `allowed` to -inf.

    `allowed` is bool and broadcasts to the scores. The law maps -inf to -inf, so logits can be
    restricted before it.
    """
    return scores.masked_fill(~allowed, NEVER)


def choose(
    scores: Tensor,
    settings: Settings,
    sampled: bool,
    stream: Stream,
    position: Tensor,
) -> Tensor:
    """Choose a token for each row: argmax(scores + temperature * noise), int64 [B, R].

    This is the Gumbel-max sample of softmax(scores / temperature), without the normalisation. The
    smallest id wins a tie. `sampled` is False if every slot is greedy, which saves the noise.
    """
    if sampled:
        at = positions(position, scores.shape[1])
        noise = gumbel(settings.keys[:, stream], at, settings.steps)  # [B, R, V]
        # a greedy slot has temperature 0: its scores stay as they are
        scores = noise.mul_(settings.temperature[:, None, None]).add_(scores)
    return scores.argmax(dim=-1)


def filtered(scores: Tensor, settings: Settings, features: Features) -> Tensor:
    """Set the tokens that top-k, top-p or min-p drop to -inf; the scores [B, R, V] of the others
    do not change.

    This is the definition, by a sort.
    """
    scaled = scores / divisor(settings)
    if features.ranked:
        dropped = past_rank(scaled, settings.top_k, settings.top_p)
        scores, scaled = scores.masked_fill(dropped, NEVER), scaled.masked_fill(dropped, NEVER)
    probabilities = scaled.softmax(dim=-1)  # of the tokens that are left
    floor = settings.min_p[:, None, None] * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < floor, NEVER)


def past_rank(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The tokens that top-k, then top-p [B] drop: bool [B, R, V].

    Tokens equal to the k-th are kept, so the order of equal scores has no influence. The most
    likely token is always kept.
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    # [B, R, 1]: the k-th largest score of each row, with the slot's own k
    kth = ordered.gather(2, (top_k - 1)[:, None, None].expand(-1, ordered.shape[1], 1))
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    probabilities = ordered.softmax(dim=-1)
    # the mass before a token: it is dropped if the tokens before it reach top_p already
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    drop = (mass_before >= top_p[:, None, None]) | (ordered < kth)
    return torch.zeros_like(drop).scatter(2, order, drop)  # back to the order of the vocabulary


def divisor(settings: Settings) -> Tensor:
    """The temperature [B, 1, 1]; 1 for greedy slots."""
    return torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None, None]


@dataclass(frozen=True)
class Law:
    """The law of each slot in one step.

    Attributes:
        settings: the settings of the B slots.
        features: what any of the slots needs, `settings.features`.
        chooser: the implementation of `choose`; a GPU has a kernel.
        filter: the implementation of `filtered`; an engine has one without a sort.
    """

    settings: Settings
    features: Features
    chooser: Chooser = choose
    filter: Filter = filtered

    @classmethod
    def of_one(
        cls,
        params: SamplingParams,
        vocab_size: int,
        mask_id: int,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> Law:
        """The law of a request that has no slot: a batch of one, without stop ids."""
        settings = Settings.empty(1, vocab_size, mask_id, device)
        settings.put(0, params, params.seed or 0, prompt, output)
        return cls(settings, settings.features)

    def scores(self, logits: Tensor, position: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Adjust and filter logits [B, R, V]; a token that cannot be chosen gets -inf.

        Args:
            logits: the output of a head. MASK's column is overwritten in place, which saves a copy.
            position: int64 [B].
            ahead: int64 [B, D], tokens that are not recorded in the settings yet. The last row
                follows all of them, the row before it all but the last, and so on. Only penalties
                and bad words use them.
        """
        settings, features = self.settings, self.features
        if settings.mask_id < settings.vocab_size:
            logits[..., settings.mask_id] = NEVER
        scores = logits
        if features.penalised:
            scores = _penalised(scores.to(torch.float64), settings, ahead)
        if features.biased and settings.bias is not None:
            scores = scores + settings.bias[:, None]  # [B, R, V] + [B, 1, V]
        if features.held and settings.stop is not None:
            # [B, R]: how many output tokens come before the token of each row
            outputs = positions(position - settings.prompt_length, logits.shape[1])
            early = outputs < settings.hold_until[:, None]
            scores = scores.masked_fill(settings.stop[:, None] & early[..., None], NEVER)
        if features.worded:
            scores = scores.masked_fill(completing(settings, ahead, logits.shape[1]), NEVER)
        return self.filter(scores, settings, features) if features.filtered else scores

    def choose(self, scores: Tensor, stream: Stream, position: Tensor) -> Tensor:
        """Choose a token for each row of `scores` [B, R, V]: int64 [B, R]."""
        return self.chooser(scores, self.settings, self.features.sampled, stream, position)

    def log_p(self, scores: Tensor) -> Tensor:
        """Log-probabilities, float64 [B, R, V]; for greedy slots a point mass on the argmax."""
        best = scores.argmax(dim=-1, keepdim=True)
        point = torch.full_like(scores, NEVER, dtype=torch.float64).scatter(2, best, 0.0)
        sampled = self.settings.temperature[:, None, None] > 0
        return torch.where(sampled, self.soft_log_p(scores), point)

    def soft_log_p(self, scores: Tensor) -> Tensor:
        """Log-probabilities, float64 [B, R, V]; for greedy slots those at temperature 1."""
        return (scores / divisor(self.settings)).log_softmax(dim=-1)

    def raw_log_p(self, logits: Tensor) -> Tensor:
        """The model's own log-probabilities, float64 [B, R, V]: without any setting of the request
        and without a guide. MASK's column of `logits` is overwritten."""
        if self.settings.mask_id < self.settings.vocab_size:
            logits[..., self.settings.mask_id] = NEVER
        return logits.to(torch.float64).log_softmax(dim=-1)


def history(settings: Settings, ahead: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """The tokens before each row, with `ahead` as in `Law.scores`.

    Returns:
        bool [B, R, V], whether a token is in the prompt or the output; int32 [B, R, V], how often
        it is in the output.
    """
    if settings.seen is None or settings.counts is None or ahead is None:
        raise ValueError("penalties need the history of the slots and the tokens ahead")
    slots, depth = ahead.shape
    # row d of `placed` [B, 1 + D, V] is the one-hot of token d - 1; row 0 is empty. The cumulative
    # sum counts the first d tokens ahead, and the last R rows of it belong to the R rows.
    placed = settings.counts.new_zeros(slots, 1 + depth, settings.vocab_size)
    placed[:, 1:].scatter_(2, ahead[..., None].clamp(0, settings.vocab_size - 1), 1)
    fresh = placed.cumsum(dim=1)[:, 1 + depth - rows :]
    return settings.seen[:, None] | (fresh > 0), settings.counts[:, None] + fresh


def completing(settings: Settings, ahead: Tensor | None, rows: int) -> Tensor:
    """The tokens that would complete a bad word: bool [B, R, V]; `ahead` as in `Law.scores`."""
    words, recent = settings.words, settings.recent
    if words is None or recent is None or ahead is None:
        raise ValueError("bad words need the history of the slots and the tokens ahead")
    text, length = torch.cat([recent, ahead], dim=1), recent.shape[1]
    before = text.unfold(1, length, 1)[:, 1 + ahead.shape[1] - rows :]  # [B, R, length]
    begin, last = words[:, None, :, :-1], words[:, None, :, -1].expand(-1, rows, -1)
    # [B, R, words]: whether the tokens before a row end with all of a word but its last token
    match = ((begin == before[:, :, None]) | (begin == ABSENT)).all(dim=-1) & (last != ABSENT)
    # the last column takes the words that do not match
    banned = match.new_zeros(*match.shape[:2], settings.vocab_size + 1)
    place = last.masked_fill(~match, settings.vocab_size)
    return banned.scatter(2, place, torch.ones_like(match))[..., :-1]


def _penalised(scores: Tensor, settings: Settings, ahead: Tensor | None) -> Tensor:
    """Apply the penalties [B, R, V] as vLLM and the OpenAI API define them.

    The repetition penalty counts prompt and output; presence and frequency count the output.
    """
    seen, times = history(settings, ahead, scores.shape[1])
    rate = settings.repetition[:, None, None]
    scores = torch.where(seen, torch.where(scores > 0, scores / rate, scores * rate), scores)
    scores = scores - settings.frequency[:, None, None] * times.to(torch.float64)
    return scores - settings.presence[:, None, None] * (times > 0)
