"""`CachedDecoder`: one sequence, a contiguous cache, windows as `idlm.decoding.window` lays them out.

A request's life:
    1. the prefill runs the prompt, with K masks after it: the first token, and drafts of the K tokens after that one
    2. a window runs the pending token, the drafts, and K masks for every outcome in `branches`
    3. the law of each verify row and the verification rule say how many drafts stand, and which token follows them
    4. those tokens are committed; the last becomes pending
    5. the masks of that very outcome, already computed, give the next drafts: back to 2

Shapes: K = stride - 1 masks an outcome, V logit columns, W rows of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from idlm.decoding.errors import InputError
from idlm.decoding.law import history, law
from idlm.decoding.noise import Stream, gumbel, uniform
from idlm.decoding.params import SamplingParams
from idlm.decoding.verify import Verdict, coupled, ratio, relaxed
from idlm.decoding.window import Branches, Window, window
from idlm.engine.kv_cache import ContiguousCache, visible_rows
from idlm.models.idlm_model import Idlm


@dataclass(frozen=True)
class Step:
    """What one forward committed: `accepted` of the `drafted` drafts, then one token of the law's own."""

    tokens: list[int]
    drafted: int
    accepted: int


@dataclass
class _Drafts:
    """Drafts to verify, and the laws they were drawn from [K, V] (the ratio rule needs those)."""

    tokens: Tensor
    log_q: Tensor | None


NO_DRAFTS = _Drafts(torch.empty(0, dtype=torch.int64), None)


class CachedDecoder:
    """Decodes one sequence at a time; `stride` 1 is plain AR."""

    def __init__(self, idlm: Idlm, stride: int, branches: Branches) -> None:
        if stride > 1 and idlm.gate is None and idlm.mask_id >= idlm.vocab_size:
            raise InputError(f"model {idlm.name!r} has no MASK row to draft with; give an adapter, or use stride 1")
        self.idlm = idlm
        self.stride = stride
        self.branches = branches

    @torch.inference_mode()
    def steps(self, prompt: list[int], params: SamplingParams, seed: int) -> Iterator[Step]:
        """The steps of one request, without end: the caller stops when it has what it asked for."""
        request = _Request(self, prompt, params, seed)
        step = request.prefill()
        while True:
            yield step
            step = request.decode()


class _Request:
    """The state of one request between two forwards."""

    def __init__(self, decoder: CachedDecoder, prompt: list[int], params: SamplingParams, seed: int) -> None:
        self.idlm = decoder.idlm
        self.stride, self.branches = decoder.stride, decoder.branches
        self.prompt, self.params, self.seed = prompt, params, seed
        self.output: list[int] = []
        self.drafts = NO_DRAFTS
        self.cache = ContiguousCache()

    def prefill(self) -> Step:
        """Run the prompt and the first masks; the rows are causal throughout."""
        masks = self.stride - 1
        length = len(self.prompt)
        tokens = torch.tensor(self.prompt + [self.idlm.mask_id] * masks)
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        hidden = self._forward(tokens, 0, torch.arange(len(tokens)), causal, slice(length, length + masks))
        return self._commit(hidden[length - 1 : length], hidden[length:] if masks else None)

    def decode(self) -> Step:
        """Run one window."""
        layout = window(self.stride, len(self.drafts.tokens), self.branches)
        pending = len(self.prompt) + len(self.output) - 1
        masks = torch.full((layout.width - layout.verify_rows,), self.idlm.mask_id)
        tokens = torch.cat([torch.tensor(self.output[-1:]), self.drafts.tokens, masks])
        visible = visible_rows(layout.visible, pending)
        hidden = self._forward(tokens, pending, layout.offsets + pending, visible, layout.mask_rows)
        return self._commit(hidden[: layout.verify_rows], hidden, layout)

    def _forward(self, tokens: Tensor, start: int, positions: Tensor, visible: Tensor, mask_rows: slice) -> Tensor:
        """Hidden states [W, D] of the rows, whose keys and values go into the cache from `start`."""
        self.cache.start = start
        device = self.idlm.device
        hidden = self.idlm.hidden(
            tokens[None].to(device),
            positions[None].to(device),
            visible[None, None].to(device),
            mask_rows,
            self.cache,
        )
        return hidden[0]

    def _commit(self, verify: Tensor, masks: Tensor | None, layout: Window | None = None) -> Step:
        """Verify the drafts, commit what stands and the token after it, and draft from the masks of that outcome.

        `masks` are hidden states: all of them are the outcome's own (prefill), or `layout` says which.
        """
        drafts = self.drafts.tokens
        accepted, token = torch.stack(self._verify(self.idlm.head(verify).cpu())).tolist()
        tokens = [*drafts[:accepted].tolist(), token]
        self.output += tokens
        if masks is not None and layout is not None:
            branch = layout.branch(accepted)
            masks = None if branch is None else masks[branch]
        self.drafts = NO_DRAFTS if masks is None else self._draft(self.idlm.head(masks).cpu())
        return Step(tokens, len(drafts), accepted)

    def _verify(self, logits: Tensor) -> Verdict:
        """Judge the drafts by the logits [1 + v, V] of the verify rows."""
        params, drafts = self.params, self.drafts
        log_p = self._law(logits, drafts.tokens.tolist())
        noise = self._noise(log_p, Stream.TOKEN)
        if params.verification == "ratio" and drafts.log_q is not None:
            chance = uniform(self.seed, self._positions(len(drafts.tokens)))
            return ratio(log_p, drafts.tokens, drafts.log_q, chance, noise)
        if params.tau is not None:
            return relaxed(log_p, drafts.tokens, noise, params.tau)
        return coupled(log_p, drafts.tokens, noise)

    def _draft(self, logits: Tensor) -> _Drafts:
        """Draw a draft from each mask's logits [K, V]; under penalties one by one: each counts those before it."""
        stream = Stream.DRAFT if self.params.verification == "ratio" else Stream.TOKEN
        if not self.params.penalised:
            log_q = self._law(logits, [])
            return _Drafts((log_q + self._noise(log_q, stream)).argmax(dim=-1), log_q)
        tokens: list[int] = []
        laws: list[Tensor] = []
        for row in logits:
            before = history(self.prompt, self.output + tokens, [], logits.shape[-1])
            laws.append(law(row[None], self.params, before, self.idlm.mask_id))
            noise = self._noise(laws[-1], stream, first=len(tokens))
            tokens.append(int((laws[-1] + noise).argmax()))
        return _Drafts(torch.tensor(tokens), torch.cat(laws))

    def _law(self, logits: Tensor, drafts: list[int]) -> Tensor:
        """The law of each row; row k comes after the first k of `drafts`."""
        before = history(self.prompt, self.output, drafts, logits.shape[-1]) if self.params.penalised else None
        return law(logits, self.params, before, self.idlm.mask_id)

    def _noise(self, rows: Tensor, stream: Stream, first: int = 0) -> Tensor:
        """Noise for the laws `rows` [R, V] of the R tokens from output position `first` on; zeros when greedy."""
        if self.params.greedy:
            return torch.zeros(len(rows), 1)
        return gumbel(self.seed, self._positions(len(rows), first), rows.shape[-1], stream)

    def _positions(self, rows: int, first: int = 0) -> Tensor:
        """The sequence positions of the next tokens."""
        return torch.arange(rows) + (len(self.prompt) + len(self.output) + first)
