"""The progress of a run, and the sums for its reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from idlm.training.objective import Terms
from idlm.training.plan import Step


class Rows(NamedTuple):
    """Supervised rows: MASK rows, and rows of the clean text."""

    noisy: int
    clean: int


@dataclass
class Sums:
    """Sums over the steps since the last report, over all ranks.

    Attributes:
        loss: of the steps' losses.
        ce, kl, clean: nats of CE_noisy, KL and CE_clean.
        tv: of TV, probability.
        noisy_rows: supervised MASK rows.
        clean_rows: supervised rows of the clean texts.
        tokens, padded: tokens of the texts, without and with padding.
    """

    steps: int = 0
    loss: float = 0.0
    ce: float = 0.0
    kl: float = 0.0
    tv: float = 0.0
    clean: float = 0.0
    noisy_rows: int = 0
    clean_rows: int = 0
    tokens: int = 0
    padded: int = 0

    def add(self, loss: float, terms: Terms, rows: Rows) -> None:
        self.steps += 1
        self.loss += loss
        self.ce += float(terms.ce)
        self.kl += float(terms.kl)
        self.tv += float(terms.tv)
        self.clean += float(terms.clean)
        self.noisy_rows += rows.noisy
        self.clean_rows += rows.clean

    def means(self) -> dict[str, float]:
        """The mean loss of a step and the mean terms of a row, by their names in the log; zeros are
        left out."""
        noisy_rows, clean_rows = max(self.noisy_rows, 1), max(self.clean_rows, 1)
        terms = {
            "ce_noisy": self.ce / noisy_rows,
            "ce_clean": self.clean / clean_rows,
            "kl": self.kl / noisy_rows,
            "tv": self.tv / noisy_rows,
        }
        shares = {"padding": 1 - self.tokens / max(self.padded, 1)}
        means = {k: mean for k, mean in terms.items() if mean}
        return {"loss": self.loss / self.steps} | means | shares


@dataclass
class State:
    """What changes during a run, besides the weights and the optimizers.

    Attributes:
        step: optimizer steps taken. The next texts follow from it (`idlm.training.plan`).
        documents, tokens: trained on, over all ranks.
        balance: CE_noisy / CE_clean of the last step: the weight of CE_clean if lambda is auto.
        acceptance: sum min(p, q) of a MASK row in the last step with a soft term, which `lk` needs.
        best, best_step: the best score of a held-out measurement, and the step that it was after.
        unreported: sums since the last report.
    """

    step: int = 0
    documents: int = 0
    tokens: int = 0
    best: float | None = None
    best_step: int | None = None
    balance: float = 1.0
    acceptance: float = 0.0
    unreported: Sums = field(default_factory=Sums)

    def count(self, step: Step) -> None:
        """Count the texts of a step."""
        self.documents += step.documents
        self.tokens += step.tokens
        self.unreported.tokens += step.tokens
        self.unreported.padded += step.padded

    def improves(self, score: float) -> bool:
        """Whether a score is the best so far, which is then kept."""
        better = math.isfinite(score) and (self.best is None or score > self.best)
        if better:
            self.best, self.best_step = score, self.step
        return better
