"""`chain`: in a step, the draft heads of its slots correct each MASK row by the token before it.

The LM head has run for the K MASK rows of each slot's outcome. Their candidates are found at once;
then `idlm.decoding.verify.draft` asks for one row after the other. Shapes are static, and nothing
is read on the host.

Shapes: B slots, K drafts, D hidden size, m candidates, V logit columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.decoding.verify import Chain
from idlm.engine.slots import State
from idlm.models.heads import candidate_count
from idlm.models.idlm_model import Idlm
from idlm.models.weights import embedding_rows, output_head


def chain(idlm: Idlm, state: State, slots: Tensor, logits: Tensor, hidden: Tensor) -> Chain | None:
    """The logits of each draft, given those before it; None if no adapter has a draft head.

    Args:
        state: of all slots, as it is after the commit; the pending token is before draft 1.
        slots: int64 [B]. Those whose adapter has no head keep `logits`.
        logits: [B, K, V], LMhead of the MASK rows; hidden: [B, K, D], their hidden states.
    """
    heads = idlm.draft_heads
    if not heads:
        return None
    adapter, pending = (of.index_select(0, slots) for of in (state.adapter, state.pending))
    embedding = embedding_rows(idlm.model)
    most = candidate_count(idlm.model, *heads.values())
    candidates = logits.topk(most, dim=-1).indices  # [B, K, m], the likeliest first
    rows = output_head(idlm.model).weight[candidates]  # [B, K, m, D]

    def correction(k: int, before: Tensor) -> Tensor:
        """g [B, m]. Each head is computed for all slots, and a slot keeps that of its adapter."""
        vectors = embedding[before.clamp(0, len(embedding) - 1)]  # a dead slot has any token
        total = logits.new_zeros(candidates[:, k].shape)
        for index, head in heads.items():
            own = head(hidden[:, k], vectors, rows[:, k, : head.spec.top])
            own = F.pad(own, (0, most - own.shape[1])).to(total.dtype)
            total = torch.where(adapter.eq(index)[:, None], own, total)
        return total

    def row(drafts: Tensor) -> Tensor:
        k = drafts.shape[1]
        bias = correction(k, drafts[:, -1] if k else pending)
        return logits[:, k : k + 1].scatter_add(2, candidates[:, k : k + 1], bias[:, None])

    return row
