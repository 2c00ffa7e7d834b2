"""The rows of the two halves of a batch of packed texts, and what each row sees.

The papers' layout is `[x_t | x_0]`, with x_t as long as x_0. Here x_t holds only its MASK rows,
those of the tokens of an answer but its last:

* the clean rows of x_t compute the same as those rows of x_0, so a MASK row whose block begins
  before its answer sees what is before the answer in x_0 instead;
* the MASK row of an answer's last token predicts nothing and no other row sees it, so it is left
  out.

Documents and answers are contiguous. So the keys that a row sees in a half are side by side too: a
range of columns, which never leaves the row's document.

Shapes: B rows of the batch, L padded columns, R padded number of MASK rows, b the block size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Texts(NamedTuple):
    """Rows of packed documents, padded on the right; [B, L] each.

    The first token of a document is in no answer.

    Attributes:
        tokens: their ids; padding has any.
        document: the index of a token's document within its row, from 0; -1 on padding.
        position: the position within the document; 0 on padding.
        answer: the index within the row, from 0, of the answer that a token belongs to; -1: none.
        phase: of the document's blocks, >= 0, taken modulo b.
    """

    tokens: Tensor
    document: Tensor
    position: Tensor
    answer: Tensor
    phase: Tensor

    @property
    def supervised(self) -> Tensor:
        """The clean rows whose next token is of an answer: bool [B, L]."""
        return self._next_answer >= 0

    @property
    def masked(self) -> Tensor:
        """The tokens of an answer but its last, which have MASK rows: bool [B, L]."""
        return (self.answer >= 0) & (self.answer == self._next_answer)

    @property
    def _next_answer(self) -> Tensor:
        return F.pad(self.answer[:, 1:], (0, 1), value=-1)

    @property
    def alone(self) -> bool:
        """Whether no row has more than one document."""
        return not bool((self.document > 0).any())

    def depths(self, block_size: int) -> Tensor:
        """The draft depth of each answer token's MASK row, counted from 0: [B, L].

        The k-th MASK row of a block, or of the block's part in the answer, has seen everything
        before that, so it is a draft of depth k.
        """
        column = columns(self.tokens)
        begins = self.answer != F.pad(self.answer[:, :-1], (1, 0), value=-1)
        start = torch.where(begins, column, 0).cummax(1).values
        return torch.minimum((self.position + self.phase) % block_size, column - start)


class MaskRows(NamedTuple):
    """The MASK rows of a batch in the order of their tokens, padded on the right; [B, R] each.

    Attributes:
        real: bool, whether a row is no padding.
        column: of the row's token in the texts.
        position: within the document.
        depth: counted from 0.
    """

    real: Tensor
    column: Tensor
    position: Tensor
    depth: Tensor


class Seen(NamedTuple):
    """The keys that each query row sees: those of the columns first .. stop - 1.

    first and stop are [B, Q]. A query's own position is that of column `at` [B, Q], and positions
    count columns, so a sliding window w hides the columns up to at - w.
    """

    first: Tensor
    stop: Tensor
    at: Tensor

    def within(self, window: int | None) -> Seen:
        """What a layer with this sliding window sees."""
        if window is None:
            return self
        return self._replace(first=torch.maximum(self.first, self.at - window + 1))

    def part(self, b: int, rows: slice, start: int) -> Seen:
        """What some rows of row b of the batch see, by columns counted from `start`: [1, rows]."""
        return Seen(*(each[b : b + 1, rows] - start for each in self))


def columns(tokens: Tensor) -> Tensor:
    """The column of each of `tokens` [B, L]: [B, L]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def mask_rows(texts: Texts, block_size: int) -> MaskRows:
    """The MASK rows in blocks of `block_size`; at least one column, so that no tensor is empty."""
    masked = texts.masked
    count = masked.sum(1, keepdim=True)
    order = masked.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    column = order[:, : max(int(count.max()), 1)]
    real = columns(column) < count
    position, depth = (
        each.gather(1, column) for each in (texts.position, texts.depths(block_size))
    )
    return MaskRows(real, column, position, depth * real)


def seen_by_text(texts: Texts) -> Seen:
    """What the rows of x_0 see of x_0: their documents up to themselves."""
    column = columns(texts.tokens)
    return Seen(column - texts.position, column + 1, column)


def seen_by_masks(rows: MaskRows) -> tuple[Seen, Seen]:
    """What MASK rows see of the MASK rows, and of x_0.

    A row of depth k sees the k before it and itself; and its document up to the token of the
    first of these.
    """
    row = columns(rows.column)
    own = Seen(row - rows.depth, row + 1, row)
    text = Seen(rows.column - rows.position, rows.column - rows.depth, rows.column)
    return own, text


def dense(seen: Seen, keys: int) -> Tensor:
    """`seen` as a mask, bool [B, Q, keys]."""
    column = torch.arange(keys, device=seen.first.device)
    return (column >= seen.first[..., None]) & (column < seen.stop[..., None])
