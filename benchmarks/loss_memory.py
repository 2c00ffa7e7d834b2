"""Peak memory of the training loss, forward and backward, by the size of the vocabulary.

    python -m benchmarks.loss_memory [--rows 2048] [--vocabularies 4096 49152 151936] [--out FILE]

Each figure is the peak of a process of its own, beyond what it held when the model and the texts
were there; malloc maps every large tensor by itself, so it is what tensors take. The model is one
small layer, so nearly all of it is the loss: CE + KL + TV with the weights of D-PACE, with a gated
LoRA and with all weights trained, in chunks and, where that fits in `--limit` GB, with all rows at
once. With all weights trained every trainer holds the gradient of the head when it is done;
`without_head_bytes` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.memory import alone, forget_the_peak, random_llama, random_texts, status
from idlm.environment import environment
from idlm.models.gated_lora import LoraSpec
from idlm.training import losses
from idlm.training.layout import Texts
from idlm.training.losses import RowWeights
from idlm.training.objective import Objective, Wanted

TEXTS, HIDDEN, COPIES = 8, 64, 12
"""Texts in the batch, the hidden size, and copies of the logits that the whole loss may have."""
WANTED = Wanted(4, clean=False, soft=True, weights=RowWeights(1.0, 1.0, 1.0, "dpace"))


def build(method: str, vocabulary: int, rows: int) -> tuple[Objective, Texts]:
    """A model and texts with `rows` MASK rows together."""
    length = rows // TEXTS + 2
    objective = random_llama(
        LoraSpec(4, 8.0, ("q_proj", "v_proj")) if method == "lora" else None,
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=length,
    )
    return objective, random_texts(objective.idlm, TEXTS, length, prompt=1)


def peak(method: str, vocabulary: int, rows: int, whole: bool) -> int:
    """Bytes at the peak of one loss and its backward, beyond those before."""
    torch.set_num_threads(1)
    objective, texts = build(method, vocabulary, rows)
    build(method, 512, 8 * TEXTS)[0](texts._replace(tokens=texts.tokens % 511), WANTED)
    if whole:
        losses.CHUNK["cpu"] = rows * vocabulary
    before = status("VmRSS")
    forget_the_peak()
    objective(texts, WANTED).noisy.backward()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 49152, 151936])
    parser.add_argument("--limit", type=float, default=6.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    figures = []
    for method in ("lora", "full"):
        for vocabulary in options.vocabularies:
            for whole in (False, True):
                logits = options.rows * vocabulary * 4
                if whole and logits * COPIES > options.limit * 1e9:
                    continue
                found = alone(peak, method, vocabulary, options.rows, whole)
                row = {"method": method, "vocabulary": vocabulary, "whole": whole}
                figures.append(row | {"logits_bytes": logits, "peak_bytes": found})
                head = vocabulary * HIDDEN * 4
                held = head if method == "full" else 0
                figures[-1] |= {"head_bytes": head, "without_head_bytes": found - held}
                print(figures[-1], file=sys.stderr)
    report = {"environment": environment(), "rows": options.rows, "hidden": HIDDEN}
    text = json.dumps(report | {"figures": figures}, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
