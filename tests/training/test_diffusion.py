"""The objectives of SDAR and LLaDA against double loops, in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idlm.errors import InputError
from idlm.models.loading import load
from idlm.training.config import DiffusionConfig
from idlm.training.diffusion import DiffusionObjective, Filled, block_visible, noised, whole_visible
from idlm.training.objective import Wanted
from idlm.training.run import train
from tests.training import tiny
from tests.training.test_keep import folder  # noqa: F401  # a fixture

BLOCK, END = 3, 2
TEXTS = tiny.texts([(2, 5), (4, 9), (3, 1)], [0, 0, 0])


def slow_block_mask(length: int) -> Tensor:
    """What rows of [x_t | x_0] see, for a text of whole blocks."""
    seen = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            i, j = query % length // BLOCK, key % length // BLOCK
            if query < length:
                seen[query, key] = i == j if key < length else j < i
            else:
                seen[query, key] = key >= length and j <= i
    return seen


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_texts_are_filled_with_the_end_token(kind) -> None:
    objective = DiffusionObjective(tiny.model(), kind, DiffusionConfig(fill=14))
    filled = objective.filled(TEXTS, BLOCK)
    lengths, wholes = [7, 13, 4], [9, 15, 6] if kind == "sdar" else [14, 14, 14]
    for row, (length, whole) in enumerate(zip(lengths, wholes, strict=True)):
        tokens = TEXTS.tokens[row, :length].tolist() + [END] * (whole - length)
        prompt = [2, 4, 3][row]
        assert filled.tokens[row, :whole].tolist() == tokens
        assert filled.answer[row].nonzero().flatten().tolist() == list(range(prompt, whole))
        assert filled.real[row].sum() == whole
    total = sum(wholes) - 9 if kind == "sdar" else 3
    assert objective.count(TEXTS, Wanted(BLOCK, clean=True)).tolist() == [0, total]


def test_masks_are_those_of_the_loops() -> None:
    real = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    filled = Filled(torch.zeros(2, 6, dtype=torch.int64), real, real)
    both = block_visible(filled, BLOCK)
    assert torch.equal(both[0], slow_block_mask(6))
    rows = torch.tensor([0, 1, 2, 6, 7, 8])
    assert torch.equal(both[1][rows][:, rows], slow_block_mask(3))
    assert not both[1][rows][:, [3, 4, 5, 9, 10, 11]].any()
    assert whole_visible(real)[0].all()
    assert whole_visible(real)[1, :3].tolist() == [[True] * 3 + [False] * 3] * 3


def test_noise_is_of_answers_and_of_its_share() -> None:
    torch.manual_seed(0)
    rows, columns = 2000, 40
    real = torch.ones(rows, columns, dtype=torch.bool)
    answer = real & (torch.arange(columns) >= 10)
    filled = Filled(torch.randint(tiny.MASK, (rows, columns)), real, answer)
    noise = noised(filled, DiffusionConfig((0.001, 1.0), random=0.25), tiny.MASK, tiny.VOCAB)
    assert not noise.where[:, :10].any() and noise.where.any(1).all()
    assert torch.equal(noise.tokens[~noise.where], filled.tokens[~noise.where])
    masked = (noise.tokens == tiny.MASK) & noise.where
    assert (noise.where.sum() / answer.sum()).item() == pytest.approx(0.5, abs=0.02)
    assert (masked.sum() / noise.where.sum()).item() == pytest.approx(0.75, abs=0.02)
    share = noise.where.sum(1) / 30
    assert (share - 1 / noise.weight[:, 0]).abs().mean() < 0.1
    low = noised(filled, DiffusionConfig((0.001, 0.001)), tiny.MASK, tiny.VOCAB)
    assert low.where.sum(1).float().mean() < 1.1  # at least one, and hardly more
    even = noised(filled, DiffusionConfig((0.3, 0.8), "none"), tiny.MASK, tiny.VOCAB)
    assert even.weight.unique().tolist() == [pytest.approx(1 / 0.55)]


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_loss_is_that_of_each_text_alone(kind) -> None:
    idlm = tiny.model()
    objective = DiffusionObjective(idlm, kind, DiffusionConfig(fill=15, random=0.3))
    wanted = Wanted(BLOCK, clean=True)
    torch.manual_seed(3)
    found = objective(TEXTS, wanted).clean
    filled = objective.filled(TEXTS, BLOCK)
    torch.manual_seed(3)
    noise = noised(filled, objective.config, tiny.MASK, tiny.VOCAB)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        length = int(filled.real[row].sum())
        ids, clean = noise.tokens[row, :length], filled.tokens[row, :length]
        positions, seen = torch.arange(length), torch.ones(length, length, dtype=torch.bool)
        if kind == "sdar":
            ids, positions = torch.cat([ids, clean]), positions.repeat(2)
            seen = slow_block_mask(length)
        logits = idlm.head(idlm.hidden(ids[None], positions[None], seen[None, None]))[0]
        logits[:, tiny.MASK] = -torch.inf
        for at in noise.where[row].nonzero().flatten().tolist():
            term = -logits[at].log_softmax(-1)[clean[at]] * noise.weight[row, at]
            total = total + term / (1 if kind == "sdar" else filled.answer[row].sum())
    assert found.item() == pytest.approx(total.item(), rel=1e-10)


@pytest.mark.parametrize("kind", ["sdar", "llada"])
def test_a_run_learns_resumes_and_loads(folder: Path, kind: str) -> None:  # noqa: F811
    keys = {
        "objective": kind,
        "optimizer": {"lr": 0.02, "warmup": 0},
        "diffusion": {"fill": 20, "noise": [0.3, 1.0]},
        "save_steps": 5,
        "eval_steps": 5,
    }
    stages = [{"steps": 15, "block_size": 4}]
    straight = train(tiny.config(folder, stages=stages, **keys))
    measured = [
        entry["held_out_ce"]
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
        if "held_out_ce" in (entry := json.loads(line))
    ]
    assert straight["held_out_ce"] == measured[-1] < measured[0]
    shutil.rmtree(folder / "run" / "checkpoint-15")
    resumed = train(tiny.config(folder, stages=stages, resume=True, **keys))
    assert resumed["held_out_ce"] == straight["held_out_ce"]
    idlm = load(folder / "run" / "final")
    assert idlm.block_size is None and idlm.can_draft  # it has a MASK row, and is no I-DLM


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "lora"}, "method is 'lora'; objective: sdar"),
        ({"packing": True}, "packing"),
        ({"diffusion": {"noise": [0.9, 0.1]}}, "diffusion.noise"),
        ({"diffusion": {"random": 2.0}}, "diffusion.random"),
        ({"eval_decode": 3}, "eval_decode"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path: Path, changes, named: str) -> None:
    with pytest.raises(InputError, match=named):
        tiny.config(tmp_path, objective="sdar", **changes)
