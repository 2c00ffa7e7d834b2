"""LLaDA (arXiv 2502.09992): masked diffusion of the whole sequence, without a KV cache.

The answer begins as `max_tokens` MASKs, in whole blocks, and is written block by block. Each step
runs the whole sequence, which sees all of itself, and commits a fixed number of tokens of the
present block, the most probable ones. Tokens after the end token are work too.

Shapes: B sequences, S columns, b tokens of a block, V logit columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from idlm.baselines.remasking import most, transfer_counts
from idlm.baselines.written import Written, check, cut, drawer
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams


@dataclass(frozen=True)
class Llada:
    """LLaDA's decoding: `steps` for each block; TPF is b / steps by choice.

    Raises:
        InputError: a number is out of range.
    """

    block: int = 32
    steps: int = 32
    remasking: Literal["low_confidence", "random"] = "low_confidence"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.block:
            raise InputError(f"{self.steps} steps for a block of {self.block}; give 1 to the block")


@torch.inference_mode()
def decode(
    idlm: Idlm,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rule: Llada | None = None,
    keep_laws: bool = False,
) -> list[Written]:
    """Decode a batch of prompts; `keep_laws` as in `sdar.decode`.

    Raises:
        InputError: a prompt or the params cannot be used.
    """
    rule, draw, given = rule or Llada(), drawer(idlm, params), [list(one) for one in prompts]
    blocks = -(-params.max_tokens // rule.block)
    length = torch.tensor([len(prompt) for prompt in given])
    real = length[:, None] + blocks * rule.block
    columns = int(real.max()) if given else 0
    check(idlm, given, columns)
    position = torch.arange(columns).expand(len(given), -1)
    tokens = torch.full_like(position, idlm.mask_id, memory_format=torch.contiguous_format)
    for row, prompt in enumerate(given):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    visible = visible_rows(position < real)
    laws = torch.zeros(*tokens.shape, idlm.vocab_size) if keep_laws else None
    random = torch.Generator().manual_seed(params.seed or 0)
    for number in range(blocks):
        at = length[:, None] + number * rule.block + torch.arange(rule.block)
        for count in transfer_counts(rule.block, rule.steps):
            hidden = idlm.hidden(tokens, position, visible)
            rows = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
            drawn = draw(idlm.head(rows).flatten(0, 1))
            sure = drawn.probability.view_as(at)
            if rule.remasking == "random":
                sure = torch.rand(at.shape, generator=random)
            old = tokens.gather(1, at)
            take = most(sure, old == idlm.mask_id, torch.full_like(length, count))
            tokens.scatter_(1, at, torch.where(take, drawn.tokens.view_as(at), old))
            if laws is not None:
                which, offset = take.nonzero(as_tuple=True)
                new = drawn.log_q.view(*at.shape, -1)[which, offset]
                laws[which, at[which, offset]] = new.to(laws)
    return [
        Written(
            prompt,
            answer := cut(tokens[row, len(prompt) :].tolist(), idlm.eos_ids, params.max_tokens),
            blocks * rule.steps,
            blocks * rule.steps * int(real[row]),
            None if laws is None else laws[row, len(prompt) : len(prompt) + len(answer)].clone(),
        )
        for row, prompt in enumerate(given)
    ]


def visible_rows(real: Tensor) -> Tensor:
    """What the rows [B, S] see: all that is real, bool [B, 1, S, S]; padding sees itself."""
    own = torch.eye(real.shape[1], dtype=torch.bool)
    return (real[:, None] | own)[:, None]
