"""The training objective: layout, masks and loss of one batch.

Shapes: B batch, L padded length of the clean text x_0, R padded number of MASK rows, D hidden size,
V logit columns, n supervised rows. P is the prompt's length, b the block size.

The papers' layout is `[x_t | x_0]`, with x_t as long as x_0. Here x_t holds only its MASK rows:

* the clean prompt rows of x_t compute the same as those rows of x_0, so a MASK row whose block
  begins in the prompt sees the prompt in x_0 instead;
* the MASK row of the last response token predicts nothing and no other row sees it, so it is left
  out;
* x_0 never sees x_t, so the halves run one after the other, the MASK rows over the stored keys and
  values of x_0. With a frozen base the first half needs no gradient.

The result is the same: the tests compare it with the full layout in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.decoding.scores import Scores
from idlm.models.attention import Visible, attend
from idlm.models.idlm_model import Idlm

EXCLUDED = -1e30
"""The logit of MASK, which is never emitted; finite, because 0 * infinity is NaN in the soft terms.
"""


class Texts(NamedTuple):
    """A batch of clean texts, padded on the right.

    tokens [B, L]; prompt and length [B], with 1 <= P < length; phase [B], >= 0: taken modulo b.
    """

    tokens: Tensor
    prompt: Tensor
    length: Tensor
    phase: Tensor


@dataclass(frozen=True)
class Wanted:
    """The terms that a step needs: MASK rows in blocks of `block_size` (0: AR only), CE_clean, soft
    term."""

    block_size: int
    clean: bool
    soft: Literal["none", "kl", "tv"] = "none"


class Terms(NamedTuple):
    """Sums over the supervised rows of a batch, in nats (the soft term of "tv": probability); 0 if
    not wanted."""

    noisy: Tensor
    clean: Tensor
    soft: Tensor


class CleanHalf:
    """Keys and values of x_0, kept for the MASK rows: the `Cache` of two forwards.

    Attributes:
        visible: what the rows of the current forward see.
    """

    def __init__(self, visible: Visible) -> None:
        self.visible = visible
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """Keep x_0's keys and values in the first forward; in the second append them to those of
        the MASK rows.

        Shapes: keys and values are [B, G, R + L, E] in the second forward.
        """
        if layer in self.layers:
            clean_key, clean_value = self.layers[layer]
            key, value = torch.cat([key, clean_key], dim=2), torch.cat([value, clean_value], dim=2)
        else:
            self.layers[layer] = (key, value)
        return attend(query, key, value, self.visible.within(scores.window), scores)


def mask_rows(prompt: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, R] of the MASK rows (P .. length-2, then padding), and which are not padding:
    bool [B, R]."""
    count = length - prompt - 1
    row = torch.arange(max(int(count.max()), 1), device=prompt.device)
    return prompt[:, None] + row, row < count[:, None]


def clean_rows(prompt: Tensor, length: Tensor, width: int) -> Tensor:
    """Which rows of x_0 have a response token as target: P-1 .. length-2, bool [B, width]."""
    position = torch.arange(width, device=prompt.device)
    return (position >= prompt[:, None] - 1) & (position < length[:, None] - 1)


def visible(
    positions: Tensor, prompt: Tensor, phase: Tensor, block_size: int, width: int
) -> Visible:
    """What the MASK rows at `positions` [B, R] see of `[x_t | x_0]`, whose x_0 has `width` rows."""
    start = (positions + phase[:, None]) // block_size * block_size - phase[:, None]
    block = (start[:, :, None] == start[:, None, :]) & (
        positions[:, :, None] >= positions[:, None, :]
    )
    clean = torch.arange(width, device=positions.device).expand(len(positions), -1)
    text = clean[:, None] < torch.maximum(start, prompt[:, None])[:, :, None]
    rows = torch.cat([block, text], dim=2)[:, None]
    return Visible(rows, positions, torch.cat([positions, clean], dim=1))


def soft_term(noisy: Tensor, clean: Tensor, kind: str) -> Tensor:
    """The distance of q = softmax(noisy) from p = softmax(clean), both [n, V], summed over rows.

    "kl" is KL(p || q); "tv" the total variation: one minus the acceptance rate sum min(p, q). p has
    no gradient.
    """
    teacher = clean.detach().log_softmax(-1)
    student = noisy.log_softmax(-1)
    if kind == "kl":
        return (teacher.exp() * (teacher - student)).sum()
    return 0.5 * (teacher.exp() - student.exp()).abs().sum()


class Objective(nn.Module):
    """The model with its loss as one module, so that data parallelism wraps both forwards.

    Args:
        trains_clean: whether the clean half has gradients (not with a gated LoRA).
        emits_mask: whether softmaxes include the MASK column, as in the plain AR loss.
    """

    def __init__(self, idlm: Idlm, trains_clean: bool, emits_mask: bool = False) -> None:
        super().__init__()
        self.model = idlm.model
        self.idlm = idlm
        self.trains_clean = trains_clean
        self.emits_mask = emits_mask

    def forward(self, texts: Texts, wanted: Wanted) -> Terms:
        """The sums of the wanted terms over the batch."""
        noisy_logits, clean_logits = self.logits(
            texts, wanted.block_size, wanted.clean or wanted.soft != "none"
        )
        zero = texts.tokens.new_zeros((), dtype=torch.float32)
        noisy = clean = soft = zero
        positions, is_row = mask_rows(texts.prompt, texts.length)
        if wanted.block_size:
            noisy = F.cross_entropy(
                noisy_logits, _next(texts.tokens, positions)[is_row], reduction="sum"
            )
        if wanted.clean:
            is_target = F.pad(
                clean_rows(texts.prompt, texts.length, texts.tokens.shape[1]), (1, 0)
            )[:, :-1]
            clean = F.cross_entropy(clean_logits, texts.tokens[is_target], reduction="sum")
        if wanted.soft != "none":
            soft = soft_term(noisy_logits, clean_logits[self.teachers(texts)], wanted.soft)
        return Terms(noisy, clean, soft)

    def logits(self, texts: Texts, block_size: int, clean: bool) -> tuple[Tensor, Tensor]:
        """Logits of the supervised MASK rows [n, V] and of the supervised clean rows [n', V]; empty
        if not wanted."""
        width = texts.tokens.shape[1]
        none = texts.tokens.new_zeros((0, self.idlm.vocab_size), dtype=torch.float32)
        with torch.set_grad_enabled(self.trains_clean and torch.is_grad_enabled()):
            text_positions = torch.arange(width, device=texts.tokens.device).expand_as(texts.tokens)
            half = CleanHalf(_causal(text_positions))
            hidden = self.idlm.hidden(texts.tokens, text_positions, None, cache=half)
            clean_logits = (
                self._head(hidden[clean_rows(texts.prompt, texts.length, width)]) if clean else none
            )
        if not block_size:
            return none, clean_logits
        positions, is_row = mask_rows(texts.prompt, texts.length)
        half.visible = visible(positions, texts.prompt, texts.phase % block_size, block_size, width)
        masks = torch.full_like(positions, self.idlm.mask_id)
        hidden = self.idlm.hidden(masks, positions, None, slice(0, masks.shape[1]), half)
        return self._head(hidden[is_row]), clean_logits

    @staticmethod
    def teachers(texts: Texts) -> Tensor:
        """Which of the n' supervised clean rows predict the token of a MASK row: all but each
        text's first, [n']."""
        width = texts.tokens.shape[1]
        first = torch.arange(width, device=texts.tokens.device) == texts.prompt[:, None] - 1
        return ~first[clean_rows(texts.prompt, texts.length, width)]

    @torch.no_grad()
    def measure(self, texts: Texts, block_size: int) -> Tensor:
        """Sums by draft depth 1..b: rows, sum_v min(p, q), and rows whose argmax agrees; float64
        [3, b].

        The k-th MASK row of a block has seen everything before the block, so it is a draft of depth
        k.
        """
        noisy, clean = self.logits(texts, block_size, clean=True)
        teacher, student = clean[self.teachers(texts)].softmax(-1), noisy.softmax(-1)
        positions, is_row = mask_rows(texts.prompt, texts.length)
        start = (positions + texts.phase[:, None] % block_size) // block_size * block_size
        start = torch.maximum(start - texts.phase[:, None] % block_size, texts.prompt[:, None])
        depth = (positions - start)[is_row]
        agree = teacher.argmax(-1) == student.argmax(-1)
        rows = torch.stack(
            [torch.ones_like(depth), torch.minimum(teacher, student).sum(-1), agree]
        ).double()
        return rows.new_zeros(3, block_size).index_add_(1, depth, rows)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden rows [n, D], in float32 or more, without MASK."""
        logits = self.idlm.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.emits_mask and self.idlm.mask_id < logits.shape[-1]:
            logits = logits.index_fill(
                -1, torch.tensor(self.idlm.mask_id, device=logits.device), EXCLUDED
            )
        return logits


def _causal(positions: Tensor) -> Visible:
    """Causal visibility of [B, L] rows; padding is on the right, so no token sees it."""
    width = positions.shape[1]
    rows = torch.ones(width, width, dtype=torch.bool, device=positions.device).tril()
    return Visible(rows[None, None], positions[:1], positions[:1])


def _next(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens after `positions` [B, R]; padding rows have arbitrary ones."""
    return tokens.gather(1, (positions + 1).clamp(max=tokens.shape[1] - 1))
