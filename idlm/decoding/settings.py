"""`Settings`: the sampling settings of a batch, as tensors with a row for each slot.

A request keeps its slot until it ends. Its row is written in place, so a recorded step can read the
tensors. `Features` says, on the host, which parts of the law any live slot needs; a step runs only
those.

Shapes: B slots, V logit columns, N tokens that a step commits at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from idlm.decoding.noise import GOLDEN, Stream, split_mix
from idlm.params import LONGEST_BAD_WORD, MOST_BAD_WORDS, VERIFICATIONS, SamplingParams

NEVER = float("-inf")
ALWAYS = float("inf")
COUPLED, RATIO, RELAXED = range(3)
"""Values of `Settings.rule`: positions in `VERIFICATIONS`."""
REALS = {
    **{"temperature": 0.0, "top_p": ALWAYS, "min_p": 0.0, "repetition": 1.0},
    **{"presence": 0.0, "frequency": 0.0, "log_tau": ALWAYS},
}
"""The float64 columns of a slot, with the values of a free slot."""
INTEGERS = ("top_k", "rule", "hold_until", "prompt_length")
"""The int64 columns of a slot; the columns of its keys follow them."""
ABSENT = -1
"""Stands for any token before the ids of a bad word, and for no token in `Settings.recent`."""


@dataclass(frozen=True)
class Features:
    """The parts of the law that any request of a batch needs; a step leaves out the others.

    The tokens of a slot do not depend on the features of the others: a part that a slot does not
    use leaves its scores bit-equal.

    Attributes:
        sampled: a temperature above 0.
        filtered: top-k, top-p or min-p.
        ranked: top-k or top-p, which need a sort.
        penalised: a repetition, presence or frequency penalty.
        biased: logit bias, banned or allowed tokens.
        held: stop ids that are banned at first (min_tokens).
        worded: bad words of several tokens.
        ratio: verification by the ratio rule.
        relaxed: verification by the relaxed rule (approximate).
    """

    sampled: bool = False
    filtered: bool = False
    ranked: bool = False
    penalised: bool = False
    biased: bool = False
    held: bool = False
    worded: bool = False
    ratio: bool = False
    relaxed: bool = False

    @classmethod
    def of(cls, params: SamplingParams, stop_ids: Sequence[int]) -> Features:
        """The parts that a request needs. A greedy one needs no filter: its law is a point mass."""
        ranked = not params.greedy and (params.top_k > 0 or params.top_p < 1)
        return cls(
            sampled=not params.greedy,
            filtered=ranked or (not params.greedy and params.min_p > 0),
            ranked=ranked,
            penalised=params.penalised,
            biased=bool(params.logit_bias or params.never or params.allowed_token_ids),
            held=params.min_tokens > 0 and len(stop_ids) > 0,
            worded=bool(params.sequences),
            ratio=params.verification == "ratio",
            relaxed=params.verification == "relaxed",
        )

    @property
    def historic(self) -> bool:
        """Whether the law depends on the tokens before."""
        return self.penalised or self.worded

    @property
    def banning(self) -> bool:
        """Whether all tokens may be banned at once. What filters and penalties do leaves some."""
        return self.biased or self.held or self.worded

    def __or__(self, other: Features) -> Features:
        names = [feature.name for feature in fields(self)]
        return Features(*(getattr(self, name) or getattr(other, name) for name in names))


@dataclass
class Settings:
    """The settings of B slots; `SamplingParams` defines what they mean. A free slot is greedy.

    The tensors from `bias` on are large, so they are None until a request needs them.

    Attributes:
        vocab_size: V.
        mask_id: the id that is never chosen; it may be V, without a column.
        temperature, min_p, repetition, presence, frequency: float64 [B].
        top_p: float64 [B]; inf keeps all tokens.
        top_k: int64 [B]; V keeps all tokens.
        log_tau: float64 [B], log of tau; inf if the rule is not relaxed.
        keys: int64 [B, 3], the noise key of each `Stream`: tokens, drafts, acceptances.
        rule: int64 [B], COUPLED, RATIO or RELAXED.
        hold_until: int64 [B], output tokens before which the stop ids are banned (min_tokens).
        prompt_length: int64 [B].
        steps: int64 [V], see `noise.gumbel`; the same for all slots.
        bias: float64 [B, V], added to the logits; -inf for tokens that are banned or not allowed.
        stop: bool [B, V], the ids that end the output.
        seen: bool [B, V], whether a token is in the prompt or the output.
        counts: int32 [B, V], how often a token is in the output.
        words: int64 [B, MOST_BAD_WORDS, LONGEST_BAD_WORD], the bad words of several ids, each after
            as many `ABSENT` as it is shorter; rows of `ABSENT` alone are no words.
        recent: int64 [B, LONGEST_BAD_WORD - 1], the last tokens of the output, after `ABSENT` where
            it is shorter.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    log_tau: Tensor
    top_k: Tensor
    rule: Tensor
    hold_until: Tensor
    prompt_length: Tensor
    keys: Tensor
    steps: Tensor
    vocab_size: int
    mask_id: int
    _numbers: tuple[Tensor, Tensor]
    bias: Tensor | None = None
    stop: Tensor | None = None
    seen: Tensor | None = None
    counts: Tensor | None = None
    words: Tensor | None = None
    recent: Tensor | None = None
    _live: list[Features | None] = field(default_factory=list)
    _together: Features | None = None

    @classmethod
    def empty(
        cls, slots: int, vocab_size: int, mask_id: int, device: torch.device | str = "cpu"
    ) -> Settings:
        """Settings of which every slot is free."""
        # The per-slot tensors are columns of two tables, so a request's row is two writes.
        reals = torch.tensor(list(REALS.values()), dtype=torch.float64, device=device)
        integers = torch.tensor([vocab_size, 0, 0, 0, 0, 0, 0], device=device)
        tables = reals.repeat(slots, 1), integers.repeat(slots, 1)
        numbers: dict[str, Any] = dict(zip(REALS, tables[0].unbind(1), strict=True))
        numbers |= zip(INTEGERS, tables[1][:, :4].unbind(1), strict=True)
        keys, steps = tables[1][:, 4:], torch.arange(1, vocab_size + 1, device=device) * GOLDEN
        numbers |= {"keys": keys, "steps": steps, "vocab_size": vocab_size, "mask_id": mask_id}
        return cls(**numbers, _numbers=tables, _live=[None] * slots)

    @property
    def features(self) -> Features:
        """The union over the live slots. It is kept on the host, so reading it does not wait."""
        if self._together is None:
            self._together = Features()
            for needs in {needs for needs in self._live if needs is not None}:
                self._together |= needs
        return self._together

    def put(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        stop_ids: Iterable[int] = (),
    ) -> None:
        """Write the row of a request that is new, or that is resumed with the `output` it has.

        `stop_ids` are all ids that end it: its own, and the model's end token unless `ignore_eos`.
        """
        ends = sorted(set(stop_ids))
        needs = Features.of(params, ends)
        self._live[slot], self._together = needs, None
        self._put_numbers(slot, params, needs, seed, len(prompt))
        self._put_bias(slot, params, needs)
        if needs.held:
            self._put_stop(slot, ends)
        if needs.penalised:
            self._put_history(slot, prompt, output)
        if needs.worded or self.words is not None:  # the row may hold another request's words
            self._put_words(slot, params.sequences, output)

    def clear(self, slot: int) -> None:
        """Free a slot: `features` no longer counts its request."""
        self._live[slot] = self._together = None

    def record(self, tokens: Tensor, count: Tensor) -> None:
        """Add committed tokens to the history, on the device: the first `count` [B] of each row of
        `tokens` [B, N].

        Needed if `features.historic`; a no-op until the first request that depends on it.
        """
        if self.seen is not None and self.counts is not None:
            fresh = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
            self.counts.scatter_add_(1, tokens.clamp(0, self.vocab_size - 1), fresh.to(torch.int32))
            self.seen.logical_or_(self.counts > 0)
        if self.recent is not None:
            kept = torch.arange(self.recent.shape[1], device=tokens.device) + count[:, None]
            self.recent.copy_(torch.cat([self.recent, tokens], dim=1).gather(1, kept))

    def _put_numbers(
        self, slot: int, params: SamplingParams, needs: Features, seed: int, prompt_length: int
    ) -> None:
        reals, integers = self._numbers
        tau = torch.tensor(ALWAYS if params.tau is None else params.tau, dtype=torch.float64)
        numbers = torch.tensor(
            [
                params.temperature,
                params.top_p if needs.filtered and params.top_p < 1 else ALWAYS,
                params.min_p if needs.filtered else 0.0,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
                tau.log().item(),
            ],
            dtype=torch.float64,
        )
        reals[slot] = on_device(numbers, reals.device)
        top_k = (
            min(params.top_k, self.vocab_size)
            if needs.filtered and params.top_k > 0
            else self.vocab_size
        )
        rule = VERIFICATIONS.index(params.verification)
        streams = torch.tensor(
            [Stream.TOKEN, Stream.DRAFT if rule == RATIO else Stream.TOKEN, Stream.ACCEPT]
        )
        keys = split_mix(torch.tensor(seed), streams)
        held = params.min_tokens if needs.held else 0
        numbers = torch.cat([torch.tensor([top_k, rule, held, prompt_length]), keys])
        integers[slot] = on_device(numbers, integers.device)

    def _put_bias(self, slot: int, params: SamplingParams, needs: Features) -> None:
        if self.bias is None:
            if not needs.biased:
                return
            self.bias = self._table(torch.float64)
        row = torch.zeros(self.vocab_size, dtype=torch.float64)
        if params.allowed_token_ids is not None:
            row.fill_(NEVER)[list(params.allowed_token_ids)] = 0.0
        for token, bias in params.logit_bias.items():
            row[token] += bias
        row[list(params.never)] = NEVER
        self.bias[slot] = on_device(row, self.bias.device)

    def _put_stop(self, slot: int, ends: list[int]) -> None:
        if self.stop is None:
            self.stop = self._table(torch.bool)
        ids = on_device(torch.tensor(ends), self.stop.device)
        self.stop[slot].fill_(False).index_fill_(0, ids, True)

    def _put_history(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        if self.seen is None or self.counts is None:
            self.seen, self.counts = self._table(torch.bool), self._table(torch.int32)
        tokens = torch.tensor(list(output), dtype=torch.int64)
        counts = torch.bincount(tokens, minlength=self.vocab_size).to(torch.int32)
        seen = counts > 0
        # an id past the logit columns (an added MASK row) has no logit to penalise
        seen[[token for token in prompt if token < self.vocab_size]] = True
        self.seen[slot] = on_device(seen, self.seen.device)
        self.counts[slot] = on_device(counts, self.counts.device)

    def _put_words(
        self, slot: int, words: Sequence[tuple[int, ...]], output: Sequence[int]
    ) -> None:
        shape = (MOST_BAD_WORDS, LONGEST_BAD_WORD)
        if self.words is None or self.recent is None:
            self.words = self._absent(*shape)
            self.recent = self._absent(LONGEST_BAD_WORD - 1)
        rows = torch.full(shape, ABSENT)
        for row, word in zip(rows, words, strict=False):
            row[-len(word) :] = torch.tensor(word)
        recent = [ABSENT] * (LONGEST_BAD_WORD - 1) + list(output)
        last = torch.tensor(recent[len(output) :])
        self.words[slot] = on_device(rows, self.words.device)
        self.recent[slot] = on_device(last, self.recent.device)

    def _absent(self, *shape: int) -> Tensor:
        return torch.full((len(self._live), *shape), ABSENT, device=self.steps.device)

    def _table(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(self._live), self.vocab_size, dtype=dtype, device=self.steps.device)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; from pinned memory, so that a GPU's host does not wait for the
    copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
