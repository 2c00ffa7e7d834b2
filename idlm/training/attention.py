"""The two forwards of the objective as caches: what their rows see, and how it is computed.

A mask of more than `DENSE` columns is never made. On a GPU FlexAttention computes ranges of keys by
blocks. On a CPU short texts have one mask for the whole batch, others one for each document, and
long documents are computed in tiles. So documents in one row cost what they cost alone.

Shapes: B rows of the batch, L padded columns of the texts, R padded number of MASK rows, Q query
rows, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from idlm.decoding.scores import Scores
from idlm.models.attention import attend
from idlm.training.blocks import SMALLEST, attend_in_blocks, block_mask
from idlm.training.layout import MaskRows, Seen, Texts, dense, seen_by_masks, seen_by_text
from idlm.training.tiles import Part, attend_in_tiles

DENSE = 1024
"""The most columns of a mask."""


class Keys(NamedTuple):
    """A layer's keys and values [B, G, S, E]."""

    key: Tensor
    value: Tensor


class Half:
    """Attention of one forward, whose rows see ranges of one or two parts of keys.

    Args:
        texts: the texts of the batch.
        seen: what the rows see of each part. The first part is that of the rows themselves.
        documents: the document of each key of each part, [B, S]; -1 is padding, which is last.
    """

    def __init__(self, texts: Texts, seen: tuple[Seen, ...], documents: tuple[Tensor, ...]) -> None:
        self.seen = seen
        self.columns = [each.shape[1] for each in documents]
        self.alone = texts.alone
        self._documents = documents
        self._cuts: list[list[list[int]]] = []
        self._masks: dict[object, Tensor] = {}
        self._of_blocks: dict[int | None, BlockMask] = {}

    @property
    def causal(self) -> bool:
        """Whether a document's rows just see those before them."""
        return len(self.seen) == 1

    def mix(self, query: Tensor, parts: list[Keys], scores: Scores) -> Tensor:
        """Attention of the rows query [B, H, Q, E] to the keys of all parts: [B, Q, H, E]."""
        if self.alone and (self._plain(scores) or sum(self.columns) <= DENSE):
            # padding is on the right, so a causal row sees none of it
            mask = None if self._plain(scores) else self._mask(None, self.seen, parts, scores)
            return attend(query, *_joined(parts), mask, scores)
        if query.is_cuda and query.dtype != torch.float64 and query.shape[-1] >= SMALLEST:
            return attend_in_blocks(query, *_joined(parts), self._blocks(scores.window), scores)
        return torch.cat(
            [self._row(b, *each, scores) for b, each in enumerate(_by_row(query, parts))]
        )

    def _plain(self, scores: Scores) -> bool:
        """Whether attention needs no mask but that of a causal text."""
        return self.causal and scores.plain and scores.window is None

    def _row(self, b: int, query: Tensor, parts: list[Keys], scores: Scores) -> Tensor:
        """Attention of a row of documents, one after the other: [1, Q, H, E]."""
        cuts = [each[b] for each in self.cuts]
        queries = query.split(cuts[0], 2)
        keys = [
            [Keys(*kv) for kv in zip(*(each.split(cut, 2) for each in part), strict=True)]
            for part, cut in zip(parts, cuts, strict=True)
        ]
        starts = [0] * len(parts)
        mixed = []
        for document, rows in enumerate(queries[:-1]):
            mine = [part[document] for part in keys]
            if rows.shape[2]:
                at = slice(starts[0], starts[0] + rows.shape[2])
                seen = tuple(
                    each.part(b, at, start) for each, start in zip(self.seen, starts, strict=True)
                )
                mixed.append(self._document((b, document), rows, mine, seen, scores))
            starts = [start + one.key.shape[2] for start, one in zip(starts, mine, strict=True)]
        return torch.cat([*mixed, torch.zeros_like(queries[-1]).transpose(1, 2)], dim=1)

    def _document(
        self,
        name: object,
        query: Tensor,
        parts: list[Keys],
        seen: tuple[Seen, ...],
        scores: Scores,
    ) -> Tensor:
        if self._plain(scores):
            return attend(query, *parts[0], None, scores)
        if sum(part.key.shape[2] for part in parts) <= DENSE:
            return attend(query, *_joined(parts), self._mask(name, seen, parts, scores), scores)
        tiled = [Part(*part, each) for part, each in zip(parts, seen, strict=True)]
        return attend_in_tiles(query, tiled, scores)

    def _mask(
        self, name: object, seen: tuple[Seen, ...], parts: list[Keys], scores: Scores
    ) -> Tensor:
        """The mask [B, 1, Q, S] of a document or of all, which the layers share."""
        at = (name, scores.window)
        if at not in self._masks:
            masks = [
                dense(each.within(scores.window), part.key.shape[2])
                for each, part in zip(seen, parts, strict=True)
            ]
            self._masks[at] = torch.cat(masks, dim=2)[:, None]
        return self._masks[at]

    def _blocks(self, window: int | None) -> BlockMask:
        """The mask of blocks for layers with this window."""
        if window not in self._of_blocks:
            seen = [each.within(window) for each in self.seen]
            self._of_blocks[window] = block_mask(seen, self.columns)
        return self._of_blocks[window]

    @property
    def cuts(self) -> list[list[list[int]]]:
        """The numbers of keys of each document and of the padding, by part and row."""
        if not self._cuts:
            self._cuts = [_cuts(documents) for documents in self._documents]
        return self._cuts


class CleanHalf(Half):
    """The forward of x_0, which keeps its keys and values for the MASK rows."""

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts, (seen_by_text(texts),), (texts.document,))
        self.texts = texts
        self.layers: dict[int, Keys] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """As `Cache.attend`."""
        # a layer that is computed again for its gradient comes here again
        self.layers.setdefault(layer, Keys(key, value))
        return self.mix(query, [Keys(key, value)], scores)


class MaskHalf(Half):
    """The forward of MASK rows over the keys and values of x_0."""

    def __init__(self, clean: CleanHalf, rows: MaskRows) -> None:
        document = clean.texts.document.gather(1, rows.column)
        document = document.masked_fill(~rows.real, -1)
        super().__init__(clean.texts, seen_by_masks(rows), (document, clean.texts.document))
        self.clean = clean

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        """As `Cache.attend`."""
        return self.mix(query, [Keys(key, value), self.clean.layers[layer]], scores)


def _joined(parts: list[Keys]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    key, value = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return key, value


def _by_row(query: Tensor, parts: list[Keys]) -> list[tuple[Tensor, list[Keys]]]:
    """The query and the keys of each row of the batch."""
    keys = [zip(*(each.split(1) for each in part), strict=True) for part in parts]
    rows = zip(query.split(1), *keys, strict=True)
    return [(rows[0], [Keys(*part) for part in rows[1:]]) for rows in rows]


def _cuts(documents: Tensor) -> list[list[int]]:
    """How many keys of each row [B, S] each document has, and last how many are padding."""
    count = int(documents.max()) + 1
    return [torch.bincount(row + 1, minlength=count + 1).roll(-1).tolist() for row in documents]
