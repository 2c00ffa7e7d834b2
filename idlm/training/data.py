"""Rows become documents, and documents batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from idlm.chat_template import check_tokens
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.conversations import Ranges, generated, marked
from idlm.training.layout import Texts
from idlm.training.plan import Drawn
from idlm.training.rows import Row


@dataclass(frozen=True)
class Example:
    """One document.

    Attributes:
        tokens: its ids.
        answers: half-open ranges of the tokens that the model answered, in order, non-empty and
            disjoint; the first starts after the first token.
        row: names the document in messages.
    """

    tokens: list[int]
    answers: tuple[tuple[int, int], ...]
    row: str = ""

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)


def exchange(prompt: list[int], response: list[int], row: str = "") -> Example:
    """The example of a prompt and one response."""
    tokens = prompt + response
    return Example(tokens, ((len(prompt), len(tokens)),), row)


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
    """Cut the answers so that the example has at most `limit` tokens; what follows the last answer
    is cut too, since nothing learns from it.

    Raises:
        InputError: an answer is empty, nothing comes before the first one, or what comes before it
            leaves no room for a token.
    """
    row, (prompt, _) = example.row, example.answers[0]
    if not prompt:
        raise InputError(f"{row}: the prompt has no tokens; give one, or a model with a BOS token")
    if any(start == stop for start, stop in example.answers):
        raise InputError(f"{row}: the response has no tokens; remove the row or fill it")
    if prompt >= limit:
        raise InputError(
            f"{row}: the prompt has {prompt} tokens, "
            f"the limit is {limit} for prompt and response; shorten it or raise data.max_length"
        )
    answers = tuple((at, min(stop, limit)) for at, stop in example.answers if at < limit)
    return Example(example.tokens[: answers[-1][1]], answers, row)


def chat_examples(pairs: Iterable[tuple[str, str]], idlm: Idlm) -> list[Example]:
    """The chat prompt, the answer and the end token of each (question, answer)."""
    chosen = list(pairs)
    prompts = idlm.encoder.chats([{"role": "user", "content": q}] for q, _ in chosen)
    tokenizer, end = idlm.encoder.tokenizer, _end(idlm, chat=True)
    answers = tokenizer([answer for _, answer in chosen], add_special_tokens=False)["input_ids"]
    rows = zip(prompts, answers, strict=True)
    return [exchange(p, a + end, f"problem {i}") for i, (p, a) in enumerate(rows)]


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
            return exchange(ids[:1], ids[1:] + _end_of(row.text, idlm, False), row.name)
        if not row.responds:
            raise InputError('it has no response; give it a non-empty "response"')
        if row.messages is not None and not row.response:
            prompt, answer = idlm.encoder.exchange(row.messages, row.tools)
            return exchange(prompt, _ended(answer, idlm), row.name)
        prompt, response = _prompt(row, idlm), row.response or []
        if isinstance(response, str) and isinstance(row.prompt, str):
            answer = idlm.encoder.continuation(row.prompt, response)
        elif isinstance(response, str):
            answer = idlm.encoder.inner(response)
        else:
            answer = check_tokens(response, idlm.vocab_size, "response")
            _check_written(row, answer, idlm)
        return exchange(prompt, answer + _end_of(response, idlm, False), row.name)


def row_examples(row: Row, idlm: Idlm, every: bool) -> list[Example]:
    """The document of a row. With `every` it holds all answers of the messages; or each answer has
    a document, if the template writes earlier turns differently later.

    Raises:
        InputError: as `row_example`.
    """
    messages = row.messages or []
    answers = [at for at, one in enumerate(messages) if at and one["role"] == "assistant"]
    if not every or row.response or not answers:
        return [row_example(row, idlm)]
    each = [row_example(replace(row, messages=messages[: at + 1]), idlm) for at in answers]
    last = each[-1]
    if any(last.tokens[: one.length] != one.tokens for one in each):
        return each
    return [replace(last, answers=_generated(row, last, [one.answers[0] for one in each], idlm))]


def _generated(row: Row, whole: Example, answers: list[tuple[int, int]], idlm: Idlm) -> Ranges:
    """The parts of the answers that the template's generation marks say the model wrote. All of
    them if there are no marks, or if the ids as decoded are not those of the rendered text: a word
    may join the end of the prompt, and a special string in a message is text."""
    with named(row.name):
        found = generated(idlm.encoder, row.messages or [], row.tools)
        if found is None or found[0][: whole.length] != whole.tokens:
            return tuple(answers)
        if not (within := marked(answers, found[1])):
            raise InputError("the chat template marks no token of its answers as generated")
    return within


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


class Draw(NamedTuple):
    """A text of the run: the index of the example, the example, and the phase of its blocks."""

    example_index: int
    example: Example
    phase: int


class Batch(NamedTuple):
    """Texts for one forward, and the indices of their examples, row by row."""

    texts: Texts
    indices: list[int]


@dataclass(frozen=True)
class Phased:
    """Documents with the phases of their draws.

    The phase is a function of the seed and the number of the draw alone, whatever batch that is in.
    """

    examples: Sequence[Example]
    seed: int
    random_phase: bool

    def batch(self, rows: Iterable[Iterable[Drawn]]) -> Batch:
        """Rows of draws as texts."""
        return collate([[self.draw(one) for one in row] for row in rows])

    def draw(self, one: Drawn) -> Draw:
        """The text of a draw."""
        phase = 0
        if self.random_phase:
            phase = random.Random(f"{self.seed}/phase/{one.draw}").getrandbits(31)
        return Draw(one.document, self.examples[one.document], phase)


def collate(rows: list[list[Draw]]) -> Batch:
    """Pack the documents of each row one after the other, and pad the rows on the right."""
    packed = [_packed(row) for row in rows]
    padding = (0, -1, 0, -1, 0)  # of the tensors of `Texts`
    texts = [
        torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)
        for parts, value in zip(zip(*packed, strict=True), padding, strict=True)
    ]
    return Batch(Texts(*texts), [draw.example_index for row in rows for draw in row])


def _packed(row: list[Draw]) -> Texts:
    """The columns of the documents of one row, [L] each."""
    examples = [draw.example for draw in row]
    length = torch.tensor([example.length for example in examples])
    start = length.cumsum(0) - length
    document = torch.arange(len(row)).repeat_interleave(length)
    answer = torch.full_like(document, -1)
    ranges = [
        (at + first, at + stop)
        for at, example in zip(start.tolist(), examples, strict=True)
        for first, stop in example.answers
    ]
    for index, (first, stop) in enumerate(ranges):
        answer[first:stop] = index
    return Texts(
        tokens=torch.tensor([token for example in examples for token in example.tokens]),
        document=document,
        position=torch.arange(len(document)) - start[document],
        answer=answer,
        phase=torch.tensor([draw.phase for draw in row])[document],
    )
