"""Tiny models and texts for the training tests."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from idlm.models import experts
from idlm.models.attention import NAME
from idlm.models.check import prepare
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.idlm_model import Idlm
from idlm.models.routes import implementation
from idlm.training.config import DataConfig, TrainConfig
from idlm.training.data import Draw, Example, collate, exchange
from idlm.training.layout import Texts
from idlm.training.read_config import parse_config
from idlm.training.reading import Reader
from idlm.training.run import train
from idlm.training.tables import Tables

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
    spec: LoraSpec = SPEC,
) -> Idlm:
    """A random model; "lora" attaches a gated LoRA of the shape `spec`, whose B is not zero, so
    that every trained value has a gradient.

    Starcoder2, because its norms stay in float64: those of Llama and Qwen go through float32, which
    would hide errors.
    """
    torch.manual_seed(0)
    keys = {**KEYS, "tie_word_embeddings": tied, "sliding_window": window}
    config = AutoConfig.for_model("starcoder2", **keys, initializer_range=0.5)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype)
    idlm = Idlm(stock, None, mask_id, name="tiny")
    if method == "lora":
        idlm.gate = attach(idlm.model, spec, mask_id)
        for p in adapter_parameters(idlm.model).values():
            torch.nn.init.normal_(p, std=0.3)
    return idlm


def family(kind: str, keys: dict[str, Any]) -> Idlm:
    """A random model of a family in float64, all of it trained."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**KEYS, "initializer_range": 0.5, **keys})
    attention = implementation(config)
    stock = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=attention,
        experts_implementation=experts.NAME,
        dtype=torch.float64,
    )
    prepare(stock)
    return Idlm(stock.eval(), None, MASK, name="tiny")


def texts(shapes: list[tuple[int, int]], phases: list[int]) -> Texts:
    """Random texts of the given (prompt, response) lengths, one a row."""
    return packed([[(p, r)] for p, r in shapes], phases)


def packed(rows: list[list[tuple[int, ...]]], phases: list[int]) -> Texts:
    """Rows of random documents. The shape of one is the lengths of its parts: prompt, answer,
    prompt, answer, ...; a part between answers may be empty. `phases` are those of all documents.
    """
    rng, phase = random.Random(0), iter(phases)
    draws = [[Draw(0, document(rng, shape), next(phase)) for shape in row] for row in rows]
    return collate(draws).texts


def document(rng: random.Random, shape: tuple[int, ...]) -> Example:
    """A random document of a shape."""
    ends = list(accumulate(shape))
    answers = tuple(zip(ends[0::2], ends[1::2], strict=False))
    return Example([rng.randrange(MASK) for _ in range(ends[-1])], answers)


def prompt(example: Example) -> list[int]:
    """What comes before the first answer."""
    return example.tokens[: example.answers[0][0]]


def response(example: Example) -> list[int]:
    """The only answer."""
    ((start, stop),) = example.answers
    return example.tokens[start:stop]


def examples(count: int = 40) -> list[Example]:
    """Random examples of several lengths."""
    rng = random.Random(1)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, MASK - 1) for _ in range(rng.randint(low, high))]

    return [exchange(ids(1, 6), ids(2, 12), f"row {i}") for i in range(count)]


def read(path: Path | str, idlm: Idlm, **keys: Any) -> list[Example]:
    """The documents of a file or a folder; `keys` are those of `data`."""
    config = DataConfig(source="jsonl", path=str(path), **keys)
    reader = Reader(config, idlm, idlm.context)
    return [example for row in reader.read(Tables((str(path),))) for example in row]


def write_jsonl(path: Path, rows: list[Example]) -> Path:
    """The examples as a file of token ids."""
    path.write_text(
        "".join(json.dumps({"prompt": prompt(e), "response": response(e)}) + "\n" for e in rows)
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


def trained_adapter(model: Path, place: Path) -> Path:
    """The folder of a gated LoRA on all linear layers of a model folder, after two steps in
    float64. `place` gets the run."""
    write_jsonl(place / "data.jsonl", examples())
    what = {"path": str(model), "dtype": "float64"}
    stages = [{"steps": 2, "block_size": 2}]
    train(config(place, method="lora", lora={"rank": 2}, model=what, stages=stages))
    return place / "run" / "final"
