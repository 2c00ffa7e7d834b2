"""What is trained on: examples from three sources, their order, and batches.

The order and every random number are functions of (seed, number of the draw) alone, so a resumed run, or one that
splits its batches otherwise, sees the same texts with the same phases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from idlm.chat_template import PromptEncoder, check_tokens
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.nano.problems import Problem, held_out_problems, training_problems
from idlm.training.config import DataConfig
from idlm.training.objective import Texts

WINDOW = 16
"""Batches among which texts are sorted by length: long enough to save padding, short enough to stay shuffled."""


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its response, both non-empty; `row` says where it came from."""

    prompt: list[int]
    response: list[int]
    row: str = ""

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out examples, and how many responses were cut at the length limit."""

    training: list[Example]
    held_out: list[Example]
    cut: int


def corpus(config: DataConfig, idlm: Idlm, draws: int, folder: Path) -> Corpus:
    """The examples of a config; `draws` is how many the run needs, `folder` where generated responses are kept.

    Raises:
        InputError: naming the row that is broken, or too few rows.
    """
    limit = min(config.max_length or idlm.context, idlm.context)
    if config.source == "nano":
        number = config.examples or draws
        tokenizer = idlm.encoder.tokenizer
        training = nano_examples(islice(training_problems(config.seed), number), tokenizer)
        held_out = nano_examples(iter(held_out_problems(config.held_out)), tokenizer)
    else:
        rows = _jsonl(config, idlm) if config.source == "jsonl" else _self(config, idlm, folder)
        if len(rows) <= config.held_out:
            raise InputError(f"data.held_out is {config.held_out} but there are {len(rows)} rows; lower it or add rows")
        training, held_out = rows[: -config.held_out], rows[-config.held_out :]
    cut = sum(e.length > limit for e in training)
    return Corpus([fit(e, limit) for e in training], [fit(e, limit) for e in held_out], cut)


def fit(example: Example, limit: int) -> Example:
    """The rule for long texts: a prompt must leave room for one token; a response is cut at `limit` tokens in all.

    Raises:
        InputError: a prompt or response is empty, or the prompt leaves no room.
    """
    if not example.prompt:
        raise InputError(f"{example.row}: the prompt has no tokens; give one, or a model with a BOS token")
    if not example.response:
        raise InputError(f"{example.row}: the response has no tokens; remove the row or fill it")
    if len(example.prompt) >= limit:
        raise InputError(
            f"{example.row}: the prompt has {len(example.prompt)} tokens, the limit is {limit} for prompt and "
            "response; shorten it or raise data.max_length"
        )
    return Example(example.prompt, example.response[: limit - len(example.prompt)], example.row)


def nano_examples(problems: Iterator[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Chat prompt, worked solution and end token of each problem."""
    chosen = list(problems)
    encoder = PromptEncoder(tokenizer, "nano")
    prompts = encoder.chats([{"role": "user", "content": p.question}] for p in chosen)
    responses = tokenizer([p.solution for p in chosen], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [Example(p, r + end, f"problem {i}") for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a jsonl file, each with its name for error messages."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r} ({error}); give the path of a jsonl file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); write one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f'{path} line {number} is not an object; write {{"prompt": ..., "response": ...}}')
        yield f"{path} line {number}", row


def prompt_ids(row: dict[str, Any], name: str, idlm: Idlm) -> list[int]:
    """Token ids of a row's prompt: {"prompt": text or token ids} or {"messages": [...]} under the chat template."""
    if "messages" not in row and "prompt" not in row:
        raise InputError(f'{name} has no prompt; give it a "prompt" or "messages"')
    return _ids(row, "messages" if "messages" in row else "prompt", name, idlm)


def _ids(row: dict[str, Any], what: str, name: str, idlm: Idlm) -> list[int]:
    """Token ids of the "messages" of a row, or of its "prompt" or "response", a text or token ids."""
    value = row[what]
    try:
        if what == "messages":
            return idlm.encoder.chat(value)
        if isinstance(value, str):
            return idlm.encoder.text(value, what == "prompt", trusted=True) if value else []
        if isinstance(value, list):
            return check_tokens(value, idlm.vocab_size, what)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    raise InputError(f"{name}: the {what} is neither a text nor a list of token ids")


def _jsonl(config: DataConfig, idlm: Idlm) -> list[Example]:
    """Examples of a jsonl file; the end token is added to responses that are texts."""
    end = [] if idlm.tokenizer is None else [idlm.tokenizer.eos_token_id]
    examples = []
    for name, row in islice(read_jsonl(str(config.path)), config.examples):
        if not row.get("response"):
            raise InputError(f'{name} has no response; give it a non-empty "response"')
        response = _ids(row, "response", name, idlm)
        is_text = isinstance(row["response"], str)
        examples.append(Example(prompt_ids(row, name, idlm), response + (end if is_text else []), name))
    return examples


def _self(config: DataConfig, idlm: Idlm, folder: Path) -> list[Example]:
    """Examples that the model writes itself."""
    from idlm.training.distill import distill  # distill reads prompts with this module

    return distill(config, idlm, folder / "responses.jsonl")


def draw_order(lengths: Sequence[int], draws: int, batch: int, seed: int) -> list[int]:
    """Which example each draw takes: shuffled passes over all, sorted by length within windows of batches.

    Args:
        lengths: of the examples.
        draws: how many, a multiple of `batch`.
        batch: sequences of one optimiser step.
    """
    order: list[int] = []
    passes = 0
    while len(order) < draws:
        one_pass = list(range(len(lengths)))
        random.Random(f"{seed}/pass/{passes}").shuffle(one_pass)
        order += one_pass
        passes += 1
    sorted_order: list[int] = []
    for start in range(0, draws, WINDOW * batch):
        window = sorted(order[start : min(start + WINDOW * batch, draws)], key=lengths.__getitem__)
        batches = [window[i : i + batch] for i in range(0, len(window), batch)]
        random.Random(f"{seed}/window/{start}").shuffle(batches)
        sorted_order += [example for b in batches for example in b]
    return sorted_order


class Draws(Dataset[dict[str, Any]]):
    """The run as one list: item k is the k-th text drawn, with its phase. One step takes one batch of neighbours."""

    def __init__(self, examples: list[Example], draws: int, batch: int, seed: int, random_phase: bool) -> None:
        self.examples = examples
        self.seed = seed
        self.random_phase = random_phase
        self.order = draw_order([e.length for e in examples], draws, batch, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        phase = random.Random(f"{self.seed}/phase/{draw}").getrandbits(31) if self.random_phase else 0
        return {"text": self.examples[self.order[draw]], "example": self.order[draw], "phase": phase}


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Texts padded on the right with 0: tokens [B, L], prompt, length, phase and example number [B]."""
    texts: list[Example] = [item["text"] for item in items]
    rows = [torch.tensor(e.prompt + e.response) for e in texts]
    return {
        "tokens": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "prompt": torch.tensor([len(e.prompt) for e in texts]),
        "length": torch.tensor([e.length for e in texts]),
        "phase": torch.tensor([item["phase"] for item in items]),
        "example": torch.tensor([item["example"] for item in items]),
    }


def as_texts(batch: dict[str, Tensor]) -> Texts:
    """What the objective needs of a collated batch."""
    return Texts(batch["tokens"], batch["prompt"], batch["length"], batch["phase"])
