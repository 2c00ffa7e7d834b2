"""Documents on disk: written once, one after the other, and read in any order through memory maps.

So data may be larger than memory. What stays in memory is a few bytes for each document.

store.json     {"counts": how many numbers each column has, ...}: written last
tokens         int32: the ids of all documents
stops          int64: where each document ends in `tokens`
answers        int32: first and stop of each answer, within its document
answer_stops   int64: where each document's answers end in `answers`
rows           int64: the index of each document's row; several documents may be of one row
names          UTF-8: the names of the documents for messages
name_stops     int64: where each name ends in `names`
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, overload

import torch
from torch import Tensor

from idlm.models.sources import read_json
from idlm.training.data import Example

META = "store.json"
COLUMNS: dict[str, tuple[str, torch.dtype]] = {
    "tokens": ("i", torch.int32),
    "stops": ("q", torch.int64),
    "answers": ("i", torch.int32),
    "answer_stops": ("q", torch.int64),
    "rows": ("q", torch.int64),
    "names": ("B", torch.uint8),
    "name_stops": ("q", torch.int64),
}
"""The type of each column, for `array` and for PyTorch."""


@contextmanager
def written(folder: Path) -> Iterator[Writer]:
    """A writer for a folder that is there when all is written: a kill or an error leaves none."""
    staging = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    with Writer(staging) as writer:
        yield writer
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


class Writer(AbstractContextManager["Writer"]):
    """Appends documents to a folder.

    Attributes:
        meta: what else `store.json` will hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, dict[str, Any]()
        self.counts = dict.fromkeys(COLUMNS, 0)
        self._exit = ExitStack()
        self._files: dict[str, BinaryIO] = {
            name: self._exit.enter_context(open(folder / name, "wb"))  # noqa: SIM115  # it closes it
            for name in COLUMNS
        }

    def add(self, example: Example, row: int) -> None:
        """Append one document of the row with this index."""
        self._put("tokens", example.tokens)
        self._put("stops", [self.counts["tokens"]])
        self._put("answers", [place for answer in example.answers for place in answer])
        self._put("answer_stops", [self.counts["answers"]])
        self._put("rows", [row])
        self._put("names", example.row.encode())
        self._put("name_stops", [self.counts["names"]])

    def __len__(self) -> int:
        return self.counts["stops"]

    def __exit__(self, *error: object) -> None:
        self._exit.close()
        if error == (None, None, None):
            text = json.dumps({**self.meta, "counts": self.counts}, indent=1)
            (self.folder / META).write_text(text, encoding="utf-8")

    def _put(self, name: str, values: Iterable[int]) -> None:
        column = array(COLUMNS[name][0], values)
        column.tofile(self._files[name])
        self.counts[name] += len(column)


class Documents(Sequence[Example], ABC):
    """Documents that are read when they are asked for."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """The tokens of each document."""

    @abstractmethod
    def document(self, at: int) -> Example:
        """The document with the number `at`, which is in range."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.document(at) for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.document(index % len(self))


class Store(Documents):
    """The documents of a folder."""

    def __init__(self, folder: Path) -> None:
        self.meta = read_json(folder / META)
        counts = self.meta["counts"]
        columns = {
            name: torch.from_file(str(folder / name), size=counts[name], dtype=dtype)
            if counts[name]
            else torch.empty(0, dtype=dtype)
            for name, (_, dtype) in COLUMNS.items()
        }
        self._tokens, self._answers, self._names = (
            columns[name] for name in ("tokens", "answers", "names")
        )
        self._stops, self._answer_stops, self._name_stops = (
            columns[name] for name in ("stops", "answer_stops", "name_stops")
        )
        self.rows = columns["rows"]

    def __len__(self) -> int:
        return len(self._stops)

    @property
    def lengths(self) -> Tensor:
        return self._stops.diff(prepend=torch.zeros(1, dtype=torch.int64))

    def document(self, at: int) -> Example:
        places = iter(_part(self._answers, self._answer_stops, at))
        return Example(
            tokens=_part(self._tokens, self._stops, at),
            answers=tuple(zip(places, places, strict=True)),
            row=bytes(_part(self._names, self._name_stops, at)).decode(),
        )


class Chosen(Documents):
    """Documents of a store by their indices, an integer tensor."""

    def __init__(self, store: Store, indices: Tensor) -> None:
        self.store, self.indices = store, indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> Tensor:
        return self.store.lengths[self.indices]

    def document(self, at: int) -> Example:
        return self.store.document(int(self.indices[at]))


def lengths(examples: Sequence[Example]) -> Tensor:
    """The tokens of each example, int64 [n]."""
    if isinstance(examples, Documents):
        return examples.lengths
    return torch.tensor([example.length for example in examples], dtype=torch.int64)


def _part(column: Tensor, stops: Tensor, at: int) -> list[int]:
    """The values of item `at` of a column."""
    first = int(stops[at - 1]) if at else 0
    return column[first : int(stops[at])].tolist()
