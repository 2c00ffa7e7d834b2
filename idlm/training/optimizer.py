"""Muon for the hidden matrices and AdamW for everything else, as one optimizer that `Trainer` can drive and save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from idlm.training.config import OptimizerConfig


class MuonAdamW(torch.optim.Optimizer):
    """Muon on 2-D weights other than embeddings and heads, AdamW on the rest (without weight decay).

    Muon's step is scaled to AdamW's size (`match_rms_adamw`), so one learning rate and one schedule serve both.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        matrices, rest = split_parameters(model)
        lr = config.lr
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            decay = config.weight_decay
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=config.betas, weight_decay=0.0))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """One list of groups, the parts' own: a scheduler that sets `lr` here reaches them."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each part."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained 2-D weights that are neither embeddings nor output heads, and the other trained parameters."""
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outer |= {id(p) for name, p in model.named_parameters() if "lm_head" in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in outer]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in chosen]
