"""Simulated acceptance: what ISD would cost and bring with drafts of a given quality.

For shapes without trained weights. Drafts are accepted by chance, whatever the tokens; the output
means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idlm.decoding.law import Law
from idlm.decoding.noise import Stream, uniform
from idlm.decoding.verify import Drafts, Verdicts, verify
from idlm.engine.engine import Engine
from idlm.errors import InputError


def simulate_acceptance(engine: Engine, shares: Sequence[float]) -> None:
    """Let an engine accept draft k with the chance `shares[k]`, its last entry from there on.

    Raises:
        InputError: they are no shares.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise InputError(f"simulate_acceptance={list(shares)} must be shares from 0 to 1, by depth")
    runner = engine.runner
    chances = torch.tensor(shares, device=runner.idlm.device)

    def simulated(law: Law, logits: Tensor, drafts: Drafts, first: Tensor) -> Verdicts:
        # the real rule runs too: a simulated step costs what a real one does
        verdict = verify(law, logits, drafts, first)
        depth = torch.arange(drafts.tokens.shape[1], device=chances.device)
        draws = uniform(law.settings.keys[:, Stream.ACCEPT], first[:, None] + depth)
        lucky = draws < chances[depth.clamp(max=len(chances) - 1)]
        reached = (lucky & (depth < drafts.valid[:, None])).to(torch.int64).cumprod(dim=1)
        accepted = reached.sum(dim=1)
        token = verdict.tokens[:, :1]
        index = torch.arange(verdict.tokens.shape[1], device=token.device)
        tokens = torch.where(
            index < accepted[:, None], torch.cat([drafts.tokens, token], dim=1), token
        )
        return verdict._replace(accepted=accepted, tokens=tokens)

    runner.replace_verify(simulated)
