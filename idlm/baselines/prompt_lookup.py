"""Prompt lookup: drafts are what followed the last words when they were last in the text.

It needs no training and no MASK rows. The coupled rule verifies the drafts, so the output is AR's;
it draws on texts that repeat themselves. After "prompt lookup decoding" (Saxena 2023).

Shapes: B sequences, K drafts, V logit columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from idlm.baselines.block_cache import BlockCache
from idlm.baselines.written import Written, cut, law_of
from idlm.decoding.law import Law
from idlm.decoding.settings import Settings
from idlm.decoding.verify import Drafts, verify
from idlm.errors import InputError
from idlm.models.gate import NO_ROWS
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams


@dataclass(frozen=True)
class PromptLookup:
    """At most `drafts` tokens, found by the last `ngram` tokens or by fewer.

    Raises:
        InputError: a number is below 1.
    """

    ngram: int = 3
    drafts: int = 7

    def __post_init__(self) -> None:
        if min(self.ngram, self.drafts) < 1:
            raise InputError(f"ngram {self.ngram}, drafts {self.drafts}; give 1 or more of each")

    def find(self, text: Sequence[int]) -> list[int]:
        """What followed the longest ending of the text that was there before, the last time."""
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            ending = list(text[-size:])
            for start in range(len(text) - size - 1, -1, -1):
                if list(text[start : start + size]) == ending:
                    return list(text[start + size : start + size + self.drafts])
        return []


@torch.inference_mode()
def decode(
    idlm: Idlm,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rule: PromptLookup | None = None,
) -> list[Written]:
    """Decode a batch of prompts; number i has the seed `params.seed` + i.

    Raises:
        InputError: a prompt or the params cannot be used.
    """
    rule, texts = rule or PromptLookup(), [list(prompt) for prompt in prompts]
    longest = max(map(len, texts), default=0) + params.max_tokens + rule.drafts
    law = _law(idlm, texts, params)
    if not texts or not all(texts) or longest > idlm.context:
        raise InputError(
            f"prompts of {sorted(map(len, texts))[-3:]} tokens, {params.max_tokens} more and "
            f"{rule.drafts} drafts: give a prompt, and at most {idlm.context} tokens in all"
        )
    lengths = [len(text) for text in texts]
    cache, forwards, rows = BlockCache(longest), [0] * len(texts), [0] * len(texts)
    _prefill(idlm, texts, cache)
    live = list(range(len(texts)))
    while live:
        drafts = [rule.find(text) if row in live else [] for row, text in enumerate(texts)]
        taken = _window(idlm, texts, drafts, cache, law)
        for row in live:
            forwards[row] += 1
            rows[row] += 1 + len(drafts[row])
            texts[row] += taken[row]
        live = [
            row
            for row in live
            if len(answer := texts[row][lengths[row] :]) < params.max_tokens
            and not idlm.eos_ids.intersection(answer)
        ]
    return [
        Written(text[:first], cut(text[first:], idlm.eos_ids, params.max_tokens), count, width)
        for text, first, count, width in zip(texts, lengths, forwards, rows, strict=True)
    ]


def _law(idlm: Idlm, texts: list[list[int]], params: SamplingParams) -> Law:
    law_of(idlm, params)  # refuses what it does not know
    settings = Settings.empty(len(texts), idlm.vocab_size, idlm.mask_id)
    plain = replace(params, verification="coupled", tau=None)
    for row, text in enumerate(texts):
        settings.put(row, plain, (params.seed or 0) + row, text)
    return Law(settings, settings.features)


def _prefill(idlm: Idlm, texts: list[list[int]], cache: BlockCache) -> None:
    """Write all tokens of the prompts but the last, which is pending."""
    width = max(map(len, texts)) - 1
    if width:
        rows = torch.tensor([(text + [0] * width)[:width] for text in texts])
        _forward(idlm, rows, torch.zeros(len(texts), dtype=torch.int64), cache)


def _forward(idlm: Idlm, rows: Tensor, first: Tensor, cache: BlockCache) -> Tensor:
    """Hidden states of causal rows [B, Q] whose first position is `first` [B]; they are stored."""
    index = torch.arange(rows.shape[1])
    position = first[:, None] + index
    every = torch.ones(len(rows), dtype=torch.bool)
    cache.prepare(position, first, (index <= index[:, None])[None], every)
    return idlm.hidden(rows, position, None, NO_ROWS, cache)


def _window(
    idlm: Idlm, texts: list[list[int]], drafts: list[list[int]], cache: BlockCache, law: Law
) -> list[list[int]]:
    """Verify the drafts of each text: the tokens to commit."""
    width = max(map(len, drafts))
    padded = torch.tensor([(one + [0] * width)[:width] for one in drafts], dtype=torch.int64)
    valid = torch.tensor([len(one) for one in drafts])
    pending = torch.tensor([text[-1] for text in texts])
    length = torch.tensor([len(text) for text in texts])
    hidden = _forward(idlm, torch.cat([pending[:, None], padded], 1), length - 1, cache)
    found = verify(law, idlm.head(hidden).clone(), Drafts(padded, valid), length)
    return [
        tokens[: count + 1]
        for tokens, count in zip(found.tokens.tolist(), found.accepted.tolist(), strict=True)
    ]
