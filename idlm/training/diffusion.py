"""The training objectives of the baselines SDAR and LLaDA, on the whole rows of the papers.

    sdar    [x_t | x_0]: a row of x_t sees its own block of x_t, and earlier blocks of x_0; x_0 is
            block-causal. Blocks count from the beginning of the text (arXiv 2510.06303).
    llada   x_t alone, which sees itself whole (arXiv 2502.09992).

A row predicts its own token, without a shift. In x_t each token of the answers is noise with the
chance p, which is drawn for each text. The loss is the sum of CE / p over the noise, divided by the
answers' tokens of the batch (sdar), or for each text by its own, and by the texts (llada).

What follows the answer is filled with the end token: to the end of its block (sdar), or to the
longest text of the batch, and at least `diffusion.fill` (llada). The fill is answer too, since
decoding has to write it.

Shapes: B texts, L padded columns, D hidden size, V logit columns, n noise tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.config import DiffusionConfig
from idlm.training.layout import Texts
from idlm.training.losses import chunks, sum_in_chunks
from idlm.training.objective import Terms, Wanted
from idlm.training.terms import Laws, weighted_terms

Kind = Literal["sdar", "llada"]


class Filled(NamedTuple):
    """Texts with their fill, [B, L] each: the ids, whether a token is real, and is answer."""

    tokens: Tensor
    real: Tensor
    answer: Tensor


class Noise(NamedTuple):
    """What noise made of the texts: x_t [B, L], where it is noise, and the weight of each token."""

    tokens: Tensor
    where: Tensor
    weight: Tensor


class DiffusionObjective(nn.Module):
    """A model with the loss of a baseline; the counterpart of `objective.Objective`.

    Raises:
        InputError: the model has no token that ends a text, which fills blocks.
    """

    def __init__(self, idlm: Idlm, kind: Kind, config: DiffusionConfig) -> None:
        super().__init__()
        end = idlm.end_of(chat=True)
        if end is None:
            raise InputError(f"objective: {kind} fills texts with an end token; the model has none")
        self.model, self.idlm = idlm.model, idlm
        self.kind, self.config, self.end = kind, config, end

    def forward(self, texts: Texts, wanted: Wanted) -> Terms:
        """The weighted loss, as `clean`: `loop.Trainer.loss` divides it by the second count."""
        filled = self.filled(texts, wanted.block_size)
        noise = noised(filled, self.config, self.idlm.mask_id, self.idlm.vocab_size)
        hidden = self.hidden(filled, noise, wanted.block_size)[noise.where]
        weight, target = noise.weight, filled.tokens[noise.where]
        if self.kind == "llada":
            weight = weight / filled.answer.sum(1, keepdim=True)
        weight = weight[noise.where]

        def loss(rows: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            laws = Laws(target[part], None, self.idlm.mask_id)  # MASK has no probability
            return weighted_terms(self.logits(rows), laws, weight[part, None])

        parts = chunks(len(hidden), self.idlm.vocab_size, hidden.device)
        total, _ = sum_in_chunks(loss, hidden, parts, self.idlm.head_parameters())
        zero = total.detach().new_zeros(())
        return Terms(zero, total, zero, zero, zero)

    def count(self, texts: Texts, wanted: Wanted) -> Tensor:
        """What the sums are divided by: 0, and the answers' tokens (sdar) or the texts (llada)."""
        answer = self.filled(texts, wanted.block_size).answer
        total = answer.sum() if self.kind == "sdar" else answer.any(1).sum()
        return torch.stack([torch.zeros_like(total), total])

    def filled(self, texts: Texts, block_size: int) -> Filled:
        """The texts and their fill. `_check` of the config leaves one text in a row."""
        length = (texts.document >= 0).sum(1, keepdim=True)
        if self.kind == "sdar":
            whole = (length + block_size - 1) // block_size * block_size
        else:
            whole = length.max().clamp(min=self.config.fill).expand_as(length)
        column = torch.arange(int(whole.max()), device=length.device)
        added = max(len(column) - texts.tokens.shape[1], 0)
        tokens, answer = (
            nn.functional.pad(each, (0, added), value=-1)[:, : len(column)]
            for each in (texts.tokens, texts.answer)
        )
        beyond = column >= length
        tokens = tokens.masked_fill(beyond, self.end)
        real = column < whole
        return Filled(tokens, real, ((answer >= 0) | beyond) & real)

    def hidden(self, filled: Filled, noise: Noise, block_size: int) -> Tensor:
        """Hidden states [B, L, D] of x_t."""
        columns = noise.tokens.shape[1]
        tokens, visible = noise.tokens, whole_visible(filled.real)
        position = torch.arange(columns, device=tokens.device).expand_as(tokens)
        if self.kind == "sdar":
            tokens, visible = (
                torch.cat([tokens, filled.tokens], 1),
                block_visible(filled, block_size),
            )
            position = torch.cat([position, position], 1)
        return self.idlm.hidden(tokens, position, visible[:, None])[:, :columns]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden rows [n, D], in float32 or more."""
        logits = self.idlm.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def block_visible(filled: Filled, block_size: int) -> Tensor:
    """What the rows of [x_t | x_0] see: bool [B, 2 L, 2 L]."""
    columns = filled.tokens.shape[1]
    block = torch.arange(columns, device=filled.tokens.device) // block_size
    same, before = block[:, None] == block, block[:, None] > block
    noisy = torch.cat([same, before], 1)
    clean = torch.cat([torch.zeros_like(same), same | before], 1)
    real = torch.cat([filled.real, filled.real], 1)
    return _seen(torch.cat([noisy, clean], 0), real)


def whole_visible(real: Tensor) -> Tensor:
    """What the rows of x_t see without blocks: all that is real, bool [B, L, L]."""
    columns = real.shape[1]
    return _seen(real.new_ones(columns, columns), real)


def _seen(rows: Tensor, real: Tensor) -> Tensor:
    """`rows` [Q, Q] without padding [B, Q]; padding sees itself, since no row may see nothing."""
    own = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    return (rows & real[:, None]) | own


def noised(filled: Filled, config: DiffusionConfig, mask_id: int, vocab_size: int) -> Noise:
    """Noise the answers, with PyTorch's random numbers. Each text has at least one noise token.

    Its level p is uniform in `config.noise`. A share `config.random` of the noise are tokens of
    the vocabulary, the rest is MASK.
    """
    tokens, answer = filled.tokens, filled.answer
    low, high = config.noise
    share = torch.rand(len(tokens), 1, dtype=torch.float64, device=tokens.device)
    level = low + (high - low) * share
    draw = torch.rand(tokens.shape, device=tokens.device).masked_fill(~answer, torch.inf)
    least = draw == draw.amin(1, keepdim=True)
    where = answer & ((draw < level) | least)
    other = torch.randint(vocab_size - 1, tokens.shape, device=tokens.device)
    other += other >= mask_id  # any token but MASK
    random = torch.rand(tokens.shape, device=tokens.device) < config.random
    noise = torch.where(random, other, mask_id)
    weight = 1 / level if config.weight == "inverse" else torch.full_like(level, 2 / (low + high))
    return Noise(torch.where(where, noise, tokens), where, weight.expand_as(draw))
