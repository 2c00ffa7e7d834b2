"""Prompts that a model answers: rows, encoded and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any

from idlm.chat_template import check_ids
from idlm.errors import InputError
from idlm.messages import as_user
from idlm.models.idlm_model import Idlm
from idlm.training.data import exchange, fit, ids_of, named
from idlm.training.rows import read_fields, read_row
from idlm.training.tables import Named


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt; `shown` are the fields that a row shows of it: `messages` and `tools`,
    or `prompt_text`."""

    ids: list[int]
    shown: dict[str, Any]


@dataclass(frozen=True)
class Encoding:
    """How rows become prompts of a model.

    Attributes:
        chat: a text becomes a message of the user, if the model has a chat template.
        column: the field that holds the prompt; None: the forms of `idlm.training.rows`.
        limit: the most tokens of a prompt and its response; None: the model's context.
    """

    idlm: Idlm
    chat: bool = False
    column: str | None = None
    limit: int | None = None

    @property
    def length(self) -> int:
        """The most tokens of a prompt and its response."""
        return min(self.limit or self.idlm.context, self.idlm.context)

    def prompt(self, row: str | dict[str, Any], name: str) -> Prompt:
        """The prompt of a row. An answer at the end of messages is left out.

        Raises:
            InputError: the row has no prompt, or it cannot be encoded, is too long or holds MASK.
        """
        prompt = self._encode(read_fields(row, name), name)
        fit(exchange(prompt.ids, [0], name), self.length)
        with named(name):
            check_ids(prompt.ids, self.idlm)
        return prompt

    def _encode(self, fields: dict[str, Any], name: str) -> Prompt:
        if self.column is not None:
            if fields.get(self.column) is None:
                raise InputError(
                    f"{name} has no {self.column!r}; it has {', '.join(fields) or 'no field'}"
                )
            fields = {"prompt": fields[self.column], "tools": fields.get("tools")}
        row = read_row(fields, name)
        if row.text is not None:
            raise InputError(
                f'{name} is a text without a prompt; give it a "prompt" or "messages", '
                "or name the column that holds it"
            )
        with named(name):
            messages, encoder = row.question, self.idlm.encoder
            if messages is None and isinstance(row.prompt, str):
                messages = as_user(row.prompt, self.chat, encoder.has_template)
            if messages is not None:
                shown = {"messages": messages} | ({"tools": row.tools} if row.tools else {})
                return Prompt(encoder.chat(messages, row.tools), shown)
            shown = {"prompt_text": row.prompt} if isinstance(row.prompt, str) else {}
            return Prompt(ids_of(row.prompt or "", "prompt", self.idlm), shown)


@dataclass
class Prompts:
    """Prompts that can be read again and again, one at a time.

    Attributes:
        rows: reads the rows anew.
        number: the most prompts; None: all.
        dedup: leave out prompts that were there before.
        skip_bad: leave out rows that raise an InputError.
        duplicates, bad: how many the last pass left out.
    """

    rows: Callable[[], Iterable[Named]]
    encoding: Encoding
    number: int | None = None
    dedup: bool = True
    skip_bad: bool = False
    duplicates: int = field(default=0, init=False)
    bad: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Prompt]:
        self.duplicates = self.bad = 0
        return islice(self._chosen(), self.number)

    def _chosen(self) -> Iterator[Prompt]:
        seen: set[bytes] = set()
        for name, row in self.rows():
            try:
                prompt = self.encoding.prompt(row, name)
            except InputError:
                if not self.skip_bad:
                    raise
                self.bad += 1
                continue
            digest = blake2b(repr(prompt.ids).encode(), digest_size=16).digest()
            if self.dedup and digest in seen:
                self.duplicates += 1
                continue
            seen.add(digest)
            yield prompt
