"""The progress of a run, and the sums for its reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from idlm.training.objective import Terms


class Rows(NamedTuple):
    """Supervised rows: MASK rows, and rows of the clean text."""

    noisy: int
    clean: int


@dataclass
class Sums:
    """Sums over the steps since the last report, over all ranks.

    Attributes:
        loss: of the steps' losses.
        noisy, clean: nats of CE_noisy and of CE_clean.
        soft: of the soft term, in nats ("tv": probability).
        noisy_rows: supervised MASK rows.
        clean_rows: supervised rows of the clean texts.
    """

    steps: int = 0
    loss: float = 0.0
    noisy: float = 0.0
    clean: float = 0.0
    soft: float = 0.0
    noisy_rows: int = 0
    clean_rows: int = 0

    def add(self, loss: float, terms: Terms, rows: Rows) -> None:
        self.steps += 1
        self.loss += loss
        self.noisy += float(terms.noisy)
        self.clean += float(terms.clean)
        self.soft += float(terms.soft)
        self.noisy_rows += rows.noisy
        self.clean_rows += rows.clean

    def means(self, soft: str) -> dict[str, float]:
        """The mean loss of a step and the mean terms of a row, by their names in the log; zeros are
        left out."""
        noisy_rows, clean_rows = max(self.noisy_rows, 1), max(self.clean_rows, 1)
        terms = {
            "ce_noisy": self.noisy / noisy_rows,
            "ce_clean": self.clean / clean_rows,
            soft: self.soft / noisy_rows,
        }
        return {"loss": self.loss / self.steps} | {k: mean for k, mean in terms.items() if mean}


@dataclass
class State:
    """What changes during a run, besides the weights and the optimizers.

    Attributes:
        step: optimizer steps taken.
        balance: CE_noisy / CE_clean of the last step: the weight of CE_clean if lambda is auto.
        unreported: sums since the last report.
    """

    step: int = 0
    balance: float = 1.0
    unreported: Sums = field(default_factory=Sums)
