"""Peak memory and time of a training step with and without activation checkpointing.

    python -m benchmarks.activation_memory [--tokens 512] [--texts 4] [--layers 8] [--out FILE]

Each figure is the peak of a process of its own, beyond what it held when the model and the texts
were there. A full fine-tune's has the gradients of all weights; `held_bytes` is their size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.memory import alone, forget_the_peak, random_llama, random_texts, status
from benchmarks.training_step import TARGETS
from idlm.environment import environment
from idlm.models.gated_lora import LoraSpec
from idlm.models.recomputation import recompute_layers
from idlm.training.layout import Texts
from idlm.training.objective import Objective, Wanted

VOCABULARY, HIDDEN = 4096, 256


def build(method: str, tokens: int, texts: int, layers: int) -> tuple[Objective, Texts]:
    objective = random_llama(
        LoraSpec(16, 32.0, TARGETS) if method == "lora" else None,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
    )
    return objective, random_texts(objective.idlm, texts, tokens, prompt=32)


def step(method: str, recomputed: bool, shape: tuple[int, int, int]) -> dict[str, float]:
    """The peak in bytes and the CPU seconds of one loss and its backward."""
    torch.set_num_threads(1)
    objective, texts = build(method, *shape)
    if recomputed:
        recompute_layers(objective.idlm)
    wanted = Wanted(4, clean=method == "full")
    before, began = status("VmRSS"), time.process_time()
    forget_the_peak()
    terms = objective(texts, wanted)
    (terms.noisy + 0.2 * terms.clean).backward()
    seconds, trained = time.process_time() - began, objective.parameters()
    held = sum(p.numel() * p.element_size() for p in trained if p.requires_grad)
    return {"peak_bytes": status("VmHWM") - before, "held_bytes": held, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    shape, figures = (options.tokens, options.texts, options.layers), []
    for method in ("lora", "full"):
        for recomputed in (False, True):
            found = alone(step, method, recomputed, shape)
            figures.append({"method": method, "recomputed": recomputed, **found})
            print(figures[-1], file=sys.stderr)
    report = {"environment": environment(), "shape": shape, "figures": figures}
    text = json.dumps(report, indent=1)
    print(text) if options.out is None else options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
