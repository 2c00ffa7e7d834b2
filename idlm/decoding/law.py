"""`Law`: the one place where logits become what tokens are chosen by.

Every token, every draft and every reported log-probability goes through `Law.scores`, so the row
that verifies a draft and the mask that proposed it are treated alike. In order: MASK is banned;
penalties; logit bias and banned tokens; stop ids before `min_tokens`; temperature; top-k, top-p and
min-p, each on what is left. A guide restricts the logits before all this (`restrict`).

Each slot of a batch has settings of its own; a single request is a batch of one. A setting that a
slot does not use leaves its numbers as they are, to the bit. Whatever is computed is float64;
logits that only lose their MASK keep their type. Nothing here looks at a value on the host, so a
step can be recorded and replayed.

Shapes: B slots, R rows, D tokens ahead, V logit columns. `first` int64 [B] is the position of the
token that row 0 gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.decoding.noise import Stream, gumbel
from idlm.decoding.settings import NEVER, Features, Settings
from idlm.params import SamplingParams

Chooser = Callable[[Tensor, Settings, bool, Stream, Tensor], Tensor]
"""`choose`, or a kernel that does the same."""


def positions(first: Tensor, rows: int) -> Tensor:
    """The positions [B, R] of the tokens that the rows give."""
    return first[:, None] + torch.arange(rows, device=first.device)


def restrict(scores: Tensor, allowed: Tensor) -> Tensor:
    """-inf for all but the tokens `allowed`, bool, broadcastable to the scores.

    Nothing in the law makes -inf another number, so logits can be restricted before it.
    """
    return scores.masked_fill(~allowed, NEVER)


def choose(
    scores: Tensor,
    settings: Settings,
    sampled: bool,
    stream: Stream,
    first: Tensor,
) -> Tensor:
    """A token of each row, int64 [B, R]: argmax(scores + temperature * noise), of equals the first.

    The same argmax as that of the log-probabilities plus noise, without a normalisation, and the
    same numbers whatever the other slots need. `sampled` is False where every slot is greedy.
    """
    if sampled:
        at = positions(first, scores.shape[1])
        noise = gumbel(settings.keys[:, stream], at, settings.steps)
        scores = noise.mul_(settings.temperature[:, None, None]).add_(scores)
    return scores.argmax(dim=-1)


@dataclass(frozen=True)
class Law:
    """The law of each slot in one step.

    Attributes:
        settings: of the slots.
        features: what any of them needs, `settings.features`.
        chooser: what chooses tokens; a GPU has a kernel for it.
    """

    settings: Settings
    features: Features
    chooser: Chooser = choose

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
        """For a request that has no slot: a batch of one, without stop ids."""
        settings = Settings.empty(1, vocab_size, mask_id, device)
        settings.put(0, params, params.seed or 0, prompt, output)
        return cls(settings, settings.features)

    def scores(self, logits: Tensor, first: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Logits [B, R, V] adjusted and filtered: -inf for a token that cannot come out.

        Args:
            logits: a head's own output: MASK's column is overwritten, which saves a copy.
            first: int64 [B].
            ahead: int64 [B, D], tokens that are not yet recorded in the settings. The last row
                comes after all of them, the row before it after all but the last, and so on.
                Only penalties look at them.
        """
        settings, features = self.settings, self.features
        if settings.mask_id < settings.vocab_size:
            logits[..., settings.mask_id] = NEVER
        scores = logits
        if features.penalised:
            scores = _penalised(scores.to(torch.float64), settings, ahead)
        if features.biased and settings.bias is not None:
            scores = scores + settings.bias[:, None]
        if features.held and settings.stop is not None:
            outputs = positions(first - settings.prompt_length, logits.shape[1])
            early = outputs < settings.hold_until[:, None]
            scores = scores.masked_fill(settings.stop[:, None] & early[..., None], NEVER)
        return _filtered(scores, settings, features) if features.filtered else scores

    def choose(self, scores: Tensor, stream: Stream, first: Tensor) -> Tensor:
        """A token of each row of `scores`, int64 [B, R]."""
        return self.chooser(scores, self.settings, self.features.sampled, stream, first)

    def log_p(self, scores: Tensor) -> Tensor:
        """Log-probabilities, float64; for greedy slots a point mass on the first of the best."""
        best = scores.argmax(dim=-1, keepdim=True)
        point = torch.full_like(scores, NEVER, dtype=torch.float64).scatter(2, best, 0.0)
        sampled = self.settings.temperature[:, None, None] > 0
        return torch.where(sampled, self.soft_log_p(scores), point)

    def soft_log_p(self, scores: Tensor) -> Tensor:
        """Log-probabilities, float64; for greedy slots those at temperature 1."""
        return (scores / _divisor(self.settings)).log_softmax(dim=-1)


def history(settings: Settings, ahead: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """What comes before each row, with `ahead` as in `Law.scores`.

    Returns:
        Bool [B, R, V], the token is in the prompt or the output; int32 [B, R, V], how often it is
        in the output.
    """
    if settings.seen is None or settings.counts is None or ahead is None:
        raise ValueError("penalties need the history of the slots and the tokens ahead")
    slots, depth = ahead.shape
    placed = settings.counts.new_zeros(slots, 1 + depth, settings.vocab_size)
    placed[:, 1:].scatter_(2, ahead[..., None].clamp(0, settings.vocab_size - 1), 1)
    fresh = placed.cumsum(dim=1)[:, 1 + depth - rows :]
    return settings.seen[:, None] | (fresh > 0), settings.counts[:, None] + fresh


def _penalised(scores: Tensor, settings: Settings, ahead: Tensor | None) -> Tensor:
    """As in vLLM and the OpenAI API: repetition counts prompt and output, the others the output."""
    seen, times = history(settings, ahead, scores.shape[1])
    rate = settings.repetition[:, None, None]
    scores = torch.where(seen, torch.where(scores > 0, scores / rate, scores * rate), scores)
    scores = scores - settings.frequency[:, None, None] * times.to(torch.float64)
    return scores - settings.presence[:, None, None] * (times > 0)


def _filtered(scores: Tensor, settings: Settings, features: Features) -> Tensor:
    """-inf for what top-k, top-p and min-p drop; the others as they were."""
    scaled = scores / _divisor(settings)
    if features.ranked:
        dropped = _past_rank(scaled, settings)
        scores, scaled = scores.masked_fill(dropped, NEVER), scaled.masked_fill(dropped, NEVER)
    probabilities = scaled.softmax(dim=-1)
    floor = settings.min_p[:, None, None] * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < floor, NEVER)


def _past_rank(scaled: Tensor, settings: Settings) -> Tensor:
    """What top-k, then top-p drop: bool [B, R, V].

    Tokens equal to the k-th stay, so that no sort decides between equals. The likeliest stays.
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    kth = ordered.gather(2, (settings.top_k - 1)[:, None, None].expand(-1, ordered.shape[1], 1))
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    probabilities = ordered.softmax(dim=-1)
    before_it = probabilities.cumsum(dim=-1) - probabilities
    drop = (before_it >= settings.top_p[:, None, None]) | (ordered < kth)
    return torch.zeros_like(drop).scatter(2, order, drop)


def _divisor(settings: Settings) -> Tensor:
    """The temperature [B, 1, 1]; 1 for greedy slots."""
    return torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None, None]
