"""Reads what evaluations and benchmarks write into figures of a few kinds, each with its source.

A shape of file has a reader in `READERS`. docs/evaluation.md names the commands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from idlm.errors import InputError

Json = Mapping[str, Any]
MACHINE = ("cpu", "cores", "threads", "gpu", "cuda", "system", "instructions")
VERSIONS = ("idlm", "torch", "transformers", "python", "lm_eval", "peers", "versions")
RECORD = ("command", "date", "commit")
"""Keys of an environment that are no settings."""
KINDS = "idlm eval, bench, accept or compare, or of benchmarks/ with such figures"


class Interval(NamedTuple):
    """A figure with the bounds of its spread: 95 % of a mean, or the range over rounds."""

    value: float
    low: float
    high: float


class Source(NamedTuple):
    """Where figures come from; `about` is all that the file says of settings and machine."""

    number: int
    name: str
    kind: str
    about: Json


class Quality(NamedTuple):
    """A figure of quality of a method; `what` is the suite and its figure."""

    source: int
    method: str
    what: str
    figure: Interval
    items: int


class Drafting(NamedTuple):
    """How far drafts are accepted.

    Attributes:
        stride: N, or the block of a baseline; None: not recorded.
        measure: what `by_depth` is: "acceptance", or "alpha" and its definition of p.
    """

    source: int
    method: str
    stride: int | None
    tpf: float | None
    measure: str
    by_depth: tuple[float | None, ...]


class Speed(NamedTuple):
    """Tokens per second, and those of one request, with `concurrency` requests at once."""

    source: int
    method: str
    concurrency: int
    rate: Interval
    each: float
    over_ar: float | None


class Compute(NamedTuple):
    """Rows for each token: the arithmetic over that of AR."""

    source: int
    method: str
    rows: float
    tpf: float | None


class Tradeoff(NamedTuple):
    """Quality against tokens per second; `how` says in which run the speed was measured."""

    source: int
    method: str
    what: str
    how: str
    quality: Interval
    rate: float


class Difference(NamedTuple):
    """Two runs on the same items: the second less the first."""

    source: int
    what: str
    first: float
    second: float
    difference: Interval
    p_value: float | None
    same_answers: float


@dataclass
class Results:
    """All figures that were read, by kind; `left_out` are files of a folder without any."""

    sources: list[Source] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    drafting: list[Drafting] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    compute: list[Compute] = field(default_factory=list)
    tradeoffs: list[Tradeoff] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, report: Json) -> bool:
        """Add the figures of a file; whether it has a known shape.

        Raises:
            InputError: it has, and its figures are broken.
        """
        for kind, fits, read in READERS:
            if fits(report):
                self.sources.append(Source(len(self.sources) + 1, name, kind, about(report)))
                try:
                    read(report, self.sources[-1].number, self)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise InputError(
                        f"{name!r} looks like a file of {kind}, but its figures do not "
                        f"({type(error).__name__}: {error}); give the file as it was written"
                    ) from None
                return True
        return False


def about(report: Json) -> Json:
    """What a file says of settings, machine and versions."""
    known = ("environment", "settings", "versions", "first", "second")
    parts: dict[str, Any] = {
        key: value for key, value in report.items() if isinstance(value, str | int | float)
    }
    for key in known:
        found = report.get(key)
        if isinstance(found, dict) and (
            key in ("environment", "settings")
            or (key == "versions" and all(isinstance(one, str) for one in found.values()))
        ):
            parts |= found
        elif found is not None:
            parts[key] = found
    return parts


def read(paths: Sequence[Path]) -> Results:
    """The figures of files and of folders with such files.

    Raises:
        InputError: a path has no figures of a known shape.
    """
    results = Results()
    for path in paths:
        before = len(results.sources)
        for file in _files(path):
            if not results.add(_name(file), _load(file)):
                results.left_out.append(file.name)
        if len(results.sources) == before:
            raise InputError(f"{str(path)!r} has no figures of a known shape; give JSON of {KINDS}")
    return results


def _files(path: Path) -> list[Path]:
    """The files of figures: of a folder of `idlm eval` its results alone."""
    if not path.is_dir():
        return [path]
    if (path / "results.json").exists():
        return [path / "results.json"]
    return sorted({*path.glob("*.json"), *path.rglob("results.json")})


def _name(file: Path) -> str:
    return str(file.parent) if file.name == "results.json" else file.name


def _load(file: Path) -> Json:
    """The object of a file; with that of `run.json` beside results of `idlm eval`.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(file)!r} ({error}); give JSON of {KINDS}") from None
    if not isinstance(report, dict):
        report = {}
    run = file.with_name("run.json")
    if file.name == "results.json" and run.exists():
        beside = _load(run)
        report = {**report, "runs_of_suites": beside.get("suites")}
        report["environment"] = beside.get("environment", {})
    return report


def wilson(right: float, count: int, z: float = 1.96) -> Interval:
    """A share with its 95 % interval."""
    share, scale = right / count, z * z / count
    middle = (share + scale / 2) / (1 + scale)
    half = z * math.sqrt(share * (1 - share) / count + scale / (4 * count)) / (1 + scale)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def mean_interval(value: float, stderr: float | None, count: int) -> Interval:
    """A mean with its 95 % interval: Wilson's where the values are 0 and 1, which their standard
    error shows."""
    if count > 1 and stderr is not None:
        spread = stderr**2 * (count - 1)
        if not math.isclose(spread, value * (1 - value), rel_tol=1e-6, abs_tol=1e-12):
            return Interval(value, value - 1.96 * stderr, value + 1.96 * stderr)
    return wilson(value * count, count)


def _read_eval(report: Json, source: int, into: Results) -> None:
    settings = report["settings"]
    parts = [settings.get("model"), settings.get("adapter"), settings.get("url")]
    if "stride" in settings:
        parts.append(f"N={settings['stride']} {settings['branches']}")
    method, runs = " ".join(str(part) for part in parts if part), report.get("runs_of_suites") or {}
    for suite, found in report["suites"].items():
        run = runs.get(suite, {})
        if run.get("tpf"):
            row = Drafting(source, f"{method}, {suite}", settings.get("stride"), run["tpf"], "", ())
            into.drafting.append(row)
        for name, one in found.get("metrics", {}).items():
            what = f"{suite} {name.removesuffix(',none')}"
            figure = mean_interval(one["value"], one["stderr"], one["n"])
            into.quality.append(Quality(source, method, what, figure, one["n"]))
            if run.get("new_tokens") and run["new_tokens"] == run["tokens"]:
                rate, how = run["tokens"] / run["seconds"], "of the evaluation"
                into.tradeoffs.append(Tradeoff(source, method, what, how, figure, rate))


def _read_bench(report: Json, source: int, into: Results) -> None:
    stride = report.get("environment", {}).get("stride")
    drafted = set()
    for row in report["rows"]:
        method, rate = _method(row), _spread(row)
        count = row["concurrency"]
        tpot = row.get("tpot_ms")
        tpot = tpot.get("p50") if isinstance(tpot, dict) else tpot
        each = 1e3 / tpot if tpot else rate.value / count
        over = row.get("speedup_over_ar")
        into.speed.append(Speed(source, method, count, rate, each, over))
        if row.get("flops_per_token_over_ar") is not None:
            rows, named = row["flops_per_token_over_ar"], f"{method}, {count} at once"
            into.compute.append(Compute(source, named, rows, row["tpf"]))
        if row.get("acceptance") and method not in drafted:
            drafted.add(method)
            found, named = tuple(row["acceptance"]), f"{method}, {count} at once"
            into.drafting.append(Drafting(source, named, stride, row["tpf"], "acceptance", found))


def _method(row: Json) -> str:
    parts = [row.get("engine"), row.get("mode"), row.get("name"), row.get("precision")]
    words = " ".join(str(part) for part in parts if part)
    if "precision" in row:
        words += f", threads {row['threads']}"
    return f"{words} (simulated)" if row.get("simulated") else words


def _spread(row: Json) -> Interval:
    rate = row["tokens_per_second"]
    if isinstance(rate, dict):
        return Interval(rate["median"], rate["min"], rate["max"])
    return Interval(rate, *row.get("tokens_per_second_range", (rate, rate)))


def _read_accept(report: Json, source: int, into: Results) -> None:
    parts = [report["model"], report.get("adapter"), report["method"], report["rule"]]
    method = " ".join(str(part) for part in parts if part)
    stride, tpf = report.get("stride"), report["tpf_decode"]
    for name, found in report["definitions"].items():
        measure, depths = f"alpha, p: {name.replace('_', ' ')}", found["by_depth"]
        alphas = tuple(one["alpha"] if one["tokens"] else None for one in depths)
        into.drafting.append(Drafting(source, method, stride, tpf, measure, alphas))
    if any(one is not None for one in report.get("accepted") or ()):
        found = tuple(report["accepted"])
        into.drafting.append(Drafting(source, method, stride, tpf, "acceptance", found))
    into.compute.append(Compute(source, method, report["rows_per_token"], tpf))


def _read_compare(report: Json, source: int, into: Results) -> None:
    for suite, found in report["suites"].items():
        for name, one in found["metrics"].items():
            into.differences.append(
                Difference(
                    source,
                    f"{suite} {name.removesuffix(',none')}",
                    one["first"],
                    one["second"],
                    Interval(one["difference"], *one["interval"]),
                    one.get("mcnemar"),
                    found["same_answers"],
                )
            )


def _read_paper(report: Json, source: int, into: Results) -> None:
    what = "word problems, exact answers"
    for method, one in report["methods"].items():
        figure = Interval(one["accuracy"], *one["interval"])
        into.quality.append(Quality(source, method, what, figure, one["problems"]))
        into.compute.append(Compute(source, method, one["rows_per_token"], one["tpf"]))
        for name, found in (one["acceptance"] or {"": {"by_depth": ()}}).items():
            measure = f"alpha, p: {name.replace('_', ' ')}" if name else ""
            depths = tuple(found["by_depth"])
            into.drafting.append(Drafting(source, method, None, one["tpf"], measure, depths))
        named = {method: one["tokens_per_second"]}
        if "in_engine" in one:
            named[f"{method}, by the engine's steps"] = one["in_engine"]
        for label, rates in named.items():
            for count, rate in rates.items():
                whole = Interval(rate, rate, rate)
                into.speed.append(Speed(source, label, int(count), whole, rate / int(count), None))
                how = f"at {count} at once"
                into.tradeoffs.append(Tradeoff(source, label, what, how, figure, rate))


def _read_problems(report: Json, source: int, into: Results) -> None:
    count, what = report["problems"], "word problems, exact answers"
    for method, one in report["runs"].items():
        figure = wilson(one["accuracy"] * count, count)
        into.quality.append(Quality(source, method, what, figure, count))
        if one.get("acceptance"):
            found, stride = tuple(one["acceptance"]), len(one["acceptance"]) + 1
            into.drafting.append(Drafting(source, method, stride, one["tpf"], "acceptance", found))
        if "seconds" in one:
            rate, how = one["tokens"] / one["seconds"], "of the evaluation"
            into.tradeoffs.append(Tradeoff(source, method, what, how, figure, rate))


def _read_outcomes(report: Json, source: int, into: Results) -> None:
    for row in report["rows"]:
        for one in row["plans"]:
            found = tuple(one["acceptance"])
            into.drafting.append(
                Drafting(source, one["plan"], row["stride"], one["tpf"], "acceptance", found)
            )


def _rows_with(*keys: str) -> Callable[[Json], bool]:
    def fits(report: Json) -> bool:
        rows = report.get("rows")
        each = rows if isinstance(rows, list) and rows else [None]
        return all(isinstance(row, dict) and row.keys() >= set(keys) for row in each)

    return fits


def _with(*keys: str) -> Callable[[Json], bool]:
    return lambda report: all(key in report for key in keys)


def _children_with(name: str, *keys: str) -> Callable[[Json], bool]:
    def fits(report: Json) -> bool:
        found = report.get(name)
        each = list(found.values()) if isinstance(found, dict) and found else [None]
        return all(isinstance(one, dict) and one.keys() >= set(keys) for one in each)

    return fits


Reader = Callable[[Json, int, Results], None]
READERS: tuple[tuple[str, Callable[[Json], bool], Reader], ...] = (
    ("idlm compare", _children_with("suites", "same_answers", "metrics"), _read_compare),
    ("idlm eval", _with("settings", "suites", "versions"), _read_eval),
    ("idlm accept", _with("definitions", "tpf_decode", "rows_per_token"), _read_accept),
    ("benchmarks.paper", _children_with("methods", "accuracy", "tokens_per_second"), _read_paper),
    ("idlm.nano.evaluate", _children_with("runs", "accuracy"), _read_problems),
    ("benchmarks.outcomes", _rows_with("stride", "plans"), _read_outcomes),
    ("idlm bench", _rows_with("concurrency", "tokens_per_second"), _read_bench),
)
"""The command behind a shape, the test of it, and its reader; the first that fits reads."""


def lines_of(rows: Sequence[Any], key: str) -> Iterator[tuple[Any, list[Any]]]:
    """Rows grouped by an attribute, in the order in which its values come."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(getattr(row, key), []).append(row)
    yield from groups.items()
