"""What the memory benchmarks share: a random model with texts, and the memory of a process."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from idlm.models.attention import NAME
from idlm.models.gated_lora import LoraSpec, attach
from idlm.models.idlm_model import Idlm
from idlm.training.data import Draw, collate, exchange
from idlm.training.layout import Texts
from idlm.training.objective import Objective

T = TypeVar("T")


def random_llama(spec: LoraSpec | None, **sizes: int) -> Objective:
    """A random Llama in float32 with a gated LoRA, or without `spec` all of it trained. `sizes` are
    keys of its config; the last token is MASK."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    idlm = Idlm(model, None, config.vocab_size - 1)
    if spec is not None:
        idlm.gate = attach(model, spec, idlm.mask_id)
    return Objective(idlm, trains_clean=spec is None).train()


def random_texts(idlm: Idlm, count: int, length: int, prompt: int) -> Texts:
    """Random texts of one length, whose first tokens are the prompt, each in another phase."""
    rows = torch.randint(idlm.mask_id, (count, length)).tolist()
    draws = [
        [Draw(0, exchange(row[:prompt], row[prompt:]), phase)] for phase, row in enumerate(rows)
    ]
    return collate(draws).texts


def status(key: str) -> int:
    """Bytes of this process by Linux: VmRSS is what it holds, VmHWM the most it held, RssAnon what
    it holds without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_the_peak() -> None:
    """VmHWM is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")


def alone(work: Callable[..., T], *arguments: Any) -> T:
    """What `work` returns in a process of its own."""
    with get_context("spawn").Pool(1) as process:
        return process.apply(work, arguments)
