"""Examples, their order, and batches.

The order and every random number are functions of (seed, index of the draw) alone. So a resumed
run, or one with another split into batches, has the same texts with the same phases.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from idlm.chat_template import check_tokens
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.config import DataConfig
from idlm.training.objective import Texts
from idlm.training.rows import Row, read_row
from idlm.training.tables import Tables

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


def _prompt(row: Row, idlm: Idlm) -> list[int]:
    if row.messages is not None:
        return idlm.encoder.chat(row.question or [], row.tools)
    return ids_of(row.prompt or "", "prompt", idlm)


def ids_of(value: str | list[Any], what: str, idlm: Idlm) -> list[int]:
    """The ids of a text, or ids that are checked against the vocabulary; `what` names them."""
    if isinstance(value, str):
        return idlm.encoder.text(value, trusted=True) if value else []
    return check_tokens(value, idlm.vocab_size, what)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begins the message of an InputError with the name of its row."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def row_example(row: Row, idlm: Idlm) -> Example:
    """The example of a row. A response that is a text gets the end token.

    Raises:
        InputError: the row has no response, or it cannot be encoded.
    """
    with named(row.name):
        if row.text is not None:
            ids = ids_of(row.text, "text", idlm)
            return Example(ids[:1], ids[1:] + _end_of(row.text, idlm, False), row.name)
        if not row.response and not row.answered:
            raise InputError('it has no response; give it a non-empty "response"')
        if row.messages is not None and not row.response:
            prompt, answer = idlm.encoder.exchange(row.messages, row.tools)
            return Example(prompt, _ended(answer, idlm), row.name)
        prompt, response = _prompt(row, idlm), row.response or []
        if isinstance(response, str) and isinstance(row.prompt, str):
            answer = idlm.encoder.continuation(row.prompt, response)
        elif isinstance(response, str):
            answer = idlm.encoder.inner(response)
        else:
            answer = check_tokens(response, idlm.vocab_size, "response")
            _check_written(row, answer, idlm)
        return Example(prompt, answer + _end_of(response, idlm, False), row.name)


def row_examples(row: Row, idlm: Idlm, every: bool) -> list[Example]:
    """The example of a row's answer; with `every`, one for each answer in its messages.

    Each answer comes after what the template writes before it, as when the model decodes. So a
    template may change earlier turns, and it needs no marks of what the assistant wrote.

    Raises:
        InputError: as `row_example`.
    """
    messages = row.messages or []
    answers = [at for at, one in enumerate(messages) if at and one["role"] == "assistant"]
    if not every or row.response or not answers:
        return [row_example(row, idlm)]
    return [row_example(replace(row, messages=messages[: at + 1]), idlm) for at in answers]


def _check_written(row: Row, answer: list[int], idlm: Idlm) -> None:
    """Refuse ids of another model's tokenizer, which the text beside them gives away. A stop string
    is not in the text."""
    if row.written is None or idlm.tokenizer is None:
        return
    text = str(idlm.encoder.tokenizer.decode(answer, skip_special_tokens=True))
    if not text.startswith(row.written):
        raise InputError(
            f"the response's ids are {text[:40]!r}, and the text beside them is "
            f"{row.written[:40]!r}: they are of another tokenizer; distill with this model"
        )


def _end_of(value: object, idlm: Idlm, chat: bool) -> list[int]:
    return _end(idlm, chat) if isinstance(value, str) else []


def _ended(answer: list[int], idlm: Idlm) -> list[int]:
    """An answer of the chat template up to its end token: a template may write a line break after
    it. Without an end token it gets one."""
    ends = idlm.eos_ids.union(_end(idlm, chat=True))
    last = max((at for at, token in enumerate(answer) if token in ends), default=None)
    return answer + _end(idlm, chat=True) if last is None else answer[: last + 1]


def _end(idlm: Idlm, chat: bool) -> list[int]:
    """What follows a response: the token that ends it when the model decodes, if it has one."""
    end = idlm.end_of(chat)
    return [] if end is None else [end]


def jsonl_examples(config: DataConfig, idlm: Idlm, limit: int) -> tuple[list[Example], int]:
    """The examples of `data.path`, rows in the forms of `idlm.training.rows`; and how many rows
    `data.skip_bad_rows` left out.

    Args:
        limit: the most tokens of an example, which a prompt must leave room in.
    """
    paths = (config.path,) if isinstance(config.path, str) else config.path or ()
    examples, bad = list[Example](), 0
    for name, row in islice(Tables(paths).rows(), config.examples):
        try:
            of_row = row_examples(read_row(row, name), idlm, config.answers == "all")
            for example in of_row:
                fit(example, limit)
        except InputError:
            if not config.skip_bad_rows:
                raise
            bad += 1
        else:
            examples += of_row
    return examples, bad


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
        order += pass_order(len(lengths), passes, seed)
        passes += 1
    sorted_order: list[int] = []
    for start in range(0, draws, WINDOW * batch):
        window = sorted(order[start : min(start + WINDOW * batch, draws)], key=lengths.__getitem__)
        batches = [window[i : i + batch] for i in range(0, len(window), batch)]
        random.Random(f"{seed}/window/{start}").shuffle(batches)
        sorted_order += [example for b in batches for example in b]
    return sorted_order


def pass_order(count: int, number: int, seed: int) -> list[int]:
    """The shuffled indices of pass `number` over `count` examples."""
    order = list(range(count))
    random.Random(f"{seed}/pass/{number}").shuffle(order)
    return order


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
