"""The training objective: the loss of one batch.

Shapes: B rows of the batch, L padded columns, R padded number of MASK rows, D hidden size, V logit
columns, n supervised MASK rows, n' supervised clean rows, b the block size.

x_0 never sees x_t, so the two halves of `idlm.training.layout` run one after the other, the MASK
rows over the stored keys and values of x_0. With a frozen base the first half needs no gradient.
The tests compare the result with the papers' full layout in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from idlm.models.heads import RowsBefore, candidate_count, corrected
from idlm.models.idlm_model import Idlm
from idlm.models.weights import embedding_rows
from idlm.training.attention import CleanHalf, MaskHalf
from idlm.training.layout import MaskRows, Texts, mask_rows
from idlm.training.losses import (
    ChunkLoss,
    RowWeights,
    chunks,
    continuation,
    sum_in_chunks,
)
from idlm.training.path import draft_runs, walked
from idlm.training.terms import Laws, log_law, weighted_terms


@dataclass(frozen=True)
class Wanted:
    """The terms that a step needs: MASK rows in blocks of `block_size` (0: AR only) under
    `weights`, CE_clean, and KL and TV (`soft`), even where their weights are 0 at this step.

    MASK rows are computed in several `phases` for each clean half. Phases are modulo b, so there
    are at most b of them.
    """

    block_size: int
    clean: bool
    soft: bool = False
    weights: RowWeights = RowWeights()
    phases: int = 1

    @property
    def shifts(self) -> list[int]:
        """What is added to the texts' phases: as many numbers below b as there are phases, evenly
        spaced."""
        count = min(self.phases, self.block_size)
        return [number * self.block_size // count for number in range(count)]


class NoisyRows(NamedTuple):
    """Supervised MASK rows: hidden states [n, D], the token that each predicts, the one before
    that, its draft depth from 0, and which of the n' supervised clean rows predicts the same token:
    [n] each."""

    hidden: Tensor
    target: Tensor
    before: Tensor
    depth: Tensor
    teacher: Tensor


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


class Objective(nn.Module):
    """The model with its loss as one module, so that data parallelism wraps both forwards.

    Args:
        trains_clean: whether the clean half has gradients (not with a gated LoRA).
        emits_mask: whether softmaxes include the MASK column, as in the plain AR loss.
    """

    def __init__(self, idlm: Idlm, trains_clean: bool, emits_mask: bool = False) -> None:
        super().__init__()
        self.model = idlm.model
        self.draft_head = idlm.draft_heads.get(0)
        self.idlm = idlm
        self.trains_clean = trains_clean
        self.emits_mask = emits_mask

    def forward(self, texts: Texts, wanted: Wanted) -> Terms:
        """The sums of the wanted terms over the batch."""
        half, clean = self.clean_half(texts)
        loss = ce_clean = ce = kl = tv = texts.tokens.new_zeros((), dtype=torch.float32)
        if wanted.shifts:
            rows = self.noisy_rows(half, wanted)
            loss, terms = self._noisy_loss(rows, clean if wanted.soft else None, wanted)
            ce, kl, tv = terms if wanted.soft else (*terms, kl, tv)
        if wanted.clean:
            ce_clean = self._clean_loss(texts, clean)
        return Terms(loss, ce_clean, ce, kl, tv)

    def count(self, texts: Texts, wanted: Wanted) -> Tensor:
        """The supervised rows of a batch, int64 [2]: for an answer of n tokens n - 1 MASK rows in
        each phase, and n clean rows."""
        noisy = len(wanted.shifts) * texts.masked.sum()
        return torch.stack([noisy, texts.supervised.sum()])

    def noisy_rows(self, half: CleanHalf, wanted: Wanted) -> NoisyRows:
        """The MASK rows of all phases, those of a phase side by side."""
        found = []
        for shift in wanted.shifts:
            texts = half.texts._replace(phase=half.texts.phase + shift)
            rows = mask_rows(texts, wanted.block_size)
            target = texts.tokens.gather(1, (rows.column + 1) * rows.real)[rows.real]
            before = texts.tokens.gather(1, rows.column)[rows.real]
            hidden, depth = self.mask_half(half, rows), rows.depth[rows.real]
            found.append(NoisyRows(hidden, target, before, depth, teachers(texts, rows)))
        return NoisyRows(*(torch.cat(each) for each in zip(*found, strict=True)))

    def clean_half(self, texts: Texts) -> tuple[CleanHalf, Tensor]:
        """The forward of x_0, and the hidden states of its supervised rows [n', D]."""
        half = CleanHalf(texts)
        with torch.set_grad_enabled(self.trains_clean and torch.is_grad_enabled()):
            hidden = self.idlm.hidden(texts.tokens, texts.position, None, cache=half)
            return half, hidden[texts.supervised]

    def mask_half(self, half: CleanHalf, rows: MaskRows) -> Tensor:
        """The hidden states of the MASK rows, [n, D]."""
        masks = torch.full_like(rows.position, self.idlm.mask_id)
        gate, cache = slice(0, masks.shape[1]), MaskHalf(half, rows)
        hidden = self.idlm.hidden(masks, rows.position, None, gate, cache)
        return hidden[rows.real]

    def _noisy_loss(
        self, noisy: NoisyRows, clean: Tensor | None, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss of the MASK rows, and the sums of its terms: [1], or [3] with the
        hidden states `clean` [n', D] of their teachers."""
        terms = [wanted.weights.ce, wanted.weights.kl, wanted.weights.tv]
        by_depth = self._weights_of_rows(noisy, wanted)
        weights = by_depth[:, None] * by_depth.new_tensor(terms[: 1 if clean is None else 3])

        def loss(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher = None if clean is None else self.idlm.head(clean[noisy.teacher[part]])
            laws = Laws(noisy.target[part], teacher, self.excluded)
            return weighted_terms(self.logits(rows, noisy.before[part]), laws, weights[part])

        return self._summed(loss, noisy.hidden)

    def _weights_of_rows(self, noisy: NoisyRows, wanted: Wanted) -> Tensor:
        """The weights [n] of the MASK rows by their depth."""
        weights, depth = wanted.weights, noisy.depth
        dtype = torch.promote_types(noisy.hidden.dtype, torch.float32)
        if weights.depth == "uniform":
            return torch.ones_like(depth, dtype=dtype)
        if weights.depth == "exponential":
            return (-depth.to(dtype) / weights.gamma).exp()
        with torch.no_grad():
            q = [
                self._drafted(noisy, part).gather(1, noisy.target[part, None])[:, 0].exp()
                for part in self.parts(noisy.hidden)
            ]
        accepted = (1 - weights.alpha) * torch.cat(q) + weights.alpha
        return continuation(accepted, depth, wanted.block_size)

    def _clean_loss(self, texts: Texts, hidden: Tensor) -> Tensor:
        """CE_clean over the supervised clean rows [n', D]."""
        target = texts.tokens[texts.answer >= 0]

        def loss(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            logits = self.logits(rows)
            laws = Laws(target[part], None, self.excluded)
            return weighted_terms(logits, laws, torch.ones_like(logits[:, :1]))

        return self._summed(loss, hidden)[0]

    def _summed(self, loss: ChunkLoss, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return sum_in_chunks(loss, hidden, self.parts(hidden), self._head_parameters())

    def _head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the LM head, and of the draft head with the embedding that it
        reads; each once."""
        found = {id(weight): weight for weight in self.idlm.head_parameters()}
        if self.draft_head is not None:
            read = [*self.draft_head.parameters(), embedding_rows(self.model)]
            trained = (w for w in read if isinstance(w, nn.Parameter) and w.requires_grad)
            found |= {id(weight): weight for weight in trained}
        return list(found.values())

    def parts(self, hidden: Tensor) -> list[slice]:
        """The chunks of the rows `hidden` [n, D]. A row has its logits, and with a draft head the
        rows of its candidates in the LM head."""
        numbers = self.idlm.vocab_size
        if self.draft_head is not None:
            numbers += candidate_count(self.model, self.draft_head) * hidden.shape[1]
        return chunks(len(hidden), numbers, hidden.device)

    def _drafted(self, noisy: NoisyRows, part: slice) -> Tensor:
        """`log_law` of some MASK rows."""
        return self.log_law(noisy.hidden[part], noisy.before[part])

    @torch.no_grad()
    def measure(self, texts: Texts, block_size: int) -> Tensor:
        """Sums by draft depth 1..b: rows, sum_v min(p, q), and rows whose argmax agrees; float64
        [3, b]."""
        half, clean = self.clean_half(texts)
        noisy = self.noisy_rows(half, Wanted(block_size, clean=False))
        sums = torch.zeros(3, block_size, dtype=torch.float64, device=clean.device)
        for part in self.parts(noisy.hidden):
            p = self.log_law(clean[noisy.teacher[part]]).exp()
            q = self._drafted(noisy, part).exp()
            accepted, agree = torch.minimum(p, q).sum(-1), p.argmax(-1) == q.argmax(-1)
            found = torch.stack([torch.ones_like(accepted), accepted, agree])
            sums.index_add_(1, noisy.depth[part], found.double())
        return sums

    @torch.no_grad()
    def walk(self, texts: Texts, block_size: int) -> Tensor:
        """`training.path.walked` of the texts, which takes the MASK rows of all b phases."""
        half, clean = self.clean_half(texts)
        noisy = self.noisy_rows(half, Wanted(block_size, clean=False, phases=block_size))
        agree = [
            self.log_law(clean[noisy.teacher[part]]).argmax(-1)
            == self._drafted(noisy, part).argmax(-1)
            for part in self.parts(noisy.hidden)
        ]
        of_phases = (block_size, len(noisy.depth) // block_size)
        rows = (each.view(of_phases) for each in (torch.cat(agree), noisy.depth))
        return walked(texts, *draft_runs(texts, *rows), block_size)

    @property
    def excluded(self) -> int | None:
        """The column of MASK, if the model has one and never emits it."""
        has = self.idlm.mask_id < self.idlm.vocab_size
        return self.idlm.mask_id if has and not self.emits_mask else None

    def logits(self, hidden: Tensor, before: Tensor | None = None) -> Tensor:
        """Logits [n, V] of hidden rows [n, D], in float32 or more.

        The draft head corrects MASK rows by the text's tokens `before` [n].
        """
        logits = self.idlm.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.draft_head is None or before is None:
            return logits
        return corrected(self.model, self.draft_head, RowsBefore(logits, hidden, before))

    def log_law(self, hidden: Tensor, before: Tensor | None = None) -> Tensor:
        """Log-probabilities [n, V] of hidden rows [n, D]; MASK has none."""
        return log_law(self.logits(hidden, before), self.excluded)


def teachers(texts: Texts, rows: MaskRows) -> Tensor:
    """Which of the n' supervised clean rows predict the tokens of the n MASK rows: their own
    columns', [n]."""
    supervised = texts.supervised
    number = supervised.flatten().cumsum(0).view_as(supervised) - 1
    return number.gather(1, rows.column)[rows.real]
