"""Acceptance and TPF of a model on held-out texts while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from idlm.training.config import TrainConfig
from idlm.training.data import Example, Phased
from idlm.training.diffusion import DiffusionObjective
from idlm.training.layout import Texts
from idlm.training.objective import Objective, Wanted
from idlm.training.plan import Bounds, Drawn, batches
from idlm.training.store import lengths


@torch.no_grad()
def measure(
    objective: Objective | DiffusionObjective,
    examples: Sequence[Example],
    config: TrainConfig,
    step: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Alpha and argmax acceptance by draft depth, and the TPF that they imply; for AR the
    cross-entropy, for a baseline its loss under the same noise each time.

    Measured on the true text (teacher forced): acceptance at depth k is not conditioned on the
    acceptance of the drafts before. The block size is that of the stage of step `step`. Each rank
    measures its share of the texts.
    """
    was_training = objective.training
    objective.eval()
    block_size = config.stage(max(step, 0)).block_size
    sizes = sorted((length, at) for at, length in enumerate(lengths(examples).tolist()))
    rows = [[Drawn(number, at, length)] for number, (length, at) in enumerate(sizes)]
    # always with random phases: decoding drafts from any position
    texts = Phased(examples, config.seed, random_phase=True)
    planned = list(batches(rows, Bounds(config.batch_rows, config.batch_tokens)))
    sums = [
        share * _sums(objective, texts.batch(planned[index]).texts, config, block_size)
        for index, share in _shares(len(planned), accelerator)
    ]
    objective.train(was_training)
    total = accelerator.reduce(torch.stack(sums).sum(0), reduction="sum")
    return summary(total.cpu(), config.objective, block_size)


def _shares(batches: int, accelerator: Accelerator) -> Iterator[tuple[int, int]]:
    """The batches of this rank, each with 1; with 0 what it computes so that all ranks run as many
    forwards, which sharded weights need."""
    for first in range(0, batches, accelerator.num_processes):
        index = first + accelerator.process_index
        yield min(index, batches - 1), int(index < batches)


def _sums(
    objective: Objective | DiffusionObjective, texts: Texts, config: TrainConfig, block_size: int
) -> Tensor:
    """Sums over one batch: [3, b] of `Objective.measure`; otherwise [2]: rows and nats."""
    texts = send_to_device(texts, objective.idlm.device)
    if isinstance(objective, Objective) and config.objective == "idlm":
        return objective.measure(texts, block_size)
    terms = Wanted(block_size if config.denoises else 0, clean=True)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        nats = objective(texts, terms).clean
    return torch.stack([objective.count(texts, terms)[1].double(), nats.double()])


def summary(sums: Tensor, objective: str, block_size: int) -> dict[str, Any]:
    """The means of the sums of `measure`, by name."""
    if objective != "idlm":
        return {"held_out_ce": float(sums[1] / sums[0])}
    rows, alpha, agree = sums
    shares = {
        "alpha": (alpha / rows.clamp(min=1)).tolist(),
        "acceptance": (agree / rows.clamp(min=1)).tolist(),
    }
    return {
        "block_size": block_size,
        **shares,
        "tpf": tpf(shares["acceptance"]),
        "tpf_sampled": tpf(shares["alpha"]),
    }


def tpf(acceptance: list[float]) -> float:
    """Tokens per forward with drafts for all outcomes: 1 + a_1 + a_1 a_2 + ... ."""
    total = reached = 1.0
    for share in acceptance:
        reached *= share
        total += reached
    return total
