"""Training throughput of packed rows against padded ones, on texts of gsm8k's lengths.

    python -m benchmarks.packing MODEL TEXTS [--cut 6] [--turns 6] [--batch 16] [--out FILE]

TEXTS is a JSONL file with `question` and `answer`. Three arms take turns in one process, a batch
each at a time. What counts is tokens of texts a CPU second, forward and backward, the median of the
turns:

* padded: batches of random texts, padded to their longest
* sorted: as `idlm train` batches without packing, sorted by length in windows
* packed: `packing: true`, with `batch_tokens` for as many tokens as a padded batch has on average

The loss is that of a gated LoRA with CE and TV at block size 3. `--cut` divides the model's layers
and its vocabulary, so that their shares of the work stay; its weights are random then.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from idlm.environment import environment
from idlm.models.attention import NAME
from idlm.models.gated_lora import LoraSpec, all_linear, attach
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.training.data import Example, Phased, chat_examples
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted
from idlm.training.plan import Bounds, Drawn, Plan, Row, Share, Step
from idlm.training.store import lengths

WANTED = Wanted(3, clean=False, soft=True, weights=RowWeights(1.0, 0.0, 1.0))
RANK = 16


def texts_of(path: Path, idlm: Idlm, number: int) -> list[Example]:
    """The first texts of the file as chats."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:number]]
    return chat_examples([(row["question"], row["answer"]) for row in rows], idlm)


def cut(idlm: Idlm, examples: list[Example], by: int) -> tuple[Idlm, list[Example]]:
    """A smaller model of the same family, and the texts in its vocabulary."""
    config = copy.deepcopy(idlm.model.config)
    config.num_hidden_layers //= by
    config.vocab_size //= by
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    size = config.vocab_size - 1  # the last one is MASK
    return Idlm(model, None, size), [
        replace(one, tokens=[token % size for token in one.tokens]) for one in examples
    ]


def padded(examples: list[Example], batch: int) -> Iterator[Step]:
    """Batches of random texts."""
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    drawn = [Drawn(draw, at, examples[at].length) for draw, at in enumerate(order)]
    for first in range(0, len(drawn), batch):
        yield Step([[[one] for one in drawn[first : first + batch]]])


def planned(examples: list[Example], bounds: Bounds) -> Iterator[Step]:
    """The steps of a run."""
    return iter(Plan(lengths(examples), [Share(0, len(examples))], bounds, seed=0))


def seconds(objective: Objective, texts: Phased, rows: list[Row]) -> float:
    """CPU seconds of one forward and backward."""
    began = process_time()
    batch = texts.batch(rows)
    objective(batch.texts, WANTED).noisy.backward()
    for parameter in objective.parameters():
        parameter.grad = None
    return process_time() - began


def measure(idlm: Idlm, examples: list[Example], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens, padding and seconds of each arm."""
    idlm.gate = attach(idlm.model, LoraSpec(RANK, 32.0, all_linear(idlm.model)), idlm.mask_id)
    objective, texts = Objective(idlm, trains_clean=False), Phased(examples, 0, True)
    tokens = options.batch * sum(one.length for one in examples) // len(examples)
    packed = Bounds(None, max(tokens, options.row_length), options.row_length)
    arms = {
        "padded": padded(examples, options.batch),
        "sorted": planned(examples, Bounds(options.batch)),
        "packed": planned(examples, packed),
    }
    seconds(objective, texts, next(arms["packed"]).batches[0])  # the first is slow
    keys = ("documents", "tokens", "padded", "seconds")
    figures: dict[str, dict[str, float]] = {arm: dict.fromkeys(keys, 0.0) for arm in arms}
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(options.turns):
        for arm, steps in arms.items():
            step = next(steps)
            took = seconds(objective, texts, step.batches[0])
            for key, value in zip(
                keys, (step.documents, step.tokens, step.padded, took), strict=True
            ):
                figures[arm][key] += value
            rates[arm].append(step.tokens / took)
            print(turn, arm, rates[arm][-1], file=sys.stderr)
    return {
        arm: {
            **figure,
            "padding": 1 - figure["tokens"] / figure["padded"],
            "tokens_per_second": rates[arm],
            "median": median(rates[arm]),
        }
        for arm, figure in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--cut", type=int, default=1)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    idlm = load(options.model)
    examples = texts_of(options.texts, idlm, number=4096)
    if options.cut > 1:
        idlm, examples = cut(idlm, examples, options.cut)
    figures = measure(idlm, examples, options)
    base = figures["padded"]["median"]
    report = {
        "environment": environment(),
        "model": Path(options.model).name,
        "cut": options.cut,
        "batch": options.batch,
        "row_length": options.row_length,
        "mean_length": sum(one.length for one in examples) / len(examples),
        "arms": figures,
        "packed_to_padded": figures["packed"]["median"] / base,
        "sorted_to_padded": figures["sorted"]["median"] / base,
    }
    text = json.dumps(report, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
