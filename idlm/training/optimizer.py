"""The optimizers of a run, and the learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from idlm.training.config import OptimizerConfig
from idlm.training.muon import Muon


def optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """AdamW; or Muon for the hidden matrices and AdamW without weight decay for the rest.

    Muon's update is scaled to the size of AdamW's, so one learning rate serves both.
    """
    lr, decay = config.lr, config.weight_decay
    if config.name == "adamw":
        decayed, rest = split_by_decay(model)
        groups = [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        return [AdamW(groups, lr, config.betas, fused=True)]
    matrices, rest = split_parameters(model)
    chosen: list[Optimizer] = []
    if matrices:
        chosen.append(Muon(matrices, lr, decay))
    if rest:
        chosen.append(AdamW(rest, lr, config.betas, weight_decay=0.0, fused=True))
    return chosen


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained matrices and the MASK row, which decay; and weights of norms and biases, which do
    not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 or name.endswith("mask_row")]
    chosen = {id(p) for p in decayed}
    return decayed, [p for _, p in trained if id(p) not in chosen]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained matrices that are neither embedding nor output head; and all other trained
    parameters."""
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    outer |= {id(p) for name, p in model.named_parameters() if "lm_head" in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in outer]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trained if id(p) not in chosen]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` of `steps`: a linear warm-up to `lr`, then the schedule down to 0."""
    if step < config.warmup:
        return config.lr * (step / config.warmup)
    if config.schedule == "wsd":
        falling = round(config.decay * steps)
        done = max(step - (steps - falling), 0) / max(falling, 1)
        return config.lr * (1 - done)
    after = max(steps - config.warmup, 1)
    if config.schedule == "linear":
        return config.lr * ((steps - step) / after)
    return config.lr * (0.5 * (1 + math.cos(math.pi * ((step - config.warmup) / after))))
