"""What a model without causal rows says of its own clean text: two laws p of each token.

    left to right     row k of the clean text before k, MASK at k and after it to the end of its
                      block (SDAR), or of the answer (LLaDA): what the model would write next
    reference tokens  row k is MASK, and sees the clean tokens before k of its block, each of which
                      saw only those before it; the text before the block as decoding left it. One
                      forward. After SimSD (arXiv 2606.02544).

They differ by the MASKs after k alone. docs/methods.md says what they are for.

Shapes: L tokens of a text, n of its answer, b tokens of a block, V logit columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from idlm.models.idlm_model import Idlm


@torch.inference_mode()
def left_to_right(
    idlm: Idlm, tokens: Sequence[int], first: int, block: int | None, end: int | None = None
) -> Tensor:
    """Logits [n, V] of the tokens from index `first` on, as a model in blocks of `block` says them;
    None: as LLaDA, whose answer has MASKs up to the index `end`."""
    mask = idlm.mask_id
    if block is None:
        size = max(len(tokens), end or 0)
        steps: Iterator[list[int]] = ([at] for at in range(first, len(tokens)))
        visible = torch.ones(size, size, dtype=torch.bool)
    else:
        size = -(-len(tokens) // block) * block
        steps = (list(range(offset, len(tokens), block)) for offset in range(block))
        visible = noisy_and_clean(torch.arange(size) // block)
    clean = torch.tensor([*tokens, *[mask] * (size - len(tokens))])
    position, column = torch.arange(size), torch.arange(size)
    found: dict[int, Tensor] = {}
    for places in steps:
        if block is None:
            noisy = torch.where(column < places[0], clean, mask)
            hidden = idlm.hidden(noisy[None], position[None], visible[None, None])[0]
        else:  # the same offset of every block at once
            noisy = torch.where(column % block < places[0], clean, mask)
            rows, both = torch.cat([noisy, clean]), torch.cat([position, position])
            hidden = idlm.hidden(rows[None], both[None], visible[None, None])[0]
        wanted = [at for at in places if at >= first]
        found |= zip(wanted, hidden[torch.tensor(wanted, dtype=torch.int64)], strict=True)
    return idlm.head(torch.stack([found[at] for at in range(first, len(tokens))]))


@torch.inference_mode()
def reference_tokens(idlm: Idlm, tokens: Sequence[int], first: int, block: int | None) -> Tensor:
    """Logits [n, V] of the tokens from index `first` on; with `block` None (LLaDA) prompt and
    answer are a block each."""
    size = len(tokens)
    column = torch.arange(size)
    number = (column >= first).long() if block is None else column // block
    clean, masks = torch.tensor(tokens), torch.full((size,), idlm.mask_id)
    rows, position = torch.cat([clean, clean, masks]), column.repeat(3)
    visible = reference_mask(number)
    hidden = idlm.hidden(rows[None], position[None], visible[None, None])[0]
    return idlm.head(hidden[2 * size + first :])


def noisy_and_clean(number: Tensor) -> Tensor:
    """What rows of [x_t | x_0] see, where `number` [L] are those of the blocks: bool [2 L, 2 L]."""
    same, before = number[:, None] == number, number[:, None] > number
    noisy, clean = (
        torch.cat([same, before], 1),
        torch.cat([torch.zeros_like(same), same | before], 1),
    )
    return torch.cat([noisy, clean])


def reference_mask(number: Tensor) -> Tensor:
    """What the rows of [clean | reference | MASK] see: bool [3 L, 3 L].

    A clean row sees its block and those before. A reference row sees clean rows of the blocks
    before, and reference rows of its block up to itself; a MASK row those before itself, and
    itself.
    """
    index = torch.arange(len(number))
    same, before = number[:, None] == number, number[:, None] > number
    none, own = torch.zeros_like(same), index[:, None] == index
    up_to, earlier = same & (index <= index[:, None]), same & (index < index[:, None])
    return torch.cat(
        [
            torch.cat([same | before, none, none], 1),
            torch.cat([before, up_to, none], 1),
            torch.cat([before, earlier, own], 1),
        ]
    )
