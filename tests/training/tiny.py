"""Tiny models and texts for the training tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from idlm.models.attention import NAME
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.idlm_model import Idlm
from idlm.training.config import TrainConfig, parse_config
from idlm.training.data import Example
from idlm.training.objective import Texts

VOCAB, CONTEXT, MASK = 23, 48, 22
SPEC = LoraSpec(rank=2, alpha=4.0, targets=("q_proj", "v_proj", "c_proj"))
KEYS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def model(
    method: str = "full",
    dtype: torch.dtype = torch.float64,
    mask_id: int = MASK,
    tied: bool = True,
    window: int | None = None,
) -> Idlm:
    """A random model; "lora" attaches a gated LoRA whose B is not zero, so that every trained value
    has a gradient.

    Starcoder2, because its norms stay in float64: those of Llama and Qwen go through float32, which
    would hide errors.
    """
    torch.manual_seed(0)
    keys = {**KEYS, "tie_word_embeddings": tied, "sliding_window": window}
    config = AutoConfig.for_model("starcoder2", **keys, initializer_range=0.5)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype)
    idlm = Idlm(stock, None, mask_id, name="tiny")
    if method == "lora":
        idlm.gate = attach(idlm.model, SPEC, mask_id)
        for p in adapter_parameters(idlm.model).values():
            torch.nn.init.normal_(p, std=0.3)
    return idlm


def texts(shapes: list[tuple[int, int]], phases: list[int]) -> Texts:
    """Random texts of the given (prompt, response) lengths."""
    rng = random.Random(0)
    rows = [torch.tensor([rng.randrange(MASK) for _ in range(p + r)]) for p, r in shapes]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    prompt = torch.tensor([p for p, _ in shapes])
    return Texts(tokens, prompt, torch.tensor([p + r for p, r in shapes]), torch.tensor(phases))


def examples(count: int = 40) -> list[Example]:
    """Random examples of several lengths."""
    rng = random.Random(1)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, MASK - 1) for _ in range(rng.randint(low, high))]

    return [Example(ids(1, 6), ids(2, 12), f"row {i}") for i in range(count)]


def write_jsonl(path: Path, rows: list[Example]) -> Path:
    """The examples as a file of token ids."""
    path.write_text(
        "".join(json.dumps({"prompt": e.prompt, "response": e.response}) + "\n" for e in rows)
    )
    return path


def config(folder: Path, **changes: Any) -> TrainConfig:
    """A small run; `changes` are top-level keys."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "method": "full",
        "device": "cpu",
        "threads": 1,
        "batch_size": 4,
        "log_steps": 1,
        "eval_steps": 100,
        "save_steps": 100,
        "stages": [{"steps": 3, "block_size": 2}],
        "data": {"source": "jsonl", "path": str(folder / "data.jsonl"), "held_out": 4},
        "model": {"path": str(folder / "model")},
        "optimizer": {"lr": 1e-2, "warmup": 0},
    }
    return parse_config({**tree, **changes})
