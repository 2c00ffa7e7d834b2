"""SDAR (arXiv 2510.06303) and LLaDA-2.1: block diffusion with a KV cache.

Blocks count from the beginning of the text, so the rest of a prompt shares a block with the first
MASKs. A row sees its own block whole and all blocks before it; a MASK row predicts its own token.
For each block there are forwards that denoise it, and one over the clean block that writes its keys
and values. Sequences of a batch are each at a block of their own: in one forward some denoise while
others commit.

Shapes: B sequences, S columns, b tokens of a block, V logit columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from idlm.baselines.block_cache import BlockCache
from idlm.baselines.remasking import Step, Strategy, committed, edited, transfer_counts
from idlm.baselines.written import Drawn, Written, check, cut, drawer
from idlm.errors import InputError
from idlm.models.gate import NO_ROWS
from idlm.models.idlm_model import Idlm
from idlm.params import SamplingParams


@dataclass(frozen=True)
class Sdar:
    """SDAR's decoding: a step commits tokens of the block by a strategy of `remasking.committed`,
    and at least its share of b / `steps`.

    Raises:
        InputError: a number is out of range.
    """

    block: int = 4
    steps: int = 4
    strategy: Strategy = "dynamic"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.block:
            raise InputError(f"{self.steps} steps for a block of {self.block}; give 1 to the block")

    def apply(self, state: State, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The places that get their drawn token, bool [B', b], and whether a block is finished."""
        counts = torch.tensor(transfer_counts(self.block, self.steps))
        take = committed(step, counts[state.taken[rows]], self.strategy, self.threshold)
        return take, ~(step.masked & ~take).any(1)


@dataclass(frozen=True)
class TwoThresholds:
    """LLaDA-2.1's decoding: MASK to token above `unmask`, token to token above `edit`.

    A finished block is edited until nothing changes, at most `post_steps` times. `edit` = 1 never
    replaces a token, which is LLaDA-2.0.
    """

    block: int = 32
    unmask: float = 0.7
    edit: float = 0.5
    post_steps: int = 16

    def apply(self, state: State, step: Step, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Sdar.apply`."""
        tokens, fixed = state.block(state.tokens)[rows], state.block(state.fixed)[rows]
        unmasked, replaced = edited(step, tokens, ~fixed, self.unmask, self.edit)
        take = unmasked | replaced
        full = ~(step.masked & ~unmasked).any(1)
        state.after[rows] += ~step.masked.any(1)
        over = ~take.any(1) | (state.after[rows] >= self.post_steps)
        return take, full & (over if self.edit < 1 else full)


Rule = Sdar | TwoThresholds


@dataclass
class State:
    """Sequences in the midst of decoding.

    Attributes:
        tokens: int64 [B, S]; what is not known is MASK.
        fixed: bool [B, S], the prompts.
        start: int64 [B], where the block of a sequence begins.
        end: int64 [B], where its last block ends.
        taken, after: int64 [B], steps of this block, and those since it had no MASK.
        clean, done: bool [B], whether the block is finished, and the sequence.
        forwards: int64 [B].
    """

    size: int
    tokens: Tensor
    fixed: Tensor
    start: Tensor
    end: Tensor
    log_q: Tensor | None
    taken: Tensor = field(init=False)
    after: Tensor = field(init=False)
    forwards: Tensor = field(init=False)
    clean: Tensor = field(init=False)
    done: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.taken, self.after, self.forwards = (torch.zeros_like(self.start) for _ in range(3))
        self.clean, self.done = (torch.zeros_like(self.start, dtype=torch.bool) for _ in range(2))

    @property
    def columns(self) -> Tensor:
        """The columns [B, b] of the blocks."""
        return self.start[:, None] + torch.arange(self.size)

    def block(self, values: Tensor) -> Tensor:
        """The part [B, b] of `values` [B, S] that belongs to the blocks."""
        return values.gather(1, self.columns)

    def write(self, take: Tensor, drawn: Drawn, rows: Tensor) -> None:
        """Commit the drawn tokens [B', b] where `take` says so, of the sequences `rows`."""
        columns = self.columns[rows]
        old = self.tokens[rows].gather(1, columns)
        new = torch.where(take, drawn.tokens.view_as(old), old)
        self.tokens[rows] = self.tokens[rows].scatter(1, columns, new)
        if self.log_q is not None:
            at, offset = take.nonzero(as_tuple=True)
            laws = drawn.log_q.view(*take.shape, -1)[at, offset]
            self.log_q[rows[at], columns[at, offset]] = laws.to(self.log_q)

    def advance(self, rows: Tensor, ends: frozenset[int]) -> None:
        """Go to the next block; a sequence is done after an end token or at its limit."""
        block, fixed = self.block(self.tokens)[rows], self.block(self.fixed)[rows]
        ended = torch.isin(block, torch.tensor(sorted(ends), dtype=torch.int64)) & ~fixed
        over = ended.any(1) | (self.start[rows] + self.size >= self.end[rows])
        self.done[rows] = over
        self.start[rows] += torch.where(over, 0, self.size)
        self.taken[rows] = self.after[rows] = 0
        self.clean[rows] = False


@torch.inference_mode()
def decode(
    idlm: Idlm,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rule: Rule | None = None,
    keep_laws: bool = False,
) -> list[Written]:
    """Decode a batch of prompts by a rule (`Sdar()` if it is None).

    `keep_laws` keeps the law of each token, which takes n V numbers.

    Raises:
        InputError: a prompt or the params cannot be used.
    """
    rule, draw = rule or Sdar(), drawer(idlm, params)
    state = _begin(idlm, [list(prompt) for prompt in prompts], params, rule.block, keep_laws)
    cache = BlockCache(state.tokens.shape[1])
    _prefill(idlm, state, cache)
    while not bool(state.done.all()):
        _forward(idlm, state, cache, rule, draw)
    return [
        _written(state, row, list(prompt), idlm.eos_ids, params.max_tokens)
        for row, prompt in enumerate(prompts)
    ]


def _begin(
    idlm: Idlm, prompts: list[list[int]], params: SamplingParams, block: int, keep_laws: bool
) -> State:
    length = torch.tensor([len(prompt) for prompt in prompts])
    end = (length + params.max_tokens + block - 1) // block * block
    columns = int(end.max()) if len(prompts) else 0
    check(idlm, prompts, columns)
    tokens = torch.full((len(prompts), columns), idlm.mask_id)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    fixed = torch.arange(columns) < length[:, None]
    laws = torch.zeros(*tokens.shape, idlm.vocab_size) if keep_laws else None
    return State(block, tokens, fixed, length // block * block, end, laws)


def _prefill(idlm: Idlm, state: State, cache: BlockCache) -> None:
    """Write the whole blocks of the prompts, under the block-causal mask."""
    columns = int(state.start.max())
    if not columns:
        return
    position = torch.arange(columns).expand(len(state.tokens), -1)
    number = torch.arange(columns) // state.size
    seen, every = number <= number[:, None], torch.ones_like(state.done)
    cache.prepare(position, torch.zeros_like(state.start), seen[None], every)
    idlm.hidden(state.tokens[:, :columns], position, None, NO_ROWS, cache)


def _forward(
    idlm: Idlm,
    state: State,
    cache: BlockCache,
    rule: Rule,
    draw: Callable[[Tensor], Drawn],
) -> None:
    """One forward: blocks that are clean are stored, the others go a step on."""
    commits, block = state.clean & ~state.done, state.block(state.tokens)
    whole = torch.ones(1, state.size, state.size, dtype=torch.bool)
    cache.prepare(state.columns, state.start, whole, commits)
    hidden = idlm.hidden(block, state.columns, None, NO_ROWS, cache)
    state.forwards += ~state.done
    rows = (~state.clean & ~state.done).nonzero()[:, 0]
    if len(rows):
        drawn = draw(idlm.head(hidden[rows]).flatten(0, 1))
        step = _step(block[rows] == idlm.mask_id, drawn)
        take, clean = rule.apply(state, step, rows)
        state.write(take, drawn, rows)
        state.taken[rows] += 1
        state.clean[rows] = clean
    state.advance(commits.nonzero()[:, 0], idlm.eos_ids)


def _step(masked: Tensor, drawn: Drawn) -> Step:
    entropy = -(drawn.log_q.exp() * drawn.log_q.clamp(min=-1e9)).sum(-1)
    parts = (drawn.tokens, drawn.probability, entropy)
    return Step(masked, *(part.view_as(masked) for part in parts))


def _written(
    state: State, row: int, prompt: list[int], ends: frozenset[int], limit: int
) -> Written:
    forwards, first = int(state.forwards[row]), len(prompt)
    tokens = cut(state.tokens[row, first:].tolist(), ends, limit)
    laws = None if state.log_q is None else state.log_q[row, first : first + len(tokens)].clone()
    return Written(prompt, tokens, forwards, forwards * state.size, laws)
