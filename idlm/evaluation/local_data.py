"""Items of a suite from local files: JSON lines (also .gz), JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

from idlm.errors import InputError
from idlm.evaluation.suites.suite import Rows, Splits, Suite

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


def read(data: Path, suite: Suite) -> Splits:
    """The rows of a suite's splits; a split without files is left out, but not the first.

    Raises:
        InputError: there are no files, or one cannot be read.
    """
    folder = data / suite.folder
    found = {split: _files(folder, patterns) for split, patterns in suite.files.items()}
    first = next(iter(suite.files))
    if not found[first]:
        raise InputError(
            f"suite {suite.name}: no data in {str(folder)!r}; put files of {suite.source} there "
            f"({', '.join(ENDINGS)}; names like {suite.files[first][0]})"
        )
    others = {file for split, files in found.items() if split != first for file in files}
    if others != set(found[first]):
        found[first] = [file for file in found[first] if file not in others]
    return {
        split: [row for file in files for row in rows(file)]
        for split, files in found.items()
        if files
    }


def _files(folder: Path, patterns: tuple[str, ...] | Any) -> list[Path]:
    for pattern in patterns:
        files = [file for file in sorted(folder.glob(pattern)) if file.name.endswith(ENDINGS)]
        if files:
            return files
    return []


def rows(file: Path) -> Rows:
    """The rows of one file.

    Raises:
        InputError: it cannot be read; the message names it.
    """
    try:
        return _rows(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(file)!r}: {error}; give one of {ENDINGS}") from None


def _rows(file: Path) -> Rows:
    if file.name.endswith(".parquet"):
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(file).to_pylist())
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if file.suffix == ".json":
        return _listed(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _listed(value: Any) -> Rows:
    """The rows of a JSON file: a list, or an object that holds one list."""
    lists = (
        [value]
        if isinstance(value, list)
        else [one for one in value.values() if isinstance(one, list)]
    )
    if len(lists) != 1:
        raise ValueError("it is no list of rows")
    return list(lists[0])
