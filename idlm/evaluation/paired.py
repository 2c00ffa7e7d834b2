"""Two runs of `idlm eval` on the same items: AR and ISD, two models, two servers.

The items are paired, so the difference is known far better than either figure.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from idlm.errors import InputError
from idlm.inputs import read_lines
from idlm.models.sources import read_json

LEVEL = 0.95
POWER = 0.8
POINT = 0.01
"""The difference that `items_for_a_point` is about."""
DRAWS = 10_000
"""Of the bootstrap."""


def compare(
    first: Path, second: Path, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compare all suites that both folders of `idlm eval` have; `advance` is called after each.

    Raises:
        InputError: a folder is no result, or they have no suite or not the same items in common.
    """
    report = {}
    for name in common_suites(first, second):
        report[name] = _compare_suite(name, first, second)
        advance()
    return report


def about(folder: Path) -> dict[str, Any]:
    """The settings, versions and machine of a folder of `idlm eval`."""
    results, run = read_json(folder / "results.json"), folder / "run.json"
    machine = read_json(run).get("environment") if run.exists() else None
    parts = {name: results.get(name) for name in ("settings", "versions")}
    return {"folder": folder.name, **parts, "environment": machine}


def common_suites(first: Path, second: Path) -> list[str]:
    """The suites that both folders have.

    Raises:
        InputError: a folder is no result, or there is none.
    """
    names = [_suites(folder) for folder in (first, second)]
    both = [name for name in names[0] if name in names[1]]
    if not both:
        raise InputError(
            f"{str(first)!r} ({', '.join(names[0])}) and {str(second)!r} ({', '.join(names[1])}) "
            "have no suite in common; run the same suite with 'idlm eval' twice"
        )
    return both


def _suites(folder: Path) -> list[str]:
    if not (folder / "results.json").exists():
        raise InputError(f"{str(folder)!r} holds no results.json; give a folder of 'idlm eval'")
    return list(read_json(folder / "results.json")["suites"])


def _compare_suite(name: str, first: Path, second: Path) -> dict[str, Any]:
    left, right = (_samples(folder / f"{name}.samples.jsonl") for folder in (first, second))
    if left.keys() != right.keys() or any(
        left[key].get("target") != right[key].get("target") for key in left
    ):
        raise InputError(
            f"suite {name}: the two folders have other items ({len(left)} and {len(right)}); "
            "use the same --data, --limit and form of the suite"
        )
    pairs = [(left[key], right[key]) for key in left]
    same = [_answer(a) == _answer(b) for a, b in pairs]
    return {
        "items": len({key[:2] for key in left}),
        "same_answers": fmean(same),
        "metrics": {
            f"{metric},{kind}": paired(*_values(pairs, metric, kind))
            for kind in dict.fromkeys(key[2] for key in left)
            for metric in pairs[0][0].get("metrics", {})
        },
    }


def _samples(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    lines = [json.loads(line) for line in read_lines(file) if line]
    return {
        (line.get("task", ""), line.get("doc_id", line.get("id")), line.get("filter", "")): line
        for line in lines
    }


def _answer(sample: Mapping[str, Any]) -> Any:
    """What the model answered: of a chat its own turns."""
    return sample.get("resps", sample.get("messages"))


def _values(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], metric: str, kind: str
) -> tuple[list[float], list[float]]:
    chosen = [pair for pair in pairs if pair[0]["filter"] == kind]
    return [_mean(a["metrics"][metric]) for a, _ in chosen], [
        _mean(b["metrics"][metric]) for _, b in chosen
    ]


def _mean(value: Any) -> float:
    """The figure of an item; of several instructions it is their mean."""
    return fmean(map(float, value)) if isinstance(value, list) else float(value)


def paired(left: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """Figures of the same items under two ways of decoding: `right` less `left`.

    For figures of 0 and 1 the p-value is McNemar's, exact; the interval is a bootstrap over items.
    """
    differences = [b - a for a, b in zip(left, right, strict=True)]
    report: dict[str, Any] = {
        "first": fmean(left),
        "second": fmean(right),
        "difference": fmean(differences),
        "interval": bootstrap(differences),
        "items_for_a_point": items_needed(differences),
    }
    if set(left) | set(right) <= {0.0, 1.0}:
        lost, won = differences.count(-1.0), differences.count(1.0)
        report |= {"only_first": lost, "only_second": won, "mcnemar": mcnemar(lost, won)}
    return report


def mcnemar(lost: int, won: int) -> float:
    """The exact p-value, two-sided, that items on which two differ go either way alike.

    Under that law the smaller count is binomial(lost + won, 1/2).
    """
    count, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(count, at) for at in range(fewer + 1))
    return min(1.0, tail / 2 ** (count - 1)) if count else 1.0


def bootstrap(differences: Sequence[float]) -> list[float]:
    """The percentile interval of the mean, by drawing items with replacement."""
    draw = random.Random(0)
    count = len(differences)
    if not any(differences):
        return [0.0, 0.0]
    means = sorted(fmean(draw.choices(differences, k=count)) for _ in range(DRAWS))
    tail = (1 - LEVEL) / 2
    return [means[int(tail * DRAWS)], means[min(DRAWS - 1, int((1 - tail) * DRAWS))]]


def items_needed(differences: Sequence[float], size: float = POINT) -> int | None:
    """How many items show a mean difference of `size` at the level 95 % with power 80 %.

    From the spread of the differences; None where no item differs, so that it is not known.
    """
    mean = fmean(differences)
    spread = fmean((one - mean) ** 2 for one in differences)
    if spread == 0:
        return None
    normal = NormalDist()
    width = normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)
    return math.ceil(width**2 * spread / size**2)
