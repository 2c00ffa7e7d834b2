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
from idlm.training.plan import Bounds, Drawn, Row, batches
from idlm.training.store import lengths


@torch.no_grad()
def measure(
    objective: Objective | DiffusionObjective,
    examples: Sequence[Example],
    config: TrainConfig,
    step: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Alpha and argmax acceptance by draft depth, and what greedy decoding will see; for AR the
    cross-entropy, for a baseline its loss under the same noise each time.

    Alpha and acceptance are of all drafts, reached or not. `training.path` has the others: it walks
    along one of b texts in all b phases, which takes as long as the former. The block size is that
    of the stage of step `step`. Each rank measures its share of the texts.
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
        share * _sums(objective, texts, planned[index], config, block_size)
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
    objective: Objective | DiffusionObjective,
    data: Phased,
    drawn: Sequence[Row],
    config: TrainConfig,
    block_size: int,
) -> Tensor:
    """Sums over one batch: [3 b] of `Objective.measure` and [3 + 2 b] of `Objective.walk`;
    otherwise [2]: rows and nats."""
    texts = send_to_device(data.batch(drawn).texts, objective.idlm.device)
    if isinstance(objective, Objective) and config.objective == "idlm":
        # one of b texts, whatever the batches are; if this one has none, ranks still run together
        chosen = [row for row, (each,) in enumerate(drawn) if each.draw % block_size == 0]
        some = Texts(*(part[chosen or [0]] for part in texts))
        path = bool(chosen) * objective.walk(some, block_size).to(texts.tokens.device)
        return torch.cat([objective.measure(texts, block_size).flatten(), path.double()])
    terms = Wanted(block_size if config.denoises else 0, clean=True)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        nats = objective(texts, terms).clean
    return torch.stack([objective.count(texts, terms)[1].double(), nats.double()])


def summary(sums: Tensor, objective: str, block_size: int) -> dict[str, Any]:
    """The means of the sums of `measure`, by name."""
    if objective != "idlm":
        return {"held_out_ce": float(sums[1] / sums[0])}
    by_depth, path = sums[: 3 * block_size].view(3, block_size), sums[3 * block_size :]
    rows, alpha, agree = by_depth
    tokens, forwards, of_chain = path[:3].tolist()
    reached, accepted = path[3:].view(2, block_size)
    return {
        "block_size": block_size,
        "alpha": (alpha / rows.clamp(min=1)).tolist(),
        "acceptance": (agree / rows.clamp(min=1)).tolist(),
        "acceptance_reached": (accepted / reached.clamp(min=1)).tolist(),
        "tpf": max(tokens, 1) / max(forwards, 1),
        "tpf_chain": max(tokens, 1) / max(of_chain, 1),
    }
