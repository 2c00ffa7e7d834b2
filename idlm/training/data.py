"""Examples, their order, and batches.

The order and every random number are functions of (seed, index of the draw) alone. So a resumed
run, or one with another split into batches, has the same texts with the same phases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from idlm.chat_template import check_tokens
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.config import DataConfig
from idlm.training.objective import Texts

WINDOW = 16
"""Batches in which texts are sorted by length: enough to save padding, few enough to stay shuffled.
"""


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its response, both non-empty; `row` names it in messages."""

    prompt: list[int]
    response: list[int]
    row: str = ""

    @property
    def length(self) -> int:
        """Tokens of the prompt and the response."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Source:
    """Texts that a package provides: pairs of a question and an answer, and a tokenizer.

    Attributes:
        training: the endless stream of pairs of a seed.
        held_out: the first n pairs that no stream contains.
        tokenizer: for a new model.
    """

    training: Callable[[int], Iterator[tuple[str, str]]]
    held_out: Callable[[int], list[tuple[str, str]]]
    tokenizer: Callable[[], PreTrainedTokenizerBase]


SOURCES: dict[str, Source] = {}
"""By their names in `data.source`, `data.prompts` and `model.tokenizer`.

A package registers its source when it is imported, as `idlm.nano.source` does; training imports no
source.
"""


def fit(example: Example, limit: int) -> Example:
    """Cut the response so that the example has at most `limit` tokens.

    Raises:
        InputError: the prompt or the response is empty, or the prompt leaves no room for a token.
    """
    if not example.prompt:
        raise InputError(
            f"{example.row}: the prompt has no tokens; give one, or a model with a BOS token"
        )
    if not example.response:
        raise InputError(f"{example.row}: the response has no tokens; remove the row or fill it")
    if len(example.prompt) >= limit:
        raise InputError(
            f"{example.row}: the prompt has {len(example.prompt)} tokens, "
            f"the limit is {limit} for prompt and response; shorten it or raise data.max_length"
        )
    return Example(example.prompt, example.response[: limit - len(example.prompt)], example.row)


def chat_examples(pairs: Iterable[tuple[str, str]], idlm: Idlm) -> list[Example]:
    """The chat prompt, the answer and the end token of each (question, answer)."""
    chosen = list(pairs)
    prompts = idlm.encoder.chats([{"role": "user", "content": q}] for q, _ in chosen)
    tokenizer, end = idlm.encoder.tokenizer, _end(idlm, chat=True)
    answers = tokenizer([answer for _, answer in chosen], add_special_tokens=False)["input_ids"]
    rows = zip(prompts, answers, strict=True)
    return [Example(p, a + end, f"problem {i}") for i, (p, a) in enumerate(rows)]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a jsonl file, each with its name for error messages.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {str(path)!r} ({error}); give the path of a jsonl file"
        ) from None
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} line {at} is not JSON ({error}); write one object per line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f'{path} line {at} is not an object; write {{"prompt": ..., "response": ...}}'
            )
        yield f"{path} line {at}", row


def prompt_ids(row: dict[str, Any], name: str, idlm: Idlm) -> list[int]:
    """Token ids of a row's prompt: {"prompt": text or token ids}, or {"messages": [...]} by the
    chat template."""
    if "messages" not in row and "prompt" not in row:
        raise InputError(f'{name} has no prompt; give it a "prompt" or "messages"')
    return _ids(row, "messages" if "messages" in row else "prompt", name, idlm)


def _ids(row: dict[str, Any], what: str, name: str, idlm: Idlm) -> list[int]:
    """Token ids of a row's "messages", or of its "prompt" or "response", each a text or token
    ids."""
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


def _end(idlm: Idlm, chat: bool) -> list[int]:
    """What follows a response: the token that ends it when the model decodes, if it has one."""
    end = idlm.end_of(chat)
    return [] if end is None else [end]


def jsonl_examples(config: DataConfig, idlm: Idlm) -> list[Example]:
    """The examples of a jsonl file; responses that are texts get the end token."""
    examples = []
    for name, row in islice(read_jsonl(str(config.path)), config.examples):
        if not row.get("response"):
            raise InputError(f'{name} has no response; give it a non-empty "response"')
        response = _ids(row, "response", name, idlm)
        if isinstance(row["response"], str):
            response = response + _end(idlm, chat="messages" in row)
        examples.append(Example(prompt_ids(row, name, idlm), response, name))
    return examples


def draw_order(lengths: Sequence[int], draws: int, batch: int, seed: int) -> list[int]:
    """The example of each draw: shuffled passes over all, sorted by length in windows of batches.

    Args:
        lengths: of the examples.
        draws: how many, a multiple of `batch`.
        batch: sequences of one optimizer step.
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


class Draw(NamedTuple):
    """A text of the run: the index of the example, the example, and the phase of its blocks."""

    example_index: int
    example: Example
    phase: int


class Batch(NamedTuple):
    """Texts for one forward, padded on the right with 0, and the indices of their examples."""

    texts: Texts
    indices: list[int]


class TrainOrder:
    """All texts of a run in order: draw k is example `order[k]` with the phase of k."""

    def __init__(
        self, examples: list[Example], order: list[int], seed: int, random_phase: bool
    ) -> None:
        self.examples = examples
        self.order = order
        self.seed = seed
        self.random_phase = random_phase

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, draw: int) -> Draw:
        phase = 0
        if self.random_phase:
            phase = random.Random(f"{self.seed}/phase/{draw}").getrandbits(31)
        return Draw(self.order[draw], self.examples[self.order[draw]], phase)

    def batch(self, index: int, size: int) -> Batch:
        """Batch `index` of the run cut into batches of `size`; the last one may be shorter."""
        draws = range(index * size, min((index + 1) * size, len(self)))
        return collate([self[k] for k in draws])


def collate(draws: list[Draw]) -> Batch:
    """Pad the texts of the draws to one batch."""
    examples = [draw.example for draw in draws]
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(e.prompt + e.response) for e in examples], batch_first=True
    )
    prompt = torch.tensor([len(e.prompt) for e in examples])
    length = torch.tensor([e.length for e in examples])
    phase = torch.tensor([draw.phase for draw in draws])
    return Batch(Texts(tokens, prompt, length, phase), [draw.example_index for draw in draws])
