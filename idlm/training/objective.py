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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.decoding.scores import Scores
from idlm.models.attention import Visible, attend
from idlm.models.idlm_model import Idlm
from idlm.training.losses import (
    ChunkLoss,
    RowWeights,
    chunks,
    continuation,
    row_terms,
    sum_in_chunks,
)

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
    """The terms that a step needs: MASK rows in blocks of `block_size` (0: AR only) under
    `weights`, CE_clean, and KL and TV (`soft`), even where their weights are 0 at this step."""

    block_size: int
    clean: bool
    soft: bool = False
    weights: RowWeights = RowWeights()


class Terms(NamedTuple):
    """Sums over the supervised rows of a batch; 0 if not wanted.

    Attributes:
        noisy: the weighted loss of the MASK rows.
        clean: CE_clean, in nats.
        ce, kl, tv: the terms of `noisy` without weights or gradients, in nats (TV: probability).
    """

    noisy: Tensor
    clean: Tensor
    ce: Tensor
    kl: Tensor
    tv: Tensor


class CleanHalf:
    """Keys and values of x_0, kept for the MASK rows: the `Cache` of two forwards.

    Attributes:
        visible: what the MASK rows see. None in the first forward, which is causal and has no
            dense mask: padding is on the right, so no token sees it.
    """

    def __init__(self) -> None:
        self.visible: Visible | None = None
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
        mask = None if self.visible is None else self.visible.within(scores.window)
        return attend(query, key, value, mask, scores)


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


def depths(positions: Tensor, prompt: Tensor, phase: Tensor, block_size: int) -> Tensor:
    """The draft depth of the MASK rows at `positions` [B, R], counted from 0: [B, R].

    The k-th MASK row of a block has seen everything before the block, so it is a draft of depth k.
    """
    shift = phase[:, None] % block_size
    start = (positions + shift) // block_size * block_size - shift
    return positions - torch.maximum(start, prompt[:, None])


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
        noisy, clean = self.hidden(texts, wanted.block_size)
        zero = texts.tokens.new_zeros((), dtype=torch.float32)
        loss = ce_clean = ce = kl = tv = zero
        if wanted.block_size:
            teacher = clean[self.teachers(texts)] if wanted.soft else None
            loss, terms = self._noisy_loss(texts, noisy, teacher, wanted)
            ce, kl, tv = terms if wanted.soft else (*terms, zero, zero)
        if wanted.clean:
            ce_clean = self._clean_loss(texts, clean)
        return Terms(loss, ce_clean, ce, kl, tv)

    def hidden(self, texts: Texts, block_size: int) -> tuple[Tensor, Tensor]:
        """Hidden states of the supervised MASK rows [n, D] (none without a block size) and of the
        supervised clean rows [n', D]."""
        width = texts.tokens.shape[1]
        with torch.set_grad_enabled(self.trains_clean and torch.is_grad_enabled()):
            text_positions = torch.arange(width, device=texts.tokens.device).expand_as(texts.tokens)
            half = CleanHalf()
            hidden = self.idlm.hidden(texts.tokens, text_positions, None, cache=half)
            clean = hidden[clean_rows(texts.prompt, texts.length, width)]
        if not block_size:
            return clean[:0], clean
        positions, is_row = mask_rows(texts.prompt, texts.length)
        half.visible = visible(positions, texts.prompt, texts.phase % block_size, block_size, width)
        masks = torch.full_like(positions, self.idlm.mask_id)
        hidden = self.idlm.hidden(masks, positions, None, slice(0, masks.shape[1]), half)
        return hidden[is_row], clean

    def _noisy_loss(
        self, texts: Texts, hidden: Tensor, teacher: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss of the MASK rows, and the sums of its terms [1], or [3] with
        `teacher`."""
        positions, is_row = mask_rows(texts.prompt, texts.length)
        target = _next(texts.tokens, positions)[is_row]
        depth = depths(positions, texts.prompt, texts.phase, wanted.block_size)[is_row]
        weights = wanted.weights
        of_row = self._weights_of_rows(hidden, target, depth, wanted)

        def loss(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                log_p = None if teacher is None else self.log_law(teacher[part])
            terms = row_terms(self.log_law(rows), log_p, target[part])
            weighted = [
                weight * (of_row[part] * term).sum()
                for weight, term in zip((weights.ce, weights.kl, weights.tv), terms, strict=False)
                if weight
            ]
            sums = torch.stack([term.sum() for term in terms])
            return sum(weighted, 0 * rows.sum()), sums

        return self._summed(loss, hidden)

    def _weights_of_rows(
        self, hidden: Tensor, target: Tensor, depth: Tensor, wanted: Wanted
    ) -> Tensor:
        """The weights [n] of the MASK rows by their depth."""
        weights, dtype = wanted.weights, torch.promote_types(hidden.dtype, torch.float32)
        if weights.depth == "uniform":
            return torch.ones_like(depth, dtype=dtype)
        if weights.depth == "exponential":
            return (-depth.to(dtype) / weights.gamma).exp()
        with torch.no_grad():
            q = [
                (-row_terms(self.log_law(hidden[part]), None, target[part])[0]).exp()
                for part in self.parts(hidden)
            ]
        accepted = (1 - weights.alpha) * torch.cat(q) + weights.alpha
        return continuation(accepted, depth, wanted.block_size)

    def _clean_loss(self, texts: Texts, hidden: Tensor) -> Tensor:
        """CE_clean over the supervised clean rows [n', D]."""
        rows = clean_rows(texts.prompt, texts.length, texts.tokens.shape[1])
        target = texts.tokens[F.pad(rows, (1, 0))[:, :-1]]

        def loss(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            total = row_terms(self.log_law(rows), None, target[part])[0].sum()
            return total, total

        return self._summed(loss, hidden)[0]

    def _summed(self, loss: ChunkLoss, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return sum_in_chunks(loss, hidden, self.parts(hidden), self.idlm.head_parameters())

    def parts(self, hidden: Tensor) -> list[slice]:
        """The chunks of the rows `hidden` [n, D]."""
        return chunks(len(hidden), self.idlm.vocab_size, hidden.device)

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
        [3, b]."""
        noisy, clean = self.hidden(texts, block_size)
        teacher = clean[self.teachers(texts)]
        positions, is_row = mask_rows(texts.prompt, texts.length)
        depth = depths(positions, texts.prompt, texts.phase, block_size)[is_row]
        sums = torch.zeros(3, block_size, dtype=torch.float64, device=depth.device)
        for part in self.parts(noisy):
            p, q = self.log_law(teacher[part]).exp(), self.log_law(noisy[part]).exp()
            accepted, agree = torch.minimum(p, q).sum(-1), p.argmax(-1) == q.argmax(-1)
            rows = torch.stack([torch.ones_like(accepted), accepted, agree])
            sums.index_add_(1, depth[part], rows.double())
        return sums

    def log_law(self, hidden: Tensor) -> Tensor:
        """Log-probabilities [n, V] of hidden rows [n, D], in float32 or more; MASK has none."""
        logits = self.idlm.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.emits_mask and self.idlm.mask_id < logits.shape[-1]:
            mask = torch.tensor(self.idlm.mask_id, device=logits.device)
            logits = logits.index_fill(-1, mask, EXCLUDED)
        return logits.log_softmax(-1)


def _next(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens after `positions` [B, R]; padding rows have arbitrary ones."""
    return tokens.gather(1, (positions + 1).clamp(max=tokens.shape[1] - 1))
