"""Rows of files become documents, with counts of what was cut, left out or split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.config import DataConfig
from idlm.training.conversations import NoAnswers, check_answers
from idlm.training.data import Example, fit, row_examples
from idlm.training.rows import read_row
from idlm.training.tables import Tables

SHOWN = 3
"""Reasons of bad rows that are shown."""


@dataclass
class Tally:
    """What happened to the rows.

    Attributes:
        documents: written.
        cut: documents cut at the length limit, or left out since they begin after it.
        bad: rows left out; `reasons` are the first.
        conversations: rows with several answers to train on.
        split: those of them that the chat template writes differently later; `first_split` names
            the first.
    """

    documents: int = 0
    cut: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    conversations: int = 0
    split: int = 0
    first_split: str = ""

    @property
    def notes(self) -> list[str]:
        """Lines for the log, of what the user should know."""
        notes = []
        if self.cut:
            notes.append(f"{self.cut} of {self.documents} documents were cut at the length limit")
        if self.bad:
            notes.append(f"{self.bad} bad rows were left out, the first: {'; '.join(self.reasons)}")
        if self.split:
            notes.append(
                f"the chat template writes {self.split} of {self.conversations} conversations "
                f"differently later ({self.first_split}): they are trained as one text an answer"
            )
        return notes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reader:
    """Reads rows for a model.

    Args:
        limit: the most tokens of a document.
    """

    def __init__(self, config: DataConfig, idlm: Idlm, limit: int) -> None:
        self.config, self.idlm, self.limit = config, idlm, limit
        self.tally = Tally()

    def read(self, tables: Tables) -> Iterator[list[Example]]:
        """The documents of each row that has any.

        Raises:
            InputError: a row is broken and `data.skip_bad_rows` is not set; or the chat template
                writes no answers.
        """
        for name, row in islice(tables.rows(), self.config.examples):
            try:
                found = self.documents(row, name)
            except NoAnswers:
                raise
            except InputError as error:
                if not self.config.skip_bad_rows:
                    raise
                self.tally.bad += 1
                self.tally.reasons += [str(error)][: SHOWN - len(self.tally.reasons)]
            else:
                yield found

    def documents(self, raw: str | dict[str, Any], name: str) -> list[Example]:
        """The documents of one row, cut at the limit."""
        row = read_row(raw, name)
        if row.messages is not None:
            check_answers(self.idlm.encoder, bool(row.tools))
        whole = row_examples(row, self.idlm, self.config.answers == "all")
        if any(self.idlm.mask_id in one.tokens for one in whole):
            raise InputError(
                f"{name}: it holds the MASK token {self.idlm.mask_id}, which stands for no text; "
                "take it out"
            )
        found = [fit(whole[0], self.limit)]
        # a conversation is cut where its limit is, be it one document or several
        found += [fit(one, self.limit) for one in whole[1:] if one.answers[0][0] < self.limit]
        self._count(whole, found)
        return found

    def _count(self, whole: list[Example], found: list[Example]) -> None:
        tally = self.tally
        tally.documents += len(found)
        tally.cut += len(whole) - len(found)
        tally.cut += sum(
            cut.length < one.answers[-1][1] for one, cut in zip(whole, found, strict=False)
        )
        tally.conversations += len(whole) > 1 or len(whole[0].answers) > 1
        tally.split += len(whole) > 1
        if len(whole) > 1 and not tally.first_split:
            tally.first_split = whole[0].row
